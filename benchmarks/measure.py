"""How the benchmark commands measure: first every contestant is checked, then all are timed in interleaved rounds.

`compare` measures, `Row` is one line of a table and of its JSON file, `publish` prints the one and writes the other.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Generic, TypeVar, cast

import torch
from torch import Tensor

from gtpo_kernels import BackendUnavailable

RESULTS = Path(__file__).parent / "results"
# Calls whose peaks of memory are measured.
PEAKS = 3
MIB = 2**20
Outputs = dict[str, Tensor]
Batch = TypeVar("Batch")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Contestant(Generic[Batch]):
    """One way to compute a thing, made ready by `prepare`, which raises ImportError or BackendUnavailable if it cannot.

    prepare: batch -> a function to be timed, which returns what is checked by name, or {} for a floor, which computes
        less on purpose.
    backend: what does the work: one of our backends, or the package.
    reset: batch -> puts back what a call overwrites; runs before every call, outside the times.
    compiles: the first call compiles, so that memory is taken from the second.
    max_rounds: fewer than the others get, for the slow.
    """

    name: str
    backend: str
    prepare: Callable[[Batch], Callable[[], Outputs]]
    reset: Callable[[Batch], object] | None = None
    compiles: bool = False
    max_rounds: int = 100


@dataclass
class Row:
    """One line: medians of a call.  Empty figures are None, and `note` says why.

    cpu_s: process time of all threads.  wall_s: by the clock, on a GPU by its own events.
    extra_mb: MiB (2**20 bytes) of peak memory above what was held before the call.
    ratio_to_floor: cpu_s (on a GPU wall_s) over that of the floor named in the table's caption.
    error: the largest of `errors`, which are relative to the exact result, in the Euclidean norm.
    gates: what was demanded, and whether it holds: "PASS" or "FAIL".
    """

    name: str
    backend: str
    shape: dict[str, int]
    dtype: str
    mask_fraction: float | None = None
    cpu_s: float | None = None
    wall_s: float | None = None
    extra_mb: float | None = None
    ratio_to_floor: float | None = None
    error: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    gates: dict[str, str] = field(default_factory=dict)
    note: str = ""
    device: str = ""
    threads: int = 0

    def gate(self, demand: str, holds: bool) -> None:
        self.gates[demand] = "PASS" if holds else "FAIL"


class Refused(RuntimeError):
    """A contestant computes something else than the exact result."""


def relative_errors(outputs: Outputs, exact: Outputs) -> dict[str, float]:
    """|output - exact| / |exact| of every output, in the Euclidean norm; NaN counts as infinite.

    >>> relative_errors({"loss": torch.tensor(3.0)}, {"loss": torch.tensor(2.0, dtype=torch.float64)})
    {'loss': 0.5}
    """
    errors = {}
    for name, value in outputs.items():
        if value.shape != exact[name].shape:
            raise Refused(f"{name} is {tuple(value.shape)}, not {tuple(exact[name].shape)}")
        error = float(_distance(value, exact[name]) / exact[name].norm())
        errors[name] = error if error == error else float("inf")
    return errors


def _distance(one: Tensor, other: Tensor) -> Tensor:
    """|one - other| without a second whole tensor in float64."""
    pieces = zip(one.reshape(-1).split(2**22), other.reshape(-1).split(2**22), strict=True)
    return torch.stack([(a.to(b.dtype) - b).norm() for a, b in pieces]).norm()


def compare(
    contestants: Iterable[Contestant[Batch]],
    batch: Batch,
    exact: Outputs,
    row: Callable[[str, str], Row],
    *,
    allowed: float,
    rounds: int,
    device: torch.device,
    warm_up_batch: Batch | None = None,
    started: Callable[[str], object] = lambda name: None,
    deadline: float = float("inf"),
) -> list[Row]:
    """Check and measure the contestants.  One row each, in their order, also for those that are absent or refused.

    exact: the outputs in float64.  allowed: the largest relative error that is not refused.
    row: (name, backend) -> a row with shape, dtype and so on filled in.
    warm_up_batch: small, for first calls whose memory is that of loading code.
    started: told the name of each contestant before it runs for the first time.
    deadline: by `time.monotonic`; no contestant is begun and no further round made after it.
    """
    rows: list[Row] = []
    calls: list[tuple[Contestant[Batch], Callable[[], Outputs], Row]] = []
    with freed_memory_returned(), collector_freezing() as freeze:
        for contestant in contestants:
            line = row(contestant.name, contestant.backend)
            line.device, line.threads = device_name(device), torch.get_num_threads()
            rows.append(line)
            if time.monotonic() > deadline:
                line.note = "not run: out of time"
                continue
            started(contestant.name)
            freeze()
            call = _checked_call(contestant, batch, exact, line, allowed, device, warm_up_batch)
            if call is not None:
                calls.append((contestant, call, line))
    times: dict[str, list[tuple[float, float]]] = {line.name: [] for _, _, line in calls}
    for number in range(rounds):
        if number and time.monotonic() > deadline:
            break
        # every second round backwards, so that nobody always follows the same neighbour
        for contestant, call, line in calls[:: 1 if number % 2 == 0 else -1]:
            if number < contestant.max_rounds:
                _reset(contestant, batch)
                times[line.name].append(time_call(call, device))
    for _, _, line in calls:
        line.cpu_s, line.wall_s = (median(column) for column in zip(*times[line.name], strict=True))
    return rows


def _checked_call(
    contestant: Contestant[Batch],
    batch: Batch,
    exact: Outputs,
    line: Row,
    allowed: float,
    device: torch.device,
    warm_up_batch: Batch | None,
) -> Callable[[], Outputs] | None:
    """The contestant made ready, its errors and memory in `line`; or None, with the reason there."""
    try:
        if warm_up_batch is not None and not contestant.compiles:
            _reset(contestant, warm_up_batch)
            contestant.prepare(warm_up_batch)()
        call = contestant.prepare(batch)
        if contestant.compiles:
            _reset(contestant, batch)
            call()
        outputs, line.extra_mb = with_peak_memory(call, device, partial(_reset, contestant, batch))
        line.errors = relative_errors(outputs, exact)
        line.error = max(line.errors.values(), default=None)
        if line.error is not None and line.error > allowed:
            raise Refused(f"error {line.error:.1e}, allowed {allowed:.0e}")
        return call
    except (ImportError, BackendUnavailable) as reason:
        line.note = f"absent: {reason}"
    except torch.OutOfMemoryError:
        line.note = "out of memory"
    except Refused as reason:
        line.note = f"refused, computes something else: {reason}"
    except Exception as reason:  # a peer may raise anything, and the others are still to be measured
        line.note = f"failed: {type(reason).__name__}: {' '.join(str(reason).split())[:160]}"
    return None


def _reset(contestant: Contestant[Batch], batch: Batch) -> None:
    if contestant.reset is not None:
        contestant.reset(batch)


def time_call(call: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """(CPU seconds of all threads, seconds by the clock, on a GPU between its events) of one call."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        cpu = time.process_time()
        start.record()
        outputs = call()
        end.record()
        torch.cuda.synchronize()
        del outputs
        return time.process_time() - cpu, start.elapsed_time(end) / 1e3
    cpu, wall = time.process_time(), time.perf_counter()
    outputs = call()
    spent = time.process_time() - cpu, time.perf_counter() - wall
    del outputs
    return spent


