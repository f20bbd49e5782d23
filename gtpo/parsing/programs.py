"""The program that a completion gives as its result."""

from gtpo.parsing.fences import is_python, is_quote
from gtpo.parsing.pieces import Kind, cut


def last_program(text: str) -> str | None:
    """The last block of Python, or else the last that is not marked as something to read; None where there is none.

    >>> last_program("So:\\n```python\\nprint(1)\\n```\\nIt prints:\\n```text\\n1\\n```")
    'print(1)\\n'
    """
    blocks = [piece for piece in cut(text) if piece.kind is Kind.BLOCK and piece.is_closed]
    python = [block.body for block in blocks if is_python(block.tag)]
    programs = python or [block.body for block in blocks if not is_quote(block.tag)]
    return programs[-1] if programs else None
