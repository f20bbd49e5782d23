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

    CPU time is the main limit; wall time is the larger, second one, so that a busy machine does not fail slow code. Of
    it, the time in which the interpreter waited for a CPU does not count, as far as `max_wall_time_s` allows; nor that
    in which it waited for tools, which is `tool_time_s` together.
    `memory_bytes` bounds the address space of a process beyond the libraries', and the memory of a session's processes
    together; `file_bytes` each file (with namespaces: all files together).  `max_processes` is how many processes and
    threads a cell may have besides its own; below the tier "namespaces" it can start none.

    >>> SandboxLimits(cpu_time_s=0.0)
    Traceback (most recent call last):
        ...
    ValueError: cpu_time_s must be positive, got 0.0
    """

    cpu_time_s: float = 2.0
    wall_time_s: float = 20.0
    tool_time_s: float = 600.0
    memory_bytes: int = 512 * 2**20
    output_bytes: int = 4096
    file_bytes: int = 16 * 2**20
    max_processes: int = 32

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.memory_bytes < 2**26:
            raise ValueError(f"memory_bytes must be at least {2**26}, got {self.memory_bytes}")
        # the self test reads what it printed, which needs some room too
        if not 2**9 <= self.output_bytes <= 2**14:
            raise ValueError(f"output_bytes must be from {2**9} to {2**14}, got {self.output_bytes}")

    @property
    def max_wall_time_s(self) -> float:
        """The wall time of a cell, without that of tools, on a machine however busy."""
        return 10 * self.wall_time_s


class CellStatus(Enum):
    """How a cell ended.

    OK: it ran to its end, or exited with status 0.  ERROR: it raised, a MemoryError, too, which the code may catch, or
    exited with another status.  TIMEOUT: CPU or wall time ran out.  CRASH: its process ended (os._exit, signal) or
    broke the protocol.  OUT_OF_MEMORY: the session's processes had more than `memory_bytes` together.  INFRA_ERROR: the
    sandbox itself failed, or the pool or the machine ran out of memory, and again when the cell was tried anew; never
    the code's fault.
    """

    OK = "ok"
    ERROR = "error"
    TIMEOUT = "timeout"
    CRASH = "crash"
    OUT_OF_MEMORY = "out_of_memory"
    INFRA_ERROR = "infra_error"


class SessionState(Enum):
    """What became of the session's variables.

    KEPT: they are as the cell left them.  ROLLED_BACK: as before the cell.  LOST: only those of the setup code are
    left.
    """

    KEPT = "kept"
    ROLLED_BACK = "rolled_back"
    LOST = "lost"


@dataclass(frozen=True)
class CellResult:
    """What one cell did.

    `stdout` holds stdout and stderr as written: all of it, or its head and its tail with the number of bytes left out
    between them; `num_output_bytes` counts all, and `output_digest` is that of `output.LineDigest` of all where it was
    asked for.  `error` is the exception as "Type: message" (or why the process
    ended), without paths, addresses or times; `error_line` is the line of the cell that raised it.
    `exit_status` is that of a process that ended, negative for a signal.  Times, exit status and `peak_memory_bytes`
    (of the session's interpreter so far) are the kernel's.  `num_tries` is above 1 where the sandbox failed under the
    cell, the session was built up anew and the cell run again.  `rebuilt`: the variables that it found (or, where it
    was rolled back, left) were made by running the session's earlier cells again.  These gave the same status, output
    and error; what they did not show can differ: clocks, random bytes of the system, files that failed cells wrote.
    `rebuild_cpu_time_s` is what that took, also where it was in vain; it is no part of `cpu_time_s`.

    >>> CellResult(CellStatus.ERROR, error="NameError: name 'x' is not defined", error_line=1).state_lost
    False
    """

    status: CellStatus
    stdout: str = ""
    error: str = ""
    error_line: int | None = None
    exit_status: int | None = None
    cpu_time_s: float = 0.0
    wall_time_s: float = 0.0
    peak_memory_bytes: int = 0
    num_output_bytes: int = 0
    output_digest: str = ""
    output_truncated: bool = False
    state: SessionState = SessionState.KEPT
    num_tries: int = 1
    rebuilt: bool = False
    rebuild_cpu_time_s: float = 0.0

    @property
    def state_lost(self) -> bool:
        """Whether the next cell starts from the setup code."""
        return self.state is SessionState.LOST


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
