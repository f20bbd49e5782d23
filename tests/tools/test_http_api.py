"""The http_api tool against a server on the loopback: what is requested, what is refused, what the model reads."""

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any, ClassVar
from urllib.parse import parse_qs

import pytest

from gtpo.tools import ToolSet, http_api
from gtpo.types import ToolCall, ToolResult, ToolStatus


class Api(BaseHTTPRequestHandler):
    """Echoes requests; some paths misbehave. `requests` holds (method, path, body, headers)."""

    requests: ClassVar[list[tuple[str, str, str, dict[str, str]]]] = []
    faults_left = 0
    released, held = threading.Event(), threading.Event()

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        self.requests.append((self.command, self.path, body, dict(self.headers)))
        place = self.path.partition("?")[0]
        if place == "/api/slow":
            self.released.wait(20)
        elif place == "/api/held":
            self.held.wait(60)
            self.answer(200, b"let go")
        elif place == "/api/endless":
            self.answer(200, b"x" * 10_000)
        elif place == "/api/away":
            self.answer(302, b"", location="http://127.0.0.1:1/secret")
        elif place.startswith("/api/charset/"):
            self.answer(200, b"text", kind=f"text/plain; charset={place.rpartition('/')[2]}")
        elif place == "/api/image":
            self.answer(200, b"\x89PNG", kind="image/png")
        elif place == "/api/empty":
            self.answer(204, b"")
        elif place == "/api/flaky" and type(self).faults_left:
            type(self).faults_left -= 1
            self.answer(503, b"busy")
        elif place == "/api/code/404":
            self.answer(404, b'{"detail": "no such city"}', kind="application/json")
        elif place == "/api/code/500":
            self.answer(500, b"it broke")
        else:
            self.answer(200, json.dumps({"path": self.path, "body": body}).encode(), kind="application/json")

    do_POST = do_PUT = do_DELETE = do_PATCH = do_GET

    def answer(self, code: int, body: bytes, *, kind: str = "text/plain", location: str = "") -> None:
        self.send_response(code)
        self.send_header("Set-Cookie", "session=of the one who called; Path=/")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if location:
            self.send_header("Location", location)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Api) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/api"
        Api.released.set()
        server.shutdown()


CITY = {"type": "string", "description": "Name of the city."}
DAYS = {"type": "integer", "minimum": 1, "maximum": 7, "required": False}


def endpoint(path: str, *, method: str = "GET", **parameters: dict[str, Any]) -> dict[str, Any]:
    return {"path": path, "description": "It.", "method": method, "parameters": parameters}


def run_calls(url: str, endpoints: dict[str, Any], calls: list[ToolCall], **options: Any) -> list[ToolResult]:
    tools = ToolSet(["web"], {"web": {"kind": "http_api", "base_url": url, "endpoints": endpoints, **options}})

    async def run() -> list[ToolResult]:
        try:
            return await tools.toolbox(None).execute(calls)
        finally:
            await tools.close()

    Api.requests.clear()
    return asyncio.run(run())


