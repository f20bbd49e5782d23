"""What the keeper makes of processes that hostile code has prepared, or that are just ending."""

import asyncio
import os
import signal
import types
from pathlib import Path

import pytest

from gtpo.sandbox import CellStatus, SandboxPool, session_processes
from gtpo.sandbox.descendants import Descendant, ProcessTree
from gtpo.sandbox.session_processes import SessionProcesses
from tests.sandbox.conftest import LIMITS, children

STATUS = """Name:\tpython
State:\t{state}
NSpid:\t{ids}
VmHWM:\t    8000 kB
RssAnon:\t    4000 kB
RssShmem:\t       0 kB
Threads:\t{threads}
SigPnd:\t0000000000000000
ShdPnd:\t0000000000000000
"""


class Written(ProcessTree):
    """Two children, as /proc would show them."""

    def __init__(self, first: str, second: str) -> None:
        self._own_pid = 1
        self._files = {"1/task/1/children": "10 11", "10/status": first, "11/status": second}

    def _read(self, path: str) -> str:
        return self._files.get(path, "")


def test_a_process_that_is_reaped_while_it_is_read_is_not_there():
    """The kernel shows it with the ids 0, by which `kill` would reach the keepers of all sessions, and no thread."""
    alive = STATUS.format(state="S (sleeping)", ids="10\t2", threads=1)
    reaped = STATUS.format(state="X (dead)", ids="0\t0", threads=0)
    for files in ((alive, reaped), (reaped, alive)):
        assert [process.namespace_pid for process in Written(*files).descendants()] == [2]


def test_python_handles_no_signal_in_a_keeper_or_before_code_has_run(cage):
    """Before Landlock had a scope for signals a cell could send SIGINT to its keeper: a KeyboardInterrupt."""
    session = cage.do(cage.pool.open())
    (zygote,) = children(cage.pool._server.process.pid)
    keepers = children(zygote)
    caught = []
    for pid in [zygote, *keepers, *(pid for keeper in keepers for pid in children(keeper))]:
        status = Path(f"/proc/{pid}/status").read_text()
        caught.append(int(status.partition("SigCgt:\t")[2].split()[0], 16) & 1 << signal.SIGINT - 1)
    cage.do(session.close())
    assert len(caught) >= 3 and set(caught) == {0}


@pytest.mark.parametrize("number", [2, 14, 15])
def test_signals_to_the_snapshot_reach_no_other_call(number):
    hostile = f"import os, signal\nsignal.signal({number}, signal.SIG_IGN)\nos.kill(0, {number})\nprint('sent')"

    async def run():
        async with SandboxPool(LIMITS, max_concurrent=1) as pool:
            return [await pool.run(code) for code in (hostile, "print('innocent')", "print('innocent')")]

    sent, *innocent = asyncio.run(run())
    assert sent.stdout == "sent\n"
    assert [(result.status, result.stdout) for result in innocent] == [(CellStatus.OK, "innocent\n")] * 2


def test_a_process_whose_parent_dies_while_they_are_listed_is_not_left(monkeypatch):
    class Listed:
        """What is found one time after the other: the parent 7 dies before its child 8 is found."""

        def __init__(self) -> None:
            found = [{1: "S", 7: "T", 8: "T"}, {1: "T", 7: "Z"}, {1: "T", 7: "Z", 8: "T"}, {1: "T", 7: "Z", 8: "Z"}]
            self.left = [*found, found[-1]]

        def descendants(self) -> list[Descendant]:
            return [
                Descendant(pid, os.getpid() if pid == 1 else pid, state != "Z", state == "T", 1, "")
                for pid, state in self.left.pop(0).items()
            ]

    killed = []
    processes = SessionProcesses(os.getpid(), proc_fd=None)
    processes._tree = listed = Listed()
    monkeypatch.setattr(session_processes, "os", types.SimpleNamespace(kill=lambda *signal: killed.append(signal)))
    assert processes.settle() == ("kept", 0)
    assert killed == [(-1, signal.SIGSTOP), *[(pid, signal.SIGKILL) for pid in (7, 8, 8)]] and not listed.left
    os.close(processes.pidfd)
