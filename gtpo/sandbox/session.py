"""The trainer's end of one session: its requests, its results, and its recovery when the sandbox fails under it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from pathlib import PurePosixPath
from types import TracebackType
from typing import TYPE_CHECKING, Any

from gtpo.sandbox import frames
from gtpo.sandbox.code_tools import CodeTools, ToolCalls
from gtpo.sandbox.contract import CellResult, CellStatus, SandboxUnavailable, SessionState
from gtpo.sandbox.work import Work

if TYPE_CHECKING:
    from gtpo.sandbox.pool import SandboxPool

# A session is built up anew by running its cells again; not if they took longer than this, or are larger. Nor if that
# would make it longer than this for all times together, since code can bring it about.
_MAX_REPLAY_CPU_S = 60.0
_MAX_REPLAY_WALL_S = 120.0
_MAX_REPLAY_BYTES = 4 * 2**20
# A keeper that takes this much longer than its own limits is given up.
_KEEPER_TIMEOUT_S = 60.0


class _ToolFailed(Exception):
    """A tool that code called raised `error`: a fault neither of the code nor of the sandbox."""

    def __init__(self, error: Exception) -> None:
        self.error = error


class SandboxSession:
    """One interpreter with its variables and files; made by `SandboxPool.open`, closed at the end of an `async with`.

    `layers` are on in it, `missing` maps those that are off to the reason.
    """

    def __init__(self, pool: SandboxPool, setup_code: str) -> None:
        self._pool = pool
        self._setup_code = setup_code
        self._work = Work("session")
        self._turn = asyncio.Lock()
        self._slot = pool._slot()
        self._stream: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        # Of an answer whose length has been read, but not yet the rest.
        self._answer_bytes: int | None = None
        self._rebuilt = False
        self.layers: tuple[str, ...] = ()
        self.missing: dict[str, str] = {}
        self._forget()

    def _forget(self) -> None:
        self._num_cells = 0
        self._num_requests = 0
        self._calls = ToolCalls(None)
        # Of all replays so far.
        self._replay_cpu_s = self._replay_wall_s = 0.0
        self._forget_history()

    def _forget_history(self) -> None:
        # What brought the session to its state, with a hash of what each request gave; None: cannot be repeated.
        self._history: list[tuple[dict[str, Any], int, ToolCalls]] | None = []
        self._history_cpu_s = self._history_wall_s = 0.0
        self._history_bytes = 0

    async def __aenter__(self) -> SandboxSession:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def run(
        self, code: str, *, stdin: str = "", rollback: bool = True, tools: CodeTools | None = None
    ) -> CellResult:
        """Run `code` as the next cell, with `stdin` on its standard input. Never raises for what the code does.

        ValueError where `stdin` has more than `file_bytes`.  `tools` are functions to the code; their time is not the
        cell's.

        After a TIMEOUT or CRASH the variables are as before the cell (its files stay); without `rollback`, which
        saves the snapshot, they are lost.  A cell that is cancelled before its end leaves them as before it, and so
        does one whose tool raises, which is raised here.  A cell under which the sandbox failed is tried once more.
        """
        return await self._work.do(self._run(code, stdin, rollback=rollback, discard=False, tools=tools))

    async def put(self, name: str, data: bytes) -> None:
        """Write the file `name` of the session's directory, where directories in the name are made; OSError when the
        session cannot."""
        self._check_name(name)
        await self._work.do(self._put(name, data))

    async def _put(self, name: str, data: bytes) -> None:
        async with self._turn, self._slot:
            failed = await self._send_pieces({"op": "put", "name": name}, data)
        if failed is not None:
            raise OSError(f"{name}: {failed.error}")

    async def get(self, name: str, *, max_bytes: int = 16 * 2**20) -> bytes:
        """What the file `name` of the session's directory holds; OSError when it cannot be read or is larger."""
        self._check_name(name)
        return await self._work.do(self._get(name, max_bytes))

    async def _get(self, name: str, max_bytes: int) -> bytes:
        data = b""
        while True:
            try:
                piece = base64.b64decode(await self._get_piece(name, len(data)), validate=True)
            except ValueError:
                raise OSError(f"{name}: the session gave no data") from None
            data += piece
            if len(data) > max_bytes:
                raise OSError(f"{name}: more than max_bytes={max_bytes}")
            if len(piece) < frames.MAX_PIECE_BYTES:
                return data

    async def reset(self) -> None:
        """Forget variables and files: the next cell is the first one after the setup code."""
        await self._work.do(self._reset())

    async def _reset(self) -> None:
        async with self._turn:
            await self._drop()
            self._forget()

    async def close(self) -> None:
        """End the session's processes and wait until they are gone. Closing twice is harmless.

        What runs in it is cancelled, and its callers get a RuntimeError.
        """
        try:
            await self._work.close()
            await self._drop()
        finally:
            self._pool._release(self)

    async def _run(
        self,
        code: str,
        stdin: str,
        *,
        rollback: bool,
        discard: bool,
        tools: CodeTools | None = None,
        with_stderr: bool = True,
        with_digest: bool = False,
    ) -> CellResult:
        data = stdin.encode("utf-8", "surrogatepass")
        if len(data) > (most := self._pool.limits.file_bytes):
            raise ValueError(f"stdin must have at most file_bytes={most} bytes, got {len(data)}")
        async with self._turn, self._slot:
            self._num_cells += 1
            request: dict[str, Any] = {"op": "run", "number": self._num_cells, "code": code, "stdin": stdin}
            request |= {"with_stderr": with_stderr, "with_digest": with_digest, "tools": {}}
            if tools is not None:
                request["tools"] = {name: list(names) for name, names in tools.parameters.items()}
                request["max_calls"] = tools.max_calls
            if len(data) > frames.MAX_PIECE_BYTES // 2:
                # In pieces, ahead of the code: as JSON it could take six times as much.
                request["stdin"] = None
                result = await self._send_pieces({"op": "stdin"}, data)
            else:
                result = None
            if result is None:
                self._calls = ToolCalls(tools)
                result, _ = await self._request(request, rollback=rollback, discard=discard)
            self._pool._count(result)
        return result

    async def _send_pieces(self, request: dict[str, Any], data: bytes) -> CellResult | None:
        """Have the interpreter write `data` where `request` says; the result of the piece that failed, if one did."""
        self._calls = ToolCalls(None)
        for offset in range(0, max(len(data), 1), frames.MAX_PIECE_BYTES):
            piece = base64.b64encode(data[offset : offset + frames.MAX_PIECE_BYTES]).decode()
            result, _ = await self._request(request | {"offset": offset, "data": piece}, rollback=True, discard=False)
            if result.status is not CellStatus.OK:
                return result
        return None

    async def _get_piece(self, name: str, offset: int) -> str:
        async with self._turn, self._slot:
            self._calls = ToolCalls(None)
            request = {"op": "get", "name": name, "offset": offset}
            result, value = await self._request(request, rollback=True, discard=False)
        if result.status is not CellStatus.OK or value is None:
            raise OSError(f"{name}: {result.error or 'the session gave no data'}")
        return value

    async def _request(
        self, request: dict[str, Any], *, rollback: bool, discard: bool
    ) -> tuple[CellResult, str | None]:
        """Have `request` done, twice if the sandbox fails the first time; the result, and what a file held."""
        self._num_requests += 1
        snapshot = discard or (rollback and self._pool.snapshots)
        request |= {"cell": self._num_requests, "snapshot": snapshot, "discard": discard}
        try:
            frame = frames.encode(request)
        except ValueError as failure:
            return CellResult(CellStatus.ERROR, error=f"SyntaxError: cell too long: {failure}"), None
        self._rebuilt = False
        self._rebuild_start = self._replay_cpu_s
        faults: list[str] = []
        while len(faults) < 2:
            try:
                if self._stream is None and not await self._rebuild():
                    faults.append("; ".join([*faults, "the session's variables could not be restored"]))
                    break
                answer = await self._exchange(frame, self._calls, live=request)
                if answer["status"] != CellStatus.INFRA_ERROR.value:
                    return await self._conclude(request, answer, rollback=rollback, num_tries=len(faults) + 1)
                faults.append(answer["error"])
                if answer.get("state") == SessionState.ROLLED_BACK.value and len(faults) == 1:
                    # The session goes on from before the cell.
                    self._pool._num_faults += 1
                    continue
            except _ToolFailed as failure:
                raise failure.error from None
            except (EOFError, OSError, RuntimeError) as failure:
                faults.append(str(failure))
            self._pool._num_faults += 1
            await self._drop()
        self._forget_history()
        error = f"sandbox failure: {faults[-1]}"
        return CellResult(
            CellStatus.INFRA_ERROR,
            error=error,
            state=SessionState.LOST,
            num_tries=max(len(faults), 1),
            rebuild_cpu_time_s=self._replay_cpu_s - self._rebuild_start,
        ), None

    async def _conclude(
        self, request: dict[str, Any], answer: dict[str, Any], *, rollback: bool, num_tries: int
    ) -> tuple[CellResult, str | None]:
        state = SessionState(answer["state"])
        if state is SessionState.KEPT:
            self._remember(request, answer)
        elif state is SessionState.LOST:
            await self._drop()
            if rollback and not request["discard"]:
                # No snapshot was there to go on with.
                with contextlib.suppress(EOFError, OSError, RuntimeError):
                    if await self._rebuild():
                        state = SessionState.ROLLED_BACK
        if state is SessionState.LOST:
            self._forget_history()
        result = CellResult(
            status=CellStatus(answer["status"]),
            stdout=answer["stdout"],
            error=answer["error"],
            error_line=answer["error_line"],
            exit_status=answer["exit_status"],
            cpu_time_s=answer["cpu_time_s"],
            wall_time_s=answer["wall_time_s"],
            peak_memory_bytes=answer["peak_memory_bytes"],
            num_output_bytes=answer["num_output_bytes"],
            output_digest=answer["output_digest"],
            output_truncated=answer["output_truncated"],
            state=state,
            num_tries=num_tries,
            rebuilt=self._rebuilt,
            rebuild_cpu_time_s=self._replay_cpu_s - self._rebuild_start,
        )
        return result, answer["value"]

    def _remember(self, request: dict[str, Any], answer: dict[str, Any]) -> None:
        if self._history is None or request["op"] == "get":
            return
        self._history.append((request | {"snapshot": False}, _outcome(answer), self._calls))
        self._history_bytes += self._calls.num_bytes
        self._history_cpu_s += answer["cpu_time_s"]
        self._history_wall_s += answer["wall_time_s"]
        self._history_bytes += sum(len(request.get(key) or "") for key in ("code", "stdin", "data"))
        too_long = self._history_cpu_s > _MAX_REPLAY_CPU_S or self._history_wall_s > _MAX_REPLAY_WALL_S
        if too_long or self._history_bytes > _MAX_REPLAY_BYTES:
            self._history = None

    async def _rebuild(self) -> bool:
        """Start the process, run the setup code and then the cells again; whether all gave what they gave before.

        Where they did not, the session has been started with the setup code only, and its history is forgotten.
        """
        await self._start()
        replayed = self._history is not None and self._may_replay()
        for request, outcome, calls in (self._history or ()) if replayed else ():
            # The others wait for no more than a cell, as if this were one.
            self._slot.give_back()
            await self._slot.take()
            answer = await self._exchange(frames.encode(request), calls)
            self._replay_cpu_s += answer.get("cpu_time_s", 0.0)
            self._replay_wall_s += answer.get("wall_time_s", 0.0)
            if answer.get("state") != SessionState.KEPT.value or _outcome(answer) != outcome:
                replayed = False
                break
        if not replayed:
            await self._drop()
            self._forget_history()
            await self._start()
        self._rebuilt = bool(self._history)
        return replayed

    def _may_replay(self) -> bool:
        """Whether the session may be built up once more."""
        cpu_s, wall_s = self._replay_cpu_s + self._history_cpu_s, self._replay_wall_s + self._history_wall_s
        return cpu_s <= _MAX_REPLAY_CPU_S and wall_s <= _MAX_REPLAY_WALL_S

    async def _open(self) -> None:
        async with self._slot:
            await self._start()

    async def _start(self) -> None:
        """Start the process and run the setup code as cell 0."""
        request = {"op": "run", "number": 0, "code": self._setup_code, "stdin": "", "tools": {}}
        request |= {"with_stderr": True, "cell": 0, "snapshot": False, "discard": False}
        # One in reserve may have died unnoticed: then all are new.
        for in_reserve in (True, False):
            self._stream = await self._pool._spawn(in_reserve=in_reserve)
            try:
                answer = await self._exchange(frames.encode(request), ToolCalls(None))
                break
            except (EOFError, ConnectionError) as failure:
                await self._drop()
                if not in_reserve:
                    raise SandboxUnavailable(f"the session died at its start: {failure}") from failure
        if answer["status"] != CellStatus.OK.value:
            await self._drop()
            infra = answer["status"] == CellStatus.INFRA_ERROR.value
            raise SandboxUnavailable(answer["error"]) if infra else RuntimeError(f"setup_code: {answer['error']}")
        self.layers, self.missing = tuple(answer["layers"]), answer["missing"]
        report = self._pool._report
        if report is not None and self.layers != report.layers:
            await self._drop()
            raise SandboxUnavailable(f"the session has the layers {self.layers}, the self test had {report.layers}")

    async def _exchange(
        self, request: bytes, calls: ToolCalls, *, live: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The answer to a request; `live` is the request as it was made, None where it is made again."""
        assert self._stream is not None
        reader, writer = self._stream
        calls.rewind()
        try:
            while True:
                # the keeper's time, without that of a tool
                async with asyncio.timeout(self._pool.limits.max_wall_time_s + _KEEPER_TIMEOUT_S):
                    writer.write(request)
                    await writer.drain()
                    answer = await self._read_answer(reader)
                if "call" not in answer:
                    return answer
                # other cells may run while a tool works for this one
                self._slot.give_back()
                try:
                    reply = await calls.answer(answer["call"])
                except Exception as failure:
                    raise _ToolFailed(failure) from failure
                await self._slot.take()
                request = frames.encode(reply)
        except TimeoutError:
            raise EOFError("the keeper does not answer") from None
        except (asyncio.CancelledError, _ToolFailed):
            await (self._cancel(reader, writer, live) if self._work.open else self._drop())
            raise
        except BaseException:
            # The answer to this cell may still come: the stream cannot be used again.
            await self._drop()
            raise

    async def _read_answer(self, reader: asyncio.StreamReader) -> dict[str, Any]:
        """The next answer. After a cancellation it can be called again: what was read of its frame is not lost.

        On the way to it the slot is lent while the cell waits.
        """
        while True:
            if self._answer_bytes is None:
                self._answer_bytes = frames.body_length(await reader.readexactly(frames.HEADER.size))
            body = await reader.readexactly(self._answer_bytes)
            self._answer_bytes = None
            answer = frames.decode(body)
            if "waits" not in answer:
                return answer
            self._slot.wants(not answer["waits"])

    async def _cancel(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, live: dict[str, Any] | None
    ) -> None:
        """Have the running cell ended. Where it leaves no snapshot to go on with, the processes end, too."""
        state, answer = None, dict[str, Any]()
        try:
            async with asyncio.timeout(_KEEPER_TIMEOUT_S):
                writer.write(frames.encode({"cancel": True}))
                while "call" in (answer := await self._read_answer(reader)):
                    pass
                state = answer.get("state")
        except (EOFError, OSError, ValueError):
            # It was ending anyway.
            pass
        finally:
            if state == SessionState.KEPT.value and live is not None:
                # It had ended by then.
                self._remember(live, answer)
            elif state != SessionState.ROLLED_BACK.value:
                await self._drop()

    async def _drop(self) -> None:
        """End the session's processes."""
        self._answer_bytes = None
        if self._stream is not None:
            stream, self._stream = self._stream, None
            await end_stream(*stream)

    @staticmethod
    def _check_name(name: str) -> None:
        path = PurePosixPath(name)
        if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name:
            raise ValueError(f"name must be a path below the session's directory, got {name!r}")


async def end_stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Close a keeper's stream and wait for the keeper's end: it closes its side after its interpreter is dead."""
    try:
        async with asyncio.timeout(_KEEPER_TIMEOUT_S):
            writer.write_eof()
            while await reader.read(65536):
                pass
    # TimeoutError is one: a keeper that hangs ends with the fork server.
    except OSError:
        pass
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def _outcome(answer: dict[str, Any]) -> int:
    return hash((answer["status"], answer["stdout"], answer["error"]))
