"""What callers see of the sandbox: limits, tiers, the result of a cell, the report of the self test."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum


class SandboxUnavailable(RuntimeError):
    """Untrusted code cannot be run here as safely as asked; the message names the failing step and the remedy."""


class SandboxTier(IntEnum):
    """How much isolation the self test found, weakest first.

    NONE: a cell can start processes, so only the time limits hold.  RLIMITS: resource limits hold, nothing is hidden.
    LANDLOCK: system call filter and file rules, no namespaces.  NAMESPACES: both, and a root directory, process ids
    and a network of its own.

    >>> SandboxTier.parse("landlock") < SandboxTier.NAMESPACES
    True
    """

    NONE = 0
    RLIMITS = 1
    LANDLOCK = 2
    NAMESPACES = 3

    @classmethod
    def parse(cls, name: str) -> SandboxTier:
        """The tier called `name` in lower case; ValueError when there is none."""
        try:
            return cls[name.upper()]
        except KeyError:
            raise ValueError(f"min_tier must be one of {[t.name.lower() for t in cls]}, got {name!r}") from None


@dataclass(frozen=True)
class SandboxLimits:
    """Bounds of one session (memory, files) and of one cell (time, output).

    CPU time is the main limit; wall time is the larger, second one, so that a busy machine does not fail slow code.
    `memory_bytes` bounds the address space, `file_bytes` each file (with namespaces: all files together).

    >>> SandboxLimits(cpu_time_s=0.0)
    Traceback (most recent call last):
        ...
    ValueError: cpu_time_s must be positive, got 0.0
    """

    cpu_time_s: float = 2.0
    wall_time_s: float = 20.0
    memory_bytes: int = 512 * 2**20
    output_bytes: int = 4096
    file_bytes: int = 16 * 2**20

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.memory_bytes < 2**26:
            raise ValueError(f"memory_bytes must be at least {2**26}, got {self.memory_bytes}")
        # the self test reads what it printed, which needs some room too
        if not 2**9 <= self.output_bytes <= 2**14:
            raise ValueError(f"output_bytes must be from {2**9} to {2**14}, got {self.output_bytes}")


class CellStatus(Enum):
    """How a cell ended.

    OK: it ran to its end.  ERROR: it raised.  TIMEOUT: CPU or wall time ran out.  CRASH: its process ended (exit,
    signal, out of memory) or broke the protocol.  INFRA_ERROR: the sandbox itself failed; never the code's fault.
    """

    OK = "ok"
    ERROR = "error"
    TIMEOUT = "timeout"
    CRASH = "crash"
    INFRA_ERROR = "infra_error"


@dataclass(frozen=True)
class CellResult:
    """What one cell did.

    `stdout` holds stdout and stderr as written, cut to its head.  `error` is the exception as "Type: message" (or why
    the process ended), without paths, addresses or times; `error_line` is the line of the cell that raised it.
    `state_lost` tells that the session's variables are gone: the next cell starts from the setup code.

    >>> CellResult(CellStatus.ERROR, error="NameError: name 'x' is not defined", error_line=1).state_lost
    False
    """

    status: CellStatus
    stdout: str = ""
    error: str = ""
    error_line: int | None = None
    cpu_time_s: float = 0.0
    wall_time_s: float = 0.0
    output_truncated: bool = False
    state_lost: bool = False


@dataclass(frozen=True)
class SandboxReport:
    """What the self test found.

    `layers` are on; `missing` maps a layer that is off to its reason; `checks` maps an attempt of the canary session
    to whether it was refused; `not_covered` lists what this tier does not protect from.
    """

    tier: SandboxTier
    layers: tuple[str, ...]
    missing: dict[str, str]
    checks: dict[str, bool]
    not_covered: tuple[str, ...]
