"""Calls of an HTTP API, made by the trainer: only endpoints that the configuration declares, on one server."""

import asyncio
import contextlib
import http.cookiejar
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import quote, urlsplit

from gtpo.tools.base import NO_OUTPUT
from gtpo.tools.json_schema import SchemaCheck, call_schema
from gtpo.tools.source import ToolSource, optional_package
from gtpo.types import ToolResult, ToolStatus

# The server, not the call, is at fault: the request may be made again.
_UNAVAILABLE = frozenset({429, 502, 503, 504})
_TEXT_TYPES = ("text/", "application/json", "application/xml", "application/problem+json")
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
# Servers refuse longer addresses, some by closing the connection: that would be a fault of theirs, and not of the call.
_MAX_URL_CHARS = 8000
# Requests of all trajectories at once, where the table does not say: each takes a descriptor here and on the server.
_MAX_CONCURRENT = 100


@dataclass(frozen=True)
class Endpoint:
    """One request that the model may make.

    path: behind the base URL; "{name}" is filled with an argument, as one segment. parameters: for each argument its
    JSON schema, and `required = false` where it may be left out. Arguments that are not in the path go into the query
    of GET and DELETE, and as a JSON object into the body of POST, PUT and PATCH.
    """

    path: str
    description: str
    method: Literal["GET", "POST", "PUT", "PATCH", "DELETE"] = "GET"
    parameters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def schema(self) -> dict[str, Any]:
        """The parameters as a JSON schema."""
        properties = {
            name: {key: value for key, value in entry.items() if key != "required"}
            for name, entry in self.parameters.items()
        }
        required = [name for name, entry in self.parameters.items() if entry.get("required", True)]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


class HttpTool:
    """One endpoint as a tool; all endpoints of a source share `server`.

    Raises ValueError where path and parameters do not fit, and where a parameter's schema is none.
    """

    def __init__(self, name: str, endpoint: Endpoint, server: "_Server") -> None:
        self.name = name
        self.schema = call_schema(name, endpoint.description, endpoint.schema())
        self._check = SchemaCheck(name, endpoint.schema())
        self._endpoint = endpoint
        self._server = server
        self._in_path = in_path = set(_PLACEHOLDER.findall(endpoint.path))
        if not endpoint.path.startswith("/") or any(mark in endpoint.path for mark in "?#\\"):
            raise ValueError(f'path must begin with "/" and have no query, got {endpoint.path!r}')
        for unknown in sorted(in_path - set(endpoint.parameters)):
            raise ValueError(f"path {endpoint.path!r} has {{{unknown}}}, which parameters must declare")
        for name in in_path:
            if not endpoint.parameters[name].get("required", True):
                raise ValueError(f"parameters.{name} stands in the path, so it must be required")

    async def call(self, arguments: Mapping[str, Any]) -> ToolResult:
        started = time.perf_counter()
        try:
            parsed = self._check.parse(arguments)
            path = _PLACEHOLDER.sub(lambda found: _segment(found[1], parsed[found[1]]), self._endpoint.path)
        except ValueError as fault:
            return ToolResult(ToolStatus.ERROR, str(fault))
        rest = {key: value for key, value in parsed.items() if key not in self._in_path}
        status, text = await self._server.request(self._endpoint.method, path, rest)
        return ToolResult(status, text, seconds=time.perf_counter() - started)


def _segment(name: str, value: Any) -> str:
    """A value as one segment of a path.

    >>> _segment("city", "a/b?c")
    'a%2Fb%3Fc'
    """
    text = value if isinstance(value, str) else json.dumps(value)
    if text in ("", ".", ".."):
        raise ValueError(f"argument '{name}' must be neither empty nor dots, got {text!r}")
    return quote(text, safe="")


def _decoded(data: bytes, encoding: str) -> str:
    """`data` as text, in UTF-8 where the `encoding` that the server names is none of text.

    >>> _decoded(b"abc", "rot13"), _decoded(b"\\xe4", "latin-1")
    ('abc', 'ä')
    """
    try:
        return data.decode(encoding, "replace")
    except (LookupError, UnicodeError):
        return data.decode("utf-8", "replace")


