"""How code ends: what is said of its exception, and what Python does at the end of a program."""

from __future__ import annotations

import atexit
import contextlib
import sys
import traceback

_MAX_ERROR_CHARS = 2000


def judge(exception: BaseException, name: str, *, show: bool) -> tuple[tuple[str, int | None] | None, int]:
    """What the code called `name` raised, with its line, None where it only said that it is done; its exit status.

    `show`: say on stderr what a program would.
    """
    try:
        status = _exit_status(exception)
        if status == 0:
            return None, 0
        if show:
            _show(exception)
        return (describe(exception)[:_MAX_ERROR_CHARS], _line(exception, name)), status
    except BaseException:
        # The exception's own methods failed, or memory or the stack is exhausted.
        return ("the cell raised an exception that cannot be shown", None), 1


def _exit_status(exception: BaseException) -> int:
    """Of a program that ends by `exception`.

    >>> [_exit_status(end) for end in (SystemExit(), SystemExit(3), SystemExit(256), SystemExit("no"), ValueError())]
    [0, 3, 0, 1, 1]
    """
    if not isinstance(exception, SystemExit):
        return 1
    code = exception.code
    return 0 if code is None else code & 0xFF if isinstance(code, int) else 1


def _show(exception: BaseException) -> None:
    if not isinstance(exception, SystemExit):
        # Without the frame of the sandbox.
        shown = exception.__traceback__ and exception.__traceback__.tb_next
        traceback.print_exception(type(exception), exception, shown)
    elif not isinstance(exception.code, int):
        print(exception.code, file=sys.stderr)


def finish() -> None:
    """Wait for threads, then call what was registered with atexit, as Python does after the last line."""
    threading = sys.modules.get("threading")
    for end in (threading and threading._shutdown, atexit._run_exitfuncs):
        with contextlib.suppress(BaseException):
            end and end()


def describe(exception: BaseException) -> str:
    """The last lines of the traceback: "Type: message".

    >>> describe(ValueError("no")), describe(KeyError("a")), describe(EOFError())
    ('ValueError: no', "KeyError: 'a'", 'EOFError')
    """
    kind = type(exception)
    name = (
        kind.__qualname__ if kind.__module__ in ("builtins", "__main__") else f"{kind.__module__}.{kind.__qualname__}"
    )
    # str() of a SyntaxError also names the file.
    message = exception.msg if isinstance(exception, SyntaxError) and exception.msg else str(exception)
    return f"{name}: {message}" if message else name


def _line(exception: BaseException, name: str) -> int | None:
    if isinstance(exception, SyntaxError) and exception.filename == name:
        return exception.lineno
    lines = [line for frame, line in traceback.walk_tb(exception.__traceback__) if frame.f_code.co_filename == name]
    return lines[-1] if lines else None
