"""Episodes whose tools are plain typed functions: the shortest way to a world with state."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from gtpo.environments.episode import Grade, Reply
from gtpo.tools.base import cut_text
from gtpo.tools.function import MAX_CHARS, outcome_of
from gtpo.tools.signature import CallSignature
from gtpo.tools.typed import typed
from gtpo.types import Message, ToolCall, ToolResult, ToolSchema, ToolStatus, Trajectory, Turn


class FunctionEpisode(ABC):
    """A `BlockingEpisode` whose tools are `functions`, methods of a subclass as a rule; its state is the object's.

    prompt: what the user asks. system: read before it. functions: with type hints and a docstring that describes each
    argument under "Args:"; what they return is read by the model as a `FunctionTool`'s is, up to `max_chars`, what they
    raise as "TypeName: message". One that raises EpisodeLost loses the trajectory. A turn that calls none ends the
    episode.
    Subclasses implement `grade`, and may give rewards to the current turn by `reward`, end it by `finish`.

    >>> class Counter(FunctionEpisode):
    ...     def __init__(self):
    ...         super().__init__("Count to 2.", functions=[self.count])
    ...         self.total = 0
    ...     def count(self, by: int) -> int:
    ...         '''Adds to the total and returns it.
    ...
    ...         Args:
    ...             by: How much to add.
    ...         '''
    ...         self.total += by
    ...         return self.total
    ...     def grade(self, trajectory):
    ...         return Grade(float(self.total == 2))
    >>> episode = Counter()
    >>> turn = Turn([], [], "", calls=[ToolCall("count", {"by": 2}), ToolCall("count", {"by": "x"})])
    >>> [result.text for result in episode.step(turn).results]
    ['2', "count: argument 'by': input should be a valid integer, got 'x'"]
    """

    def __init__(
        self, prompt: str, *, functions: Sequence[Callable[..., Any]], system: str = "", max_chars: int = MAX_CHARS
    ) -> None:
        self.messages: Sequence[Message] = [
            *([Message("system", system)] if system else []),
            Message("user", prompt),
        ]
        self._signatures = {signature.name: (signature, fn) for fn in functions for signature in [CallSignature(fn)]}
        self.tools: Sequence[ToolSchema] = [signature.schema for signature, _ in self._signatures.values()]
        self._max_chars = max_chars
        self._rewards: dict[str, float] = {}
        self._done = False

    def step(self, turn: Turn) -> Reply:
        self._rewards = {}
        results = [self._call(call) for call in turn.calls]
        return Reply(results=results, rewards=self._rewards, done=self._done or not turn.calls)

    @abstractmethod
    def grade(self, trajectory: Trajectory) -> Grade:
        """What the trajectory is worth, with the world as it now is."""

    def close(self) -> None:
        """Ends the episode; subclasses give back what they hold."""
        self._done = True

    def reward(self, term: str, value: float) -> None:
        """Adds to the named reward term of the current turn."""
        self._rewards[term] = self._rewards.get(term, 0.0) + value

    def finish(self) -> None:
        """Ends the episode with the current turn."""
        self._done = True

    def _call(self, call: ToolCall) -> ToolResult:
        if call.error is not None:
            return ToolResult(call.fault, call.error)
        if call.name not in self._signatures:
            known = ", ".join(self._signatures) or "none"
            return ToolResult(ToolStatus.UNKNOWN_TOOL, f"Unknown tool '{call.name}'. Known tools: {known}.")
        signature, fn = self._signatures[call.name]
        try:
            arguments = signature.parse(typed(call, signature.schema))
        except ValueError as fault:
            return ToolResult(ToolStatus.ERROR, str(fault))
        status, text = outcome_of(fn, arguments)
        return ToolResult(status, cut_text(text, self._max_chars))
