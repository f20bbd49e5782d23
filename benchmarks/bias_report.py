"""The findings of `benchmarks.bias` as the tables and plots of docs/credit.md."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.bias_findings import BY_SIZE, CREDITS, GROUP_SIZE, GROUPS_A_BATCH, TURN_PROCESSES, Finding, Results
from benchmarks.bias_processes import PROCESSES, Process
from gtpo.methods import describe_credit

DOCUMENT = Path(__file__).parents[1] / "docs" / "credit.md"
PRESETS_PLOT, SIZES_PLOT = DOCUMENT.with_name("credit_bias.png"), DOCUMENT.with_name("credit_bias_by_size.png")
BEGIN, END = "<!-- written by make bias -->", "<!-- end of what make bias writes -->"

PRESETS_LEGEND = """blue: no bias found, red: biased
bars: 95 % intervals

search to late:
degrees between the expected
update and the gradient
(right of 90: against it)

luck, loan, padding:
expected update over the
deviation of a batch's
(left of 0: fewer tokens)"""


def write(results: Results) -> None:
    """Tables and plots into docs."""
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    DOCUMENT.write_text(before + section(results) + rest.partition(END)[2])
    plot_presets(results.presets, PRESETS_PLOT)
    plot_sizes(results.credits_by_size, SIZES_PLOT)


def section(results: Results) -> str:
    """What stands between the marks of docs/credit.md: a function of the findings alone."""
    graded, flat = ([p for p in PROCESSES if p.has_gradient is has] for has in (True, False))
    graded_turns = [process for process in TURN_PROCESSES if process.has_gradient]
    return f"""{BEGIN}
{lines(f"- **{process.name}**: {process.meaning}." for process in PROCESSES)}

Groups of {GROUP_SIZE}, {GROUPS_A_BATCH} groups a batch, {results.presets[0].num_batches} batches a cell.
In brackets and after ±: 95 % intervals. **Bold**: biased, by a test at 0.001.

### Presets in their own loss
The cosine between expected update and gradient; 1 is unbiased but for its size. *late* has ratios other than 1.

{table(results.presets, graded, cosine_cell)}

The expected update where there is no gradient, in standard deviations of one batch's update, and whether it asks for
more tokens or fewer:

{table(results.presets, flat, drift_cell)}

The size of the expected update along the gradient (1: that of the gradient; it depends on the lengths over which a loss
takes its mean), and the variance of an update that is scaled to size 1, over that of an unbiased estimator: the sum of
rewards less the mean of the others', for all tokens, on *late* times the probability ratio of the whole trajectory.

{table(results.presets, graded, size_cell)}

No bias was found on any process but *late*: {", ".join(unbiased(results.presets))}.

![Angle between the expected update of each preset and the gradient, and drift where there is none]({PRESETS_PLOT.name})

### Credits by themselves
In the loss of `rloo`, which adds up the tokens of a trajectory and so leaves a credit as it is. Cosine, or drift:

{table(results.credits, TURN_PROCESSES, lambda f: drift_cell(f) if f.signal is None else cosine_cell(f))}

Size; variance:

{table(results.credits, graded_turns, size_cell)}

![The same angle and drift of credits over group size]({SIZES_PLOT.name})

{lines(f"- {name}: `{describe_credit(method.credit)}`" for name, method in CREDITS.items())}