def with_peak_memory(
    call: Callable[[], Result], device: torch.device, reset: Callable[[], object] = lambda: None
) -> tuple[Result, float]:
    """(what the last call returns, MiB of the peak above what was held before the first).  reset: runs before each.

    The median of PEAKS calls, since a peak of resident memory moves by a few pages; what a call keeps counts in all.
    """
    result = None
    peaks = []
    for _ in range(PEAKS):
        # what the call before returned is not this one's
        result = None
        reset()
        release_memory(device)
        if not peaks:
            held = _held_memory(device)
        _reset_peak(device)
        result = call()
        peaks.append((_peak_memory(device) - held) / MIB)
    return cast(Result, result), median(peaks)


def _held_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.memory_allocated()
    _reset_peak(device)
    return _peak_memory(device)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak, VmHWM, back to the present size


def _peak_memory(device: torch.device) -> float:
    """Bytes; NaN where the system does not say."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    try:
        return _status_kib("VmHWM") * 1024
    except OSError:
        return float("nan")


def _status_kib(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1])
    raise KeyError(key)


@contextmanager
def freed_memory_returned() -> Iterator[None]:
    """Within, the C library gives freed blocks of 128 KiB and more back at once, so that a peak is of what is held.

    Outside it keeps what programs that free large blocks come to: glibc raises its thresholds by itself to these.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda parameter, value: None)
    trim_threshold, mmap_threshold = -1, -3
    try:
        mallopt(mmap_threshold, 128 * 1024)
        mallopt(trim_threshold, 128 * 1024)
        yield
    finally:
        mallopt(mmap_threshold, 32 * MIB)
        mallopt(trim_threshold, 64 * MIB)


