"""Adapters to the sandboxes of others, against servers on the loopback that speak their published messages."""

import asyncio
import contextlib
import io
import json
import re
import threading
import traceback
from collections.abc import AsyncIterator, Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection, serve

from gtpo.assembly import describe_sandbox, make_sandbox
from gtpo.config import config_from_dict
from gtpo.sandbox import CellResult, CellStatus, SandboxLimits, SandboxUnavailable
from gtpo.sandbox.adapters import openenv as openenv_adapter
from gtpo.sandbox.adapters.e2b import E2BSandbox
from gtpo.sandbox.adapters.openenv import OpenEnvSandbox
from gtpo.sandbox.adapters.remote import RemoteSandbox
from gtpo.sandbox.adapters.sandbox_fusion import SandboxFusion
from gtpo.sandbox.contract import SessionState
from gtpo.tools import PythonTool, ToolSet
from gtpo.types import ToolStatus

GUIDE = Path(__file__).parents[2] / "docs" / "sandbox_adapters.md"
LIMITS = SandboxLimits(wall_time_s=20.0, output_bytes=512)
# of the cell that is to time out, and of no other
SHORT = SandboxLimits(wall_time_s=0.1, output_bytes=512)
# Cells that the servers below do not run: one that never ends, and one under which the service fails.
ENDLESS, FATAL = "while True: pass", "fail the service"


class Interpreter:
    """Runs the tests' own cells, in this process."""

    def __init__(self) -> None:
        self.variables: dict[str, Any] = {}

    def run(self, code: str) -> tuple[str, BaseException | None]:
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            try:
                exec(compile(code, "<cell>", "exec"), self.variables)
            except Exception as error:
                return output.getvalue(), error
        return output.getvalue(), None


class Fusion(BaseHTTPRequestHandler):
    """POST /run_jupyter as sandbox/server/sandbox_api.py answers it."""

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/run_jupyter" and request["cell_timeout"] in (LIMITS.wall_time_s, SHORT.wall_time_s)
        answer: dict[str, Any] = {"status": "Success", "message": "", "driver": {"status": "Finished"}, "cells": []}
        interpreter = Interpreter()
        for cell in request["cells"]:
            if FATAL in cell:
                answer = {"status": "SandboxError", "message": "no worker left", "driver": None, "cells": []}
                break
            if ENDLESS in cell:
                answer |= {"status": "Failed", "driver": {"status": "TimeLimitExceeded"}, "cells": []}
                break
            output, error = interpreter.run(cell)
            errors = [] if error is None else [{"ename": type(error).__name__, "evalue": str(error), "traceback": []}]
            answer["cells"].append({"stdout": output, "stderr": "", "display": [], "error": errors})
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@contextlib.asynccontextmanager
async def sandbox_fusion() -> AsyncIterator[RemoteSandbox]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Fusion) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        async with SandboxFusion(f"http://127.0.0.1:{server.server_address[1]}/", LIMITS) as sandbox:
            yield sandbox
        server.shutdown()


class TimeoutException(Exception):
    """Named as E2B's."""


class E2BInterpreter(Interpreter):
    """An AsyncSandbox of e2b_code_interpreter, as far as it is used."""

    async def run_code(self, code: str, *, timeout: float) -> Any:
        assert timeout in (LIMITS.wall_time_s, SHORT.wall_time_s)
        if ENDLESS in code:
            await asyncio.sleep(timeout)
            raise TimeoutException("Execution timed out")
        if FATAL in code:
            raise TimeoutException("The sandbox was killed while the request was in progress.")
        output, error = self.run(code)
        failure = error and SimpleNamespace(name=type(error).__name__, value=str(error), traceback="")
        return SimpleNamespace(logs=SimpleNamespace(stdout=[output], stderr=[]), error=failure, results=[])

    async def kill(self) -> bool:
        E2BInterpreter.alive -= 1
        return True

    alive = 0


@contextlib.asynccontextmanager
async def e2b() -> AsyncIterator[RemoteSandbox]:
    async def create() -> E2BInterpreter:
        E2BInterpreter.alive += 1
        return E2BInterpreter()

    async with E2BSandbox(create, LIMITS) as sandbox:
        yield sandbox
    assert E2BInterpreter.alive == 0


