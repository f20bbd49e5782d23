"""Tasks that are worked on with the run's tools, Python in the sandbox above all: one kind of episode."""

from abc import abstractmethod
from collections.abc import Sequence

from gtpo.environments.base import Environment
from gtpo.environments.episode import EpisodeLost, Grade, Reply
from gtpo.environments.programs import ProgramCase, passes, program_of
from gtpo.sandbox import SandboxPool, SandboxUnavailable
from gtpo.tools import RunTools, Toolbox
from gtpo.types import Message, StopReason, Task, ToolResult, ToolStatus, Trajectory, Turn


class CodeEnvironment(Environment):
    """Base of environments whose model calls the tools of `rollout.tools` and then answers.

    Its world is a session of the sandbox: it says what the model's Python may call there (`setup_code`), whether a
    printed output is what was expected, and what a final answer, or a program, is worth.
    system_prompt: read before each task.
    """

    system_prompt: str
    blocks = False
    timeout_s = None  # the sandbox has limits of its own
    offers_run_tools = True

    @abstractmethod
    def grade(self, task: Task, answer: str | None) -> float:
        """What the final answer is worth, in [0, 1]; None (no answer was given) is 0. Never raises for any answer."""

    def program_cases(self, task: Task) -> Sequence[ProgramCase]:
        """For a task whose result is a program: what it is run on. The episode then asks these and not `grade`: 1 where
        the last fenced block of the last turn passes all of them, else 0. Of them only the inputs reach the sandbox.
        """
        return ()

    def setup_code(self, task: Task) -> str:
        """Python source that the sandbox session runs before the first cell; it defines what the model may call.

        Functions defined there can read the global int `__cell__`, the number of the running cell.
        """
        return ""

    def expected_output(self, task: Task, code: str, output: str) -> bool | None:
        """Whether a python call's `output` is what the task expects of `code`; None where it does not say."""
        return None

    def open(self, task: Task, *, sample: int, tools: RunTools) -> "CodeEpisode":
        return CodeEpisode(self, task, tools)


class CodeEpisode:
    """One attempt at a task of a `CodeEnvironment`. Its session is opened for the first call."""

    def __init__(self, environment: CodeEnvironment, task: Task, tools: RunTools) -> None:
        self._environment = environment
        self._task = task
        self._run_tools = tools
        self._toolbox: Toolbox | None = None
        self._cases = environment.program_cases(task)
        if not isinstance(self._cases, Sequence) or not all(isinstance(case, ProgramCase) for case in self._cases):
            raise TypeError(f"program_cases must return a list of ProgramCase, got {self._cases!r}")
        if self._cases and not isinstance(tools.sandbox, SandboxPool):
            raise ValueError(f"task {task.id!r} has program_cases, which need the sandbox of gtpo and the tool python")
        self.tools = tools.schemas
        self.messages = (Message("system", environment.system_prompt), Message("user", task.prompt))

    async def step(self, turn: Turn) -> Reply:
        if not turn.calls:
            return Reply(done=True)
        if self._toolbox is None:
            try:
                self._toolbox = await self._run_tools.open(self._environment.setup_code(self._task))
            except (SandboxUnavailable, OSError) as failure:
                fault = ToolResult(ToolStatus.INFRA_ERROR, f"sandbox failure: {failure}")
                return Reply(results=[fault] * len(turn.calls))
        results = await self._toolbox.execute(turn.calls)
        return Reply(results=results, as_expected=self._verdict(turn, results))

    async def grade(self, trajectory: Trajectory) -> Grade:
        # a program is judged in processes of its own, for which this session's slot is wanted
        await self.close()
        if not self._cases:
            return Grade(self._environment.grade(self._task, trajectory.answer))
        finished = trajectory.stop is StopReason.FINISHED
        program = program_of(trajectory.turns[-1].said) if finished else None
        assert isinstance(self._run_tools.sandbox, SandboxPool)
        try:
            passed = program is not None and await passes(self._run_tools.sandbox, program, self._cases)
        except SandboxUnavailable as failure:
            raise EpisodeLost(f"sandbox failure: {failure}") from failure
        return Grade(float(passed))

    async def close(self) -> None:
        toolbox, self._toolbox = self._toolbox, None
        if toolbox is not None:
            await toolbox.close()

    def _verdict(self, turn: Turn, results: Sequence[ToolResult]) -> bool | None:
        verdicts = [
            self._environment.expected_output(self._task, call.code, result.text)
            for call, result in zip(turn.calls, results, strict=True)
            if result.status is ToolStatus.OK and call.code
        ]
        if wrong := [verdict for verdict in verdicts if not isinstance(verdict, bool | None)]:
            raise TypeError(f"expected_output must return True, False or None, got {wrong[0]!r}")
        decided = [verdict for verdict in verdicts if verdict is not None]
        return all(decided) if decided else None