@contextmanager
def collector_freezing() -> Iterator[Callable[[], None]]:
    """Yields a function that collects, and has later collections pass over what is then there, until the context ends.

    With the peers imported, a collection of everything takes 0.25 s.
    """

    def freeze() -> None:
        gc.collect()
        gc.freeze()

    try:
        yield freeze
    finally:
        gc.unfreeze()


def release_memory(device: torch.device) -> None:
    """Give back what nothing holds, or a call that reuses it would seem to need less."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def smoke_run(smoke: bool) -> Iterator[None]:
    """In a smoke run what is compiled otherwise runs as it is written, on one thread."""
    if not smoke:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.set_num_threads(threads)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    except OSError:
        models = []
    return models[0].split(":")[1].strip() if models else platform.machine()


def set_ratios(rows: Iterable[Row], floor: float | None, label: str | None = None, by: str = "cpu_s") -> None:
    """Divide the time of each row by `floor`: `ratio_to_floor`, or an entry of `ratios` where a label is given."""
    for row in rows:
        seconds = getattr(row, by)
        if seconds is None or floor is None:
            continue
        if label is None:
            row.ratio_to_floor = seconds / floor
        else:
            row.ratios[label] = seconds / floor


def find(rows: Iterable[Row], name: str) -> Row:
    return next(row for row in rows if row.name == name)


def parse_arguments(description: str | None, arguments: Sequence[str] | None) -> argparse.Namespace:
    """--smoke (or GTPO_BENCH_SMOKE=1): tiny sizes.  --results: the folder of the JSON."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    smoke = os.environ.get("GTPO_BENCH_SMOKE") == "1"
    parser.add_argument("--smoke", action="store_true", default=smoke, help="tiny sizes, in seconds: no true figures")
    parser.add_argument("--results", type=Path, help="folder for the JSON; a smoke run writes only where this is given")
    parsed = parser.parse_args(arguments)
    if parsed.results is None and not parsed.smoke:
        parsed.results = RESULTS
    return parsed


def publish(command: str, caption: str, rows: Sequence[Row], results: Path | None) -> None:
    """Print the rows as a table, and what became of the gates; write them to `results`/`command`.json."""
    print(f"{caption}\n\n{markdown(rows)}\n")
    verdicts = [(row, demand, verdict) for row in rows for demand, verdict in row.gates.items()]
    failed = [f"  FAIL {row.name} {_place(row)}: {demand}" for row, demand, verdict in verdicts if verdict == "FAIL"]
    count = f"{len(verdicts) - len(failed)} gates PASS, {len(failed)} FAIL" if verdicts else "no gate was judged"
    print("\n".join([f"{command}: {count}", *failed]))
    if results is not None:
        results.mkdir(parents=True, exist_ok=True)
        path = results / f"{command}.json"
        path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
        print(f"wrote {path}")


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table that also reads well as it is.

    >>> print(markdown([Row("eager", "torch", {"N": 4}, "float32", cpu_s=0.5, note="refused")]))
    | name  | shape       | CPU ms | wall ms | extra MiB | x floor | errors | gates |
    |-------|-------------|--------|---------|-----------|---------|--------|---|
    | eager | N=4 float32 | 500.00 |         |           |         |        | refused |
    """
    labels = list(dict.fromkeys(label for row in rows for label in row.ratios))
    lines = [["name", "shape", "CPU ms", "wall ms", "extra MiB", "x floor", *labels, "errors", "gates"]]
    for row in rows:
        verdicts = "; ".join(f"{demand} {verdict}" for demand, verdict in row.gates.items())
        lines.append(
            [
                row.name,
                _place(row),
                _number(row.cpu_s, 1e3),
                _number(row.wall_s, 1e3),
                _number(row.extra_mb),
                _number(row.ratio_to_floor),
                *(_number(row.ratios.get(label)) for label in labels),
                " ".join(f"{value:.0e}" for value in row.errors.values()),
                "; ".join(filter(None, [row.note, verdicts])),
            ]
        )
    # the last column is left ragged: a long note there would widen every line
    widths = [*(max(map(len, column)) for column in list(zip(*lines, strict=True))[:-1]), 0]
    padded = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
    return "\n".join([padded[0], "|" + "|".join("-" * max(width + 2, 3) for width in widths) + "|", *padded[1:]])


def _place(row: Row) -> str:
    mask = "" if row.mask_fraction is None else f" mask {row.mask_fraction:g}"
    return " ".join(f"{axis}={size}" for axis, size in row.shape.items()) + f" {row.dtype}{mask}"


def _number(value: float | None, scale: float = 1.0) -> str:
    return "" if value is None else f"{value * scale:,.2f}" if value * scale < 1000 else f"{value * scale:,.0f}"
