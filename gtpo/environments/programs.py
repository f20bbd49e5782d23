"""Programs as results: each case runs the program afresh in the sandbox, and what it should give stays here.

A program that could see the expected output, or write its own verdict, would be trained to. So neither is ever in its
process: it gets an input, and what it prints is compared in the trainer's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from gtpo.parsing import last_program as program_of
from gtpo.sandbox import CellStatus, SandboxPool, SandboxUnavailable
from gtpo.sandbox.output import digest_of

__all__ = ["ProgramCase", "passes", "program_of"]


@dataclass(frozen=True)
class ProgramCase:
    """One run of a program. output: what it must print (spaces at the ends of lines and empty lines at the end do not
    count). stdin: what it can read. call: an expression, such as "add(2, 3)", whose value is printed after it ran.
    """

    output: str
    stdin: str = ""
    call: str = ""


async def passes(sandbox: SandboxPool, program: str, cases: Sequence[ProgramCase]) -> bool:
    """Whether `program` prints in every case what it must, each time in a process and a directory of its own.

    It fails where it raises, crashes, takes too long or prints something else: the limits are the pool's, and for each
    case. What it writes to stderr does not count. Cases behind the first failed one are not run.
    Raises ValueError for no case and for an input of more than the sandbox's `file_bytes`; SandboxUnavailable where the
    sandbox failed, which says nothing about the program.
    """
    if not cases:
        raise ValueError("cases must hold at least one case, got none")
    for case in cases:
        code = f"{program}\nprint({case.call})" if case.call else program
        # The keeper sees all of a long output, of which the result holds the ends.
        is_long = len(case.output.encode()) >= sandbox.limits.output_bytes
        result = await sandbox.run(code, stdin=case.stdin, with_stderr=False, with_digest=is_long)
        if result.status is CellStatus.INFRA_ERROR:
            raise SandboxUnavailable(result.error)
        ended = result.status is CellStatus.OK or result.exit_status == 0
        if is_long:
            same = result.output_digest == digest_of(case.output)
        else:
            same = not result.output_truncated and _lines(result.stdout) == _lines(case.output)
        if not (ended and same):
            return False
    return True


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]