class _Server:
    """The connection to the one server of a source, with its bounds."""

    def __init__(self, base_url: str, headers: Mapping[str, str], *, max_bytes: int, timeout_s: float) -> None:
        self._httpx = optional_package("httpx2", tool="http_api")
        self._base_url = base_url.rstrip("/")
        self._headers = headers
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._client: Any = None

    async def request(self, method: str, path: str, values: Mapping[str, Any]) -> tuple[ToolStatus, str]:
        if self._client is None:
            # no proxy of the environment, no credentials of ~/.netrc, no cookie of another trajectory; no redirect is
            # followed, and no request waits for the connection of another
            self._client = self._httpx.AsyncClient(
                headers=self._headers,
                cookies=http.cookiejar.CookieJar(http.cookiejar.DefaultCookiePolicy(allowed_domains=())),
                limits=self._httpx.Limits(max_connections=None),
                trust_env=False,
                timeout=self._timeout_s,
            )
        # httpx writes an object as Python does
        params = {key: json.dumps(value) if isinstance(value, dict) else value for key, value in values.items()}
        body = {"params": params} if method in ("GET", "DELETE") else {"json": values}
        try:
            request = self._client.build_request(method, self._base_url + path, **body)
        except self._httpx.InvalidURL as error:
            return ToolStatus.ERROR, f"the arguments make no valid address: {error}"
        if (num_chars := len(str(request.url))) > _MAX_URL_CHARS:
            text = f"the arguments make an address of {num_chars} characters, it may have {_MAX_URL_CHARS}"
            return ToolStatus.ERROR, text
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await self._client.send(request, stream=True)
                async with contextlib.aclosing(response):
                    data = b""
                    async for piece in response.aiter_bytes():
                        data += piece
                        if len(data) > self._max_bytes:
                            break
        except (TimeoutError, self._httpx.TimeoutException):
            return ToolStatus.TIMEOUT, f"the API did not answer within {self._timeout_s:g} seconds"
        except self._httpx.HTTPError as error:
            return ToolStatus.INFRA_ERROR, f"the API cannot be reached: {type(error).__name__}: {error}"
        return self._read(response, data)

    def _read(self, response: Any, data: bytes) -> tuple[ToolStatus, str]:
        code = response.status_code
        if code in _UNAVAILABLE:
            return ToolStatus.INFRA_ERROR, f"the API is not available: HTTP {code}"
        if 300 <= code < 400:
            return ToolStatus.ERROR, f"HTTP {code}: the API answered with a redirect, which is not followed"
        kind = response.headers.get("content-type", "text/plain").lower()
        if data and not kind.startswith(_TEXT_TYPES):
            text = f"[{kind.partition(';')[0]}, which is not text]"
        else:
            text = _decoded(data[: self._max_bytes], response.encoding or "utf-8").strip()
            if len(data) > self._max_bytes:
                text += f"\n[cut after {self._max_bytes} bytes]"
        if 200 <= code < 300:
            return ToolStatus.OK, text or NO_OUTPUT
        return ToolStatus.ERROR, f"HTTP {code}: {text}" if text else f"HTTP {code}"

    async def close(self) -> None:
        if self._client is not None:
            client, self._client = self._client, None
            await client.aclose()


def http_api_source(
    name: str,
    *,
    base_url: str,
    endpoints: dict[str, Endpoint],
    headers: dict[str, str] | None = None,
    headers_from_env: dict[str, str] | None = None,
    max_bytes: int = 4096,
    timeout_s: float = 10.0,
) -> ToolSource:
    """Tools of kind "http_api": one for each endpoint, called "NAME_ENDPOINT".

    base_url: scheme, host and perhaps a path; nothing else is ever requested. headers are sent with each request,
    headers_from_env ({header: variable}) with the value of an environment variable, so that no secret stands in the
    configuration. max_bytes: of an answer, the rest is cut off. timeout_s: of a request from its start to its end.
    """
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or parts.username:
        raise ValueError(f"base_url must be http(s)://HOST[:PORT][/PATH], got {base_url!r}")
    if not endpoints:
        raise ValueError("endpoints must declare at least one endpoint, got none")
    if max_bytes < 1:
        raise ValueError(f"max_bytes must be at least 1, got {max_bytes}")
    if not timeout_s > 0:
        raise ValueError(f"timeout_s must be above 0, got {timeout_s}")
    sent = dict(headers or {})
    for header, variable in (headers_from_env or {}).items():
        if variable not in os.environ:
            raise ValueError(f"headers_from_env.{header}: the environment variable {variable} is not set")
        sent[header] = os.environ[variable]
    server = _Server(base_url, sent, max_bytes=max_bytes, timeout_s=timeout_s)
    tools = []
    for key, endpoint in endpoints.items():
        try:
            tools.append(HttpTool(f"{name}_{key}", endpoint, server))
        except ValueError as error:
            raise ValueError(f"endpoints.{key}: {error}") from None
    schemas = [tool.schema for tool in tools]
    return ToolSource(schemas, lambda _: tools, max_concurrent=_MAX_CONCURRENT, close=server.close)
