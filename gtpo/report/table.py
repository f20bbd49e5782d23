"""The before / after table of a run."""

from gtpo.evaluation import Evaluation

_ROWS = (
    ("success rate", "success", "{:.1%}"),
    ("mean outcome", "outcome", "{:.3f}"),
    ("turns a task", "turns", "{:.2f}"),
    ("tool calls a task", "calls", "{:.2f}"),
    ("invalid calls a task", "invalid_calls", "{:.3f}"),
)


def before_after_table(before: Evaluation, after: Evaluation) -> str:
    """A Markdown table, so that it reads the same in a terminal and in a file.

    >>> e = Evaluation(200, 1, 0.5, 0.5, 3.0, 2.0, 0.0, 0)
    >>> print(before_after_table(e, e).splitlines()[2])
    | success rate         |  50.0% |  50.0% |
    """
    lines = [f"| {f'{after.num_tasks} held-out tasks':<20} | before |  after |", f"|{'-' * 22}|-------:|-------:|"]
    for label, name, form in _ROWS:
        cells = [f"{form.format(getattr(e, name)):>6}" for e in (before, after)]
        lines.append(f"| {label:<20} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)