`make bias` wrote this, from `benchmarks/results/bias.json`; the second plot has
{results.credits_by_size[0].num_batches} batches a point.
{END}"""


def lines(of: Iterable[str]) -> str:
    return "\n".join(of)


def table(findings: Sequence[Finding], processes: Sequence[Process], cell: Callable[[Finding], str]) -> str:
    """Methods in lines, processes in columns."""
    found = {(finding.method, finding.process): finding for finding in findings}
    head = [f"| | {' | '.join(process.name for process in processes)} |", "|---|" + "---|" * len(processes)]
    for name in methods_of(findings):
        head.append(f"| {name} | {' | '.join(cell(found[name, process.name]) for process in processes)} |")
    return "\n".join(head)


def methods_of(findings: Sequence[Finding]) -> list[str]:
    return list(dict.fromkeys(finding.method for finding in findings))


def cosine_cell(finding: Finding) -> str:
    if not finding.is_found:
        return "none of it"
    cosine, least, most = finding.cosine
    return emphasised(f"{cosine:.4f} ({least:.4f} to {most:.4f})", finding.is_biased)


def drift_cell(finding: Finding) -> str:
    direction = f", {'more' if finding.drift > 0 else 'fewer'}" if finding.is_biased else ""
    return emphasised(f"{finding.bias:.3f} ± {finding.bias_error:.3f}{direction}", finding.is_biased)


def size_cell(finding: Finding) -> str:
    text = f"{finding.size:.3f} ± {finding.size_error:.3f}"
    along = finding.is_found and finding.signal is not None and finding.signal > 0
    return f"{text}; {finding.variance:.2f} ± {finding.variance_error:.2f}" if along else text


def emphasised(text: str, is_biased: bool) -> str:
    return f"**{text}**" if is_biased else text


def unbiased(findings: Sequence[Finding]) -> list[str]:
    """Methods with no biased cell but on late trajectories, and a part along every gradient."""
    on_policy = [finding for finding in findings if finding.process != "late"]
    biased = {f.method for f in on_policy if f.is_biased or (f.signal is not None and not f.is_found)}
    return [f"`{name}`" for name in methods_of(findings) if name not in biased]


def plot_presets(findings: Sequence[Finding], path: Path) -> None:
    """A panel a process, a line a preset: the angle to the gradient, or the drift where there is none."""
    pyplot = _pyplot()
    names = methods_of(findings)
    figure, axes = pyplot.subplots(2, 5, figsize=(14, 8), sharey=True, layout="constrained")
    for axis, process in zip(axes.flat, PROCESSES, strict=False):
        for line, name in enumerate(names):
            (found,) = [f for f in findings if (f.method, f.process) == (name, process.name)]
            if process.has_gradient and not found.is_found:
                axis.text(1.0, line, "no part along it", va="center", fontsize=7)
                continue
            value, error = found.angle if process.has_gradient else found.signed_bias
            color = "tab:red" if found.is_biased else "tab:blue"
            axis.errorbar([value], [line], xerr=[error], fmt="o", color=color, markersize=4, capsize=2, linewidth=0.9)
        _scale(axis.set_xscale, axis, process, "x")
        axis.set_title(process.name)
        axis.grid(alpha=0.3)
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].invert_yaxis()
    for axis in axes.flat[len(PROCESSES) :]:
        axis.axis("off")
        axis.text(0.1, len(names) / 2, PRESETS_LEGEND, va="center", fontsize=9, transform=axis.get_yaxis_transform())
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def plot_sizes(findings: Sequence[Finding], path: Path) -> None:
    """A panel a process, a curve a credit, over group size."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, len(TURN_PROCESSES), figsize=(14, 4.2), layout="constrained")
    for axis, process in zip(axes, TURN_PROCESSES, strict=True):
        for number, name in enumerate(BY_SIZE):
            points = [f for f in findings if (f.method, f.process) == (name, process.name)]
            # side by side: many credits have the same value
            size = [f.group_size * 1.07 ** (number - len(BY_SIZE) // 2) for f in points]
            values, errors = zip(*(f.angle if process.has_gradient else f.signed_bias for f in points), strict=True)
            marker = "osD^v<>"[number]
            axis.errorbar(size, values, errors, label=name, marker=marker, markersize=4, capsize=2, linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes := sorted({f.group_size for f in findings}), [str(size) for size in sizes])
        _scale(axis.set_yscale, axis, process, "y")
        axis.set_title(process.name)
        axis.set_xlabel("group size")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("update to gradient, degrees\n(above 90: against it)")
    axes[[process.has_gradient for process in TURN_PROCESSES].index(False)].set_ylabel(
        "update / its deviation\n(below 0: fewer turns)"
    )
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(BY_SIZE), frameon=False)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def _scale(set_scale: Callable[..., None], axis: Any, process: Process, which: str) -> None:
    """Linear up to a few degrees, or a tenth of a deviation, and logarithmic beyond: small and large ones are seen."""
    draw = axis.axvline if which == "x" else axis.axhline
    if process.has_gradient:
        ticks: list[float] = [0, 2, 5, 10, 20, 45, 90, 180]
        set_scale("symlog", linthresh=5)
        draw(90, color="black", linewidth=0.8, linestyle="--")
    else:
        ticks = [-3, -1, -0.3, -0.1, 0, 0.1, 0.3, 1]
        set_scale("symlog", linthresh=0.1)
        draw(0, color="black", linewidth=0.8, linestyle="--")
    limits = (-1.0, 200.0) if process.has_gradient else (-9.0, 2.0)
    axis.set(**{f"{which}lim": limits, f"{which}ticks": ticks, f"{which}ticklabels": [f"{tick:g}" for tick in ticks]})
    axis.tick_params(labelsize=7)
    (axis.xaxis if which == "x" else axis.yaxis).minorticks_off()


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
