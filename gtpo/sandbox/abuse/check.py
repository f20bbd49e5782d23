"""`gtpo sandbox check`: what the sandbox of this machine reaches, and the abuse suite against it."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import importlib
from collections.abc import Callable, Iterable

from gtpo.sandbox import abuse
from gtpo.sandbox.abuse.attempts import ATTEMPTS
from gtpo.sandbox.contract import SandboxReport
from gtpo.sandbox.pool import SandboxPool
from gtpo.sandbox.protocol import Sandbox

Adapter = Callable[[], contextlib.AbstractAsyncContextManager[Sandbox]]


def kinds() -> list[str]:
    """The kinds of attempts, in the order of the suite."""
    return list(dict.fromkeys(attempt.kind for attempt in ATTEMPTS))


def run_check(
    *,
    min_tier: str = "namespaces",
    profile: str = "plain",
    only: Iterable[str] = (),
    adapter: str = "",
    say: Callable[[str], None] = print,
) -> bool:
    """Run the attempts of the kinds `only` (default: all) and report by `say`; whether all were contained.

    `adapter` is "module:name" of a callable without arguments that gives an async context manager of something with
    `open()`; by default the sandbox of this package runs, at `min_tier` or above.
    """
    wanted = set(only)
    attempts = [attempt for attempt in ATTEMPTS if not wanted or attempt.kind in wanted]
    unknown = wanted - set(kinds())
    if unknown:
        raise ValueError(f"kind must be one of {kinds()}, got {sorted(unknown)}")
    make = _load(adapter) if adapter else None

    async def run() -> list[abuse.Verdict]:
        async with contextlib.AsyncExitStack() as stack:
            host = stack.enter_context(abuse.prepared_host())
            if make is not None:
                sandbox = await stack.enter_async_context(make())
                return await abuse.run_all(sandbox.open, attempts, host=host)
            pool, waiting = [
                await stack.enter_async_context(SandboxPool(limits, min_tier=min_tier, profile=profile))
                for limits in (abuse.LIMITS, abuse.WAITING_LIMITS)
            ]
            for line in describe(pool.report):
                say(line)
            return await abuse.run_all(pool.open, attempts, host=host, open_waiting=waiting.open)

    verdicts = asyncio.run(run())
    contained = collections.Counter(verdict.attempt.kind for verdict in verdicts if not verdict.faults)
    for kind, count in collections.Counter(attempt.kind for attempt in attempts).items():
        say(f"  {kind:<12} {contained[kind]:3d} of {count:3d} contained")
    failed = [verdict for verdict in verdicts if verdict.faults]
    for verdict in failed:
        say(f"FAILED {verdict.attempt.kind} {verdict.attempt.name}: {'; '.join(verdict.faults)}")
    say(f"{len(verdicts) - len(failed)} of {len(verdicts)} attempts contained")
    return not failed


def describe(report: SandboxReport) -> list[str]:
    """The self test's findings, a line each."""
    lines = [f"tier: {report.tier.name.lower()}", f"layers: {', '.join(report.layers)}"]
    lines += [f"without {layer}: {reason}" for layer, reason in report.missing.items()]
    lines += [f"not refused: {name}" for name, refused in report.checks.items() if not refused]
    return [*lines, f"not covered: {'; '.join(report.not_covered)}"]


def _load(adapter: str) -> Adapter:
    module, _, name = adapter.partition(":")
    if not module or not name:
        raise ValueError(f'adapter must be "module:name", got {adapter!r}')
    loaded: Adapter = getattr(importlib.import_module(module), name)
    return loaded
