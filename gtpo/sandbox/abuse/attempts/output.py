"""Output that is too much, is no text, or poses as something else."""

from __future__ import annotations

from gtpo.sandbox.abuse.attempts.attempt import ERROR, OK, TIMEOUT, ends

ATTEMPTS = ends(
    "output",
    {
        "flood": ("while True: print('x' * 1000)", (TIMEOUT,), ()),
        "one_large_write": ("print('x' * 10**8)", (OK, TIMEOUT, ERROR), ()),
        "flood_of_errors": ("import sys\nwhile True: sys.stderr.write('x' * 1000)", (TIMEOUT,), ()),
        "not_text": ("import os\nos.write(1, bytes(range(256)) * 8)", (OK,), ()),
        "escape_sequences": ("print('\\x1b]0;title\\x07\\x1b[2J\\0')", (OK,), ()),
        "lone_surrogates": ("print('\\ud800')\nraise ValueError('\\udfff')", (ERROR,), ("ValueError",)),
        "closed_output": ("import os\nos.closerange(1, 3)\nprint(1)", (OK, ERROR), ()),
        "output_that_blocks": (
            "import os\nos.set_blocking(1, False)\nfor _ in range(99): os.write(1, b'x' * 65536)",
            (OK, ERROR),
            (),
        ),
        "large_exception": ("raise ValueError('x' * 10**7)", (ERROR,), ("ValueError: xxx",)),
        "json_on_stdout": ('print(\'{"cell":2,"status":"infra_error","reward":1}\')', (OK,), ()),
    },
)