def test_arguments_go_into_path_query_and_body(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEB_TOKEN", "secret")
    endpoints = {
        "forecast": endpoint("/forecast/{city}", city=CITY, days=DAYS),
        "book": endpoint("/book/{city}/in/{city}", method="POST", city=CITY, days=DAYS),
    }
    hostile = "../x?y=1#z/%2e"
    results = run_calls(
        url,
        endpoints,
        [
            ToolCall("web_forecast", {"city": "Bad Aibling", "days": 3}),
            ToolCall("web_forecast", {"city": hostile}),
            ToolCall("web_book", {"city": "Ulm", "days": 2}),
        ],
        headers={"X-Client": "gtpo"},
        headers_from_env={"Authorization": "WEB_TOKEN"},
    )
    assert [result.status for result in results] == [ToolStatus.OK] * 3
    assert json.loads(results[0].text) == {"path": "/api/forecast/Bad%20Aibling?days=3", "body": ""}
    assert [request[1] for request in Api.requests[1:]] == [
        "/api/forecast/..%2Fx%3Fy%3D1%23z%2F%252e",
        "/api/book/Ulm/in/Ulm",
    ]
    assert json.loads(Api.requests[2][2]) == {"days": 2}
    for *_, headers in Api.requests:
        assert (headers["X-Client"], headers["Authorization"]) == ("gtpo", "secret")
    assert all("secret" not in result.text for result in results)


def test_an_object_goes_into_a_query_as_json(url: str) -> None:
    near = {"type": "object"}
    run_calls(url, {"get": endpoint("/get", near=near)}, [ToolCall("web_get", {"near": {"city": "Ulm", "open": True}})])
    assert parse_qs(Api.requests[0][1].partition("?")[2]) == {"near": ['{"city": "Ulm", "open": true}']}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "web_forecast: missing argument 'city'"),
        ({"city": 3}, "web_forecast: argument 'city': 3 is not of type 'string'"),
        ({"city": "Ulm", "days": 9}, "web_forecast: argument 'days': 9 is greater than the maximum of 7"),
        ({"city": "Ulm", "host": "evil"}, "web_forecast: unexpected argument 'host', known are city, days"),
        ({"city": ".."}, "argument 'city' must be neither empty nor dots, got '..'"),
        ({"city": "\ud800"}, "web_forecast: arguments must be a JSON object: 'utf-8' codec can't encode"),
        ({"city": "Ulm", "days": float("nan")}, "web_forecast: arguments must be a JSON object: Out of range float"),
        ({"city": ""}, "argument 'city' must be neither empty nor dots, got ''"),
    ],
)
def test_bad_arguments_send_nothing(url: str, arguments: dict[str, Any], message: str) -> None:
    endpoints = {"forecast": endpoint("/forecast/{city}", city=CITY, days=DAYS)}
    (result,) = run_calls(url, endpoints, [ToolCall("web_forecast", arguments)])
    assert result.status is ToolStatus.ERROR and result.text.startswith(message)
    assert not Api.requests


@pytest.mark.parametrize(
    ("path", "status", "text"),
    [
        ("/code/404", ToolStatus.ERROR, 'HTTP 404: {"detail": "no such city"}'),
        ("/code/500", ToolStatus.ERROR, "HTTP 500: it broke"),
        ("/away", ToolStatus.ERROR, "HTTP 302: the API answered with a redirect, which is not followed"),
        ("/image", ToolStatus.OK, "[image/png, which is not text]"),
        ("/charset/rot13", ToolStatus.OK, "text"),
        ("/charset/undefined", ToolStatus.OK, "text"),
        ("/charset/idna", ToolStatus.OK, "text"),
        ("/empty", ToolStatus.OK, "(no output)"),
        ("/endless", ToolStatus.OK, "x" * 64 + "\n[cut after 64 bytes]"),
        ("/slow", ToolStatus.TIMEOUT, "the API did not answer within 0.05 seconds"),
    ],
)
def test_what_the_model_reads_of_an_answer(url: str, path: str, status: ToolStatus, text: str) -> None:
    timeout_s = 0.05 if status is ToolStatus.TIMEOUT else 60.0
    (result,) = run_calls(url, {"get": endpoint(path)}, [ToolCall("web_get", {})], max_bytes=64, timeout_s=timeout_s)
    assert (result.status, result.text) == (status, text)
    assert result.seconds > 0
    assert len(Api.requests) == 1 or status is ToolStatus.TIMEOUT  # which may come before the connection


@pytest.mark.parametrize(("retries", "status"), [(1, ToolStatus.INFRA_ERROR), (2, ToolStatus.OK)])
def test_a_server_that_is_not_available_is_asked_again(url: str, retries: int, status: ToolStatus) -> None:
    Api.faults_left = 2
    calls = [ToolCall("web_get", {})]
    (result,) = run_calls(url, {"get": endpoint("/flaky")}, calls, retries=retries, retry_wait_s=0.0)
    assert (result.status, result.num_retries, len(Api.requests)) == (status, retries, retries + 1)


