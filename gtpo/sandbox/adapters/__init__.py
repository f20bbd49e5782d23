"""Sandboxes of others behind the protocol of `gtpo.sandbox`: `open(setup_code)` gives a session with `run(code)`.

What isolates the code is theirs, and is not tested at the start of a run: `gtpo sandbox check --adapter` does that.
"""