@contextlib.asynccontextmanager
async def openenv() -> AsyncIterator[RemoteSandbox]:
    async def answer(connection: ServerConnection) -> None:
        interpreter = Interpreter()
        async for text in connection:
            message = json.loads(text)
            if message["type"] == "close":
                return
            code = message["data"].get("code", "")
            if ENDLESS in code:
                continue
            if FATAL in code:
                error = {"message": "no executor", "code": "EXECUTION_ERROR"}
                await connection.send(json.dumps({"type": "error", "data": error}))
                continue
            output, raised = interpreter.run(code) if message["type"] == "step" else ("", None)
            stderr = "" if raised is None else "".join(traceback.format_exception(raised))
            observation = {"stdout": output, "stderr": stderr, "exit_code": int(raised is not None)}
            data = {"observation": observation, "reward": None, "done": False}
            await connection.send(json.dumps({"type": "observation", "data": data}))

    async with serve(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with OpenEnvSandbox(f"ws://127.0.0.1:{port}/ws", LIMITS) as sandbox:
            yield sandbox


ADAPTERS = {"sandbox_fusion": sandbox_fusion, "e2b": e2b, "openenv": openenv}
Adapter = Callable[[], contextlib.AbstractAsyncContextManager[RemoteSandbox]]


@pytest.fixture(params=ADAPTERS)
def adapter(request: pytest.FixtureRequest) -> Adapter:
    return ADAPTERS[request.param]


def run_cells(adapter: Adapter, *codes: str, setup_code: str = "") -> list[CellResult]:
    async def run() -> list[CellResult]:
        async with adapter() as sandbox:
            session = await sandbox.open(setup_code)
            results = []
            try:
                for code in codes:
                    sandbox.limits = SHORT if code == ENDLESS else LIMITS
                    results.append(await session.run(code))
            finally:
                await session.close()
                await session.close()
            return results

    return asyncio.run(run())


def test_cells_share_variables_setup_code_and_their_number(adapter: Adapter) -> None:
    results = run_cells(
        adapter, "x = double(3)", "print(x)\n1 / 0", "print(x + 1, __cell__)", setup_code="def double(n): return 2 * n"
    )
    assert [(result.status, result.stdout, result.error) for result in results] == [
        (CellStatus.OK, "", ""),
        (CellStatus.ERROR, "6\n", "ZeroDivisionError: division by zero"),
        (CellStatus.OK, "7 3\n", ""),
    ]
    assert all(result.state is SessionState.KEPT and result.wall_time_s > 0 for result in results)


def test_a_cell_that_does_not_end_times_out_and_the_session_goes_on(adapter: Adapter) -> None:
    _, late, after = run_cells(adapter, "x = 1", ENDLESS, "print(base, 'x' in globals())", setup_code="base = 7")
    kept = adapter is sandbox_fusion
    assert (late.status, late.error) == (CellStatus.TIMEOUT, "wall time limit of 0.1 s exceeded")
    assert late.state is (SessionState.ROLLED_BACK if kept else SessionState.LOST)
    assert after.stdout == f"7 {kept}\n"


def test_a_fault_of_the_service_is_never_the_codes(adapter: Adapter) -> None:
    lost, after = run_cells(adapter, FATAL, "print(base)", setup_code="base = 7")
    assert lost.status is CellStatus.INFRA_ERROR and lost.error.startswith("sandbox: ")
    assert (after.status, after.stdout) == (CellStatus.OK, "7\n")


def test_the_answer_to_a_cancelled_cell_is_not_taken_for_that_to_the_next() -> None:
    asked, going_on = asyncio.Event(), asyncio.Event()

    async def echo(connection: ServerConnection) -> None:
        async for text in connection:
            message = json.loads(text)
            code = message["data"].get("code", "")
            if "held" in code:
                asked.set()
                await going_on.wait()
            if message["type"] != "close":
                observation = {"stdout": code.partition("\n")[2], "stderr": "", "exit_code": 0}
                await connection.send(json.dumps({"type": "observation", "data": {"observation": observation}}))

    async def run() -> list[str]:
        async with serve(echo, "127.0.0.1", 0) as server:
            sandbox = OpenEnvSandbox(f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/ws", LIMITS)
            session = await sandbox.open()
            cell = asyncio.ensure_future(session.run("held"))
            await asyncio.wait_for(asked.wait(), 60)
            cell.cancel()
            # closing waits for the server's end of it
            going_on.set()
            with pytest.raises(asyncio.CancelledError):
                await cell
            outputs = [(await session.run(code)).stdout for code in ("first", "second")]
            await session.close()
            return outputs

    assert asyncio.run(run()) == ["first", "second"]


def test_no_virtual_machine_outlives_a_cancelled_start_or_a_close_meanwhile() -> None:
    alive: set[object] = set()

    async def run() -> None:
        asked, started, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

        class Machine(E2BInterpreter):
            async def kill(self) -> bool:
                await ended.wait()
                alive.discard(self)
                return True

        async def create() -> Machine:
            machine = Machine()
            alive.add(machine)
            asked.set()
            await started.wait()
            return machine

        sandbox = E2BSandbox(create, LIMITS)
        ended.set()
        opening = asyncio.ensure_future(sandbox.open())
        await asked.wait()
        opening.cancel()
        asyncio.get_running_loop().call_soon(started.set)
        with pytest.raises(asyncio.CancelledError):
            await opening
        assert not alive

        session = await sandbox.open()
        await session._abandon()
        asked.clear()
        started.clear()
        running = asyncio.ensure_future(session.run("1"))
        await asked.wait()
        await session.close()
        started.set()
        with pytest.raises(RuntimeError, match="closed"):
            await running
        assert not alive

        session = await sandbox.open()
        ended.clear()
        closing = asyncio.ensure_future(session.close())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        ended.set()
        while alive:
            await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(run(), 60))


@pytest.mark.parametrize(
    "answer",
    [{}, {"cells": None}, {"cells": [None]}, {"cells": [{}]}, {"cells": [{"error": [{}], "stdout": "", "stderr": ""}]}],
    ids=json.dumps,
)
def test_an_answer_of_another_form_is_a_fault_of_the_service(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    async def post(*_: object, **__: object) -> Any:
        return {"status": "Success", **answer}

    async def run() -> CellResult:
        sandbox = SandboxFusion("http://127.0.0.1:1", LIMITS)
        monkeypatch.setattr(sandbox, "post", post)
        return await (await sandbox.open()).run("print(1)")

    result = asyncio.run(run())
    assert result.status is CellStatus.INFRA_ERROR and "an answer of another form" in result.error


def test_a_server_that_does_not_reset_is_no_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    left = asyncio.Event()

    async def answer(connection: ServerConnection) -> None:
        async for _ in connection:
            pass
        left.set()

    async def run() -> None:
        async with serve(answer, "127.0.0.1", 0) as server:
            sandbox = OpenEnvSandbox(f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/ws", LIMITS)
            exchange = openenv_adapter._OpenEnvSession._exchange

            async def impatient(session: Any, message: Any, *, timeout_s: float) -> Any:
                return await exchange(session, message, timeout_s=0.01)

            monkeypatch.setattr(openenv_adapter._OpenEnvSession, "_exchange", impatient)
            with pytest.raises(SandboxUnavailable, match="no reset within 20 seconds"):
                await sandbox.open()
            # the connection was given up with it
            await asyncio.wait_for(left.wait(), 60)

    asyncio.run(run())


def test_long_output_keeps_head_and_tail(adapter: Adapter) -> None:
    (result,) = run_cells(adapter, "print('a' * 500 + 'b' * 500)")
    assert result.output_truncated and result.num_output_bytes == 1001
    assert result.stdout.startswith("aaa") and result.stdout.endswith("bbb\n") and "bytes left out" in result.stdout


def test_setup_code_that_fails_is_our_mistake(adapter: Adapter) -> None:
    with pytest.raises(RuntimeError, match="setup_code: ZeroDivisionError: division by zero"):
        run_cells(adapter, setup_code="1 / 0")


def test_the_python_tool_takes_any_of_them(adapter: Adapter) -> None:
    async def run() -> list[tuple[ToolStatus, str]]:
        async with adapter() as sandbox:
            session = await sandbox.open()
            tool = PythonTool(session)
            results = [await tool.call({"code": code}) for code in ("print(6 * 7)", "print(1); int('x')")]
            await session.close()
            return [(result.status, result.text) for result in results]

    assert asyncio.run(run()) == [
        (ToolStatus.OK, "42"),
        (ToolStatus.ERROR, "1\nValueError: invalid literal for int() with base 10: 'x'"),
    ]


@pytest.mark.parametrize(
    "make",
    [
        lambda: SandboxFusion("http://127.0.0.1:9", LIMITS),
        lambda: OpenEnvSandbox("ws://127.0.0.1:9/ws", LIMITS),
        lambda: E2BSandbox(broken_create, LIMITS),
    ],
)
def test_a_service_that_is_not_there_is_said_at_the_start(make: Callable[[], RemoteSandbox]) -> None:
    async def run() -> None:
        sandbox = make()
        try:
            await sandbox.start()
        finally:
            await sandbox.close()

    with pytest.raises(SandboxUnavailable):
        asyncio.run(run())


async def broken_create() -> Any:
    raise ConnectionError("no such account")


@pytest.mark.parametrize(
    ("name", "variable"), [("sandbox_fusion", "SANDBOX_FUSION_ENDPOINT"), ("openenv", "OPENENV_URL")]
)
def test_the_environment_names_the_service(monkeypatch: pytest.MonkeyPatch, name: str, variable: str) -> None:
    module = __import__(f"gtpo.sandbox.adapters.{name}", fromlist=["from_environment"])
    monkeypatch.delenv(variable, raising=False)
    with pytest.raises(ValueError, match=f"set {variable}"):
        module.from_environment()
    monkeypatch.setenv(variable, "http://host")
    assert isinstance(module.from_environment(), RemoteSandbox)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("httpx2", "websockets.asyncio.client", "e2b_code_interpreter"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    for make, extra in (
        (lambda: SandboxFusion("u"), "tools"),
        (lambda: OpenEnvSandbox("u"), "tools"),
        (E2BSandbox, "e2b"),
    ):
        with pytest.raises(ImportError, match=rf"gtpo\[{extra}\]"):
            make()


def test_a_run_takes_an_adapter_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = {"sandbox": {"adapter": "gtpo.sandbox.adapters.sandbox_fusion:from_environment", "wall_time_s": 3.0}}
    config, tools = config_from_dict(raw), ToolSet(["python"])
    monkeypatch.setenv("SANDBOX_FUSION_ENDPOINT", "http://host")
    sandbox = make_sandbox(config, tools)
    assert isinstance(sandbox, SandboxFusion) and sandbox.limits.wall_time_s == 3.0
    assert describe_sandbox(sandbox) == "sandbox: SandboxFusion, whose isolation is not tested here"
    assert make_sandbox(config, ToolSet(["calculator"])) is None
    monkeypatch.delenv("SANDBOX_FUSION_ENDPOINT")
    with pytest.raises(ValueError, match=r"sandbox\.adapter: set SANDBOX_FUSION_ENDPOINT"):
        make_sandbox(config, tools)
    wrong = {
        "nowhere": 'must be "package.module:name"',
        "gtpo.nowhere:f": "'gtpo.nowhere:f' cannot be imported",
        "gtpo.sandbox:nothing": "'gtpo.sandbox:nothing' must name something",
    }
    for adapter, message in wrong.items():
        with pytest.raises(ValueError, match=re.escape(f"sandbox.adapter {message}")):
            make_sandbox(config_from_dict({"sandbox": {"adapter": adapter}}), tools)


def test_the_guides_example_runs() -> None:
    (source,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    scope: dict[str, Any] = {}
    exec(source.replace("wall_time_s=5.0", "wall_time_s=0.1"), scope)
    with ThreadingHTTPServer(("127.0.0.1", 0), Fusion) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        assert asyncio.run(scope["main"](f"http://127.0.0.1:{server.server_address[1]}")) == "42\n"
        server.shutdown()