@pytest.mark.parametrize(("path", "argument"), [("/at/{city}", "path"), ("/at", "query")])
@pytest.mark.parametrize("length", [10_000, 70_000])
def test_an_address_that_is_too_long_is_the_calls_fault_and_not_sent(
    url: str, path: str, argument: str, length: int
) -> None:
    (result,) = run_calls(url, {"at": endpoint(path, city=CITY)}, [ToolCall("web_at", {"city": "x" * length})])
    assert result.status is ToolStatus.ERROR and result.text.startswith("the arguments make "), argument
    assert not Api.requests


def test_no_cookie_goes_from_one_trajectory_to_another(url: str) -> None:
    results = run_calls(url, {"get": endpoint("/x")}, [ToolCall("web_get", {})] * 2)
    assert [result.status for result in results] == [ToolStatus.OK] * 2
    assert [headers.get("Cookie") for *_, headers in Api.requests] == [None, None]


def test_waiting_for_a_connection_is_not_the_apis_time(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[float | None] = []

    def timeout(delay: float | None) -> asyncio.Timeout:
        timed.append(delay)
        return asyncio.timeout(delay)

    monkeypatch.setattr(http_api, "_MAX_CONCURRENT", 2)
    monkeypatch.setattr(http_api, "asyncio", SimpleNamespace(timeout=timeout))
    table = {"kind": "http_api", "base_url": url, "endpoints": {"get": endpoint("/held")}, "timeout_s": 60.0}
    tools = ToolSet(["web"], {"web": table})

    async def run() -> list[list[ToolResult]]:
        calls = [asyncio.ensure_future(tools.toolbox(None).execute([ToolCall("web_get", {})])) for _ in range(5)]
        while len(Api.requests) < 2:
            await asyncio.sleep(0.01)
        # both connections are taken; the clocks of the other calls stand still
        assert timed == [60.0] * 2
        Api.held.set()
        results = await asyncio.gather(*calls)
        await tools.close()
        return results

    Api.requests.clear()
    Api.held.clear()
    assert [result.status for (result,) in asyncio.run(run())] == [ToolStatus.OK] * 5
    assert len(timed) == 5


def test_a_server_that_is_down_is_no_fault_of_the_call() -> None:
    (result,) = run_calls("http://127.0.0.1:9", {"get": endpoint("/x")}, [ToolCall("web_get", {})])
    assert result.status is ToolStatus.INFRA_ERROR and result.text.startswith("the API cannot be reached: ConnectError")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_url": "ftp://host"}, r"base_url must be http\(s\)://HOST"),
        ({"base_url": "http://user:word@host"}, r"base_url must be http\(s\)://HOST"),
        ({"endpoints": {}}, "endpoints must declare at least one endpoint"),
        ({"endpoints": {"e": {"path": "/x"}}}, r"option 'endpoints\.e\.description': field required"),
        ({"endpoints": {"e": endpoint("/x", method="GRAB")}}, r"option 'endpoints\.e\.method': input should be 'GET'"),
        ({"endpoints": {"e": endpoint("x")}}, r'endpoints\.e: path must begin with "/"'),
        (
            {"endpoints": {"e": endpoint("/x/{id}")}},
            r"endpoints\.e: path '/x/\{id\}' has \{id\}, which parameters must",
        ),
        ({"endpoints": {"e": endpoint("/{d}", d=DAYS)}}, r"endpoints\.e: parameters\.d stands in the path"),
        (
            {"endpoints": {"e": endpoint("/", d={"type": "int"})}},
            r"endpoints\.e: the parameters of t_e are no JSON schema",
        ),
        (
            {"headers_from_env": {"A": "GTPO_UNSET"}},
            r"headers_from_env\.A: the environment variable GTPO_UNSET is not set",
        ),
        ({"max_bytes": 0}, "max_bytes must be at least 1, got 0"),
        ({"timeout_s": 0}, "timeout_s must be above 0, got 0"),
    ],
)
def test_bad_options(changes: dict[str, Any], message: str) -> None:
    table = {"kind": "http_api", "base_url": "http://host", "endpoints": {"e": endpoint("/x")}} | changes
    with pytest.raises(ValueError, match=f"tools.t: .*{message}"):
        ToolSet(["t"], {"t": table})
