"""The hostile cells of the abuse suite, a module for each kind, each cell with the endings that are safe."""

from __future__ import annotations

from gtpo.sandbox.abuse.attempts import (
    files,
    interpreter,
    kernel,
    memory,
    network,
    output,
    processes,
    protocol,
    secrets,
    signals,
    snapshots,
    time,
)
from gtpo.sandbox.abuse.attempts.attempt import Attempt

_KINDS = (processes, signals, snapshots, memory, time, output, files, secrets, network, kernel, protocol, interpreter)

ATTEMPTS: tuple[Attempt, ...] = tuple(attempt for kind in _KINDS for attempt in kind.ATTEMPTS)
"""Every attempt, by kind."""

__all__ = ["ATTEMPTS", "Attempt"]
