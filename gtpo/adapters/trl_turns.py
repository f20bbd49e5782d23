"""Rows, messages and credit for `gtpo.adapters.trl`; nothing here imports TRL."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gtpo.adapters.layouts import list_turn_advantages


class ScoredRow(NamedTuple):
    """One completion, as ranks exchange it.

    turn_rewards: of each of its turns; None: no reward function applied.  num_tokens: of each of its turns.
    outcome: the part of the rewards that came as one number.  messages: of each turn, where the credit asks for them.
    """

    turn_rewards: list[float] | None
    num_tokens: list[int]
    outcome: float = 0.0
    messages: "list[TurnMessages] | None" = None


class TurnMessages(NamedTuple):
    """state: the tool output right before the turn, None before the first.  calls: whether the turn calls a tool."""

    state: tuple[str, ...] | None
    calls: bool


def group_advantages(rows: Sequence[ScoredRow], group_size: int, credit: Mapping[str, Any]) -> list[list[float]]:
    """Advantages of the turns of each row.  rows: of all ranks, whole groups of `group_size` one after another.

    credit: options of `gtpo.adapters.layouts`.
    A row that no reward function scored has advantages 0 and leaves the statistics of its group.

    >>> rows = [ScoredRow([0.0, 1.0], [2, 1]), ScoredRow([0.0], [3]), ScoredRow(None, [1])]
    >>> [[round(a, 3) for a in row] for row in group_advantages(rows, 3, {"gamma": 1.0})]
    [[0.577, 0.577], [-1.155], [0.0]]
    """
    if len(rows) % group_size:
        raise ValueError(f"there must be whole groups of {group_size} rows, got {len(rows)}: were the ranks gathered?")
    scored = [index for index, row in enumerate(rows) if row.turn_rewards is not None]
    advantages = [[0.0] * len(row.num_tokens) for row in rows]
    values = list_turn_advantages(
        [rows[index].turn_rewards or [] for index in scored],
        [index // group_size for index in scored],
        num_tokens=[rows[index].num_tokens for index in scored],
        **credit,
    )
    for index, row in zip(scored, values, strict=True):
        advantages[index] = row
    return advantages


def options_of_batch(rows: Sequence[ScoredRow], needs: set[str]) -> dict[str, Any]:
    """Of the scored rows, what a credit needs beside their rewards; see `gtpo.adapters.options.PER_BATCH`."""
    scored = [row for row in rows if row.turn_rewards is not None]
    messages = [row.messages or [] for row in scored]
    found: dict[str, Any] = {
        "outcomes": [row.outcome for row in scored],
        "anchor_ids": [[turn.state for turn in turns] for turns in messages],
        "turns_with_calls": [[turn.calls for turn in turns] for turns in messages],
    }
    return {name: found[name] for name in needs}


def check_turns(num_turns: Sequence[int], completions: Sequence[Any]) -> None:
    """Refuse masks that disagree with the messages: turns that touch would share one advantage in silence."""
    for row, (counted, messages) in enumerate(zip(num_turns, completions, strict=True)):
        if isinstance(messages, str):
            continue
        written = sum(message["role"] == "assistant" for message in messages)
        if counted != written:
            raise RuntimeError(
                f"completion {row} has {written} assistant messages, but its tool mask shows {counted} turns: does the "
                "chat template render tool messages?"
            )


def messages_of_turns(completion: Any, num_turns: int) -> list[TurnMessages]:
    """What a credit may ask of the turns of one completion, TRL's list of messages.

    Raises ValueError for text, in which turns cannot be seen, if there are more than one, and for other numbers of
    assistant messages than of turns.

    >>> look = {"role": "assistant", "tool_calls": [{}]}
    >>> messages_of_turns([look, {"role": "tool", "content": "a box"}, {"role": "assistant", "content": "done"}], 2)
    [TurnMessages(state=None, calls=True), TurnMessages(state=('a box',), calls=False)]
    """
    turns: list[TurnMessages] = []
    seen: tuple[str, ...] = ()
    for message in [{"role": "assistant"}] if isinstance(completion, str) else completion:
        if message["role"] == "assistant":
            turns.append(TurnMessages(seen if turns else None, bool(message.get("tool_calls"))))
            seen = ()
        else:
            seen = (*seen, str(message.get("content")))
    if len(turns) != num_turns:
        raise ValueError(
            f"this credit asks for the messages of each turn: there are {len(turns)}, but the completion has "
            f"{num_turns} turns"
        )
    return turns
