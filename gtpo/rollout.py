"""Rollouts: one coroutine a trajectory, which samples, calls tools, reads what they printed and goes on.

Token-in, token-out: a completion is kept as it was sampled and tool output is appended behind it. Whatever the model
does wrong comes back to it as a message; only a fault of the infrastructure ends a trajectory as lost.
"""

import time
from collections.abc import Awaitable, Callable, Sequence

from gtpo.chat import Chat
from gtpo.config import RolloutConfig
from gtpo.environments import Environment, ProgramCase, passes, program_of
from gtpo.sampler import Completion, SampledSequence, Sampler
from gtpo.sandbox import Sandbox, SandboxPool, SandboxUnavailable, Session
from gtpo.tools import Toolbox, ToolSet
from gtpo.types import StopReason, Task, ToolResult, ToolStatus, Trajectory, Turn

# Takes the ids to append, the text that they render (for demonstrators) and a token budget; gives the next completion.
Writer = Callable[[list[int], str, int], Awaitable[Completion]]


class Rollout:
    """Plays tasks of one environment, with tools in a sandbox.

    tools: what `config.tools` names; left out, those tools with the options that they have by default.
    """

    def __init__(
        self,
        environment: Environment,
        chat: Chat,
        sandbox: Sandbox | None,
        config: RolloutConfig,
        tools: ToolSet | None = None,
    ) -> None:
        self.environment = environment
        self.chat = chat
        self.sandbox = sandbox
        self.config = config
        self.tools = ToolSet(config.tools) if tools is None else tools
        self.tool_seconds = 0.0

    def prompt_ids(self, task: Task) -> list[int]:
        """The ids that a trajectory of `task` starts with. Raises ValueError where they leave no room for a turn."""
        prompt_ids = self.chat.prompt_ids(self.environment.system_prompt, task.prompt)
        if len(prompt_ids) >= self.config.max_trajectory_tokens:
            raise ValueError(
                f"the prompt of task {task.id!r} has {len(prompt_ids)} tokens; "
                f"rollout.max_trajectory_tokens must be above that, got {self.config.max_trajectory_tokens}"
            )
        return prompt_ids

    async def sample_groups(
        self,
        sampler: Sampler,
        tasks: Sequence[Task],
        *,
        group_size: int,
        seed: Sequence[int],
        on_finished: Callable[[], None] = lambda: None,
    ) -> list[list[Trajectory]]:
        """`group_size` trajectories for each task, in the tasks' order.

        Sample s of the task at position t draws from the stream [*seed, t, s].
        """
        attempts = [(position, sample) for position in range(len(tasks)) for sample in range(group_size)]

        async def start(sequence: SampledSequence) -> Trajectory:
            async def write(new_ids: list[int], _: str, max_new_tokens: int) -> Completion:
                return await sequence.sample(new_ids, max_new_tokens=max_new_tokens)

            position, sample = attempts[sequence.number]
            return await self.play(tasks[position], sample, write)

        seeds = [[*seed, position, sample] for position, sample in attempts]
        trajectories = await sampler.run(start, seeds=seeds, on_finished=on_finished)
        return [trajectories[i : i + group_size] for i in range(0, len(trajectories), group_size)]

    async def play(self, task: Task, sample: int, write: Writer) -> Trajectory:
        """One trajectory: completions by `write`, tools by the sandbox, until an answer or a limit."""
        prompt_ids = self.prompt_ids(task)
        trajectory = Trajectory(task=task, sample=sample, prompt_ids=prompt_ids)
        session: Session | None = None
        toolbox: Toolbox | None = None
        new_ids, observation, num_tokens = prompt_ids, "", len(prompt_ids)
        try:
            for _ in range(self.config.max_turns):
                turn, finished = await self._write_turn(write, new_ids, observation, num_tokens)
                trajectory.turns.append(turn)
                num_tokens += len(turn.completion_ids)
                if not finished:
                    trajectory.stop = StopReason.TRUNCATED
                    break
                parsed = self.chat.parse(turn.text)
                if not parsed.calls:
                    trajectory.answer = parsed.answer
                    break
                turn.calls = list(parsed.calls)
                if toolbox is None:
                    try:
                        if self.sandbox is not None:
                            session = await self.sandbox.open(self.environment.setup_code(task))
                    except (SandboxUnavailable, OSError) as failure:
                        fault = ToolResult(ToolStatus.INFRA_ERROR, f"sandbox failure: {failure}")
                        turn.results = [fault] * len(turn.calls)
                        trajectory.stop = StopReason.LOST
                        break
                    toolbox = self.tools.toolbox(session)
                await self._call_tools(task, turn, toolbox)
                if any(result.status is ToolStatus.INFRA_ERROR for result in turn.results):
                    trajectory.stop = StopReason.LOST
                    break
                if len(trajectory.turns) == self.config.max_turns:
                    trajectory.stop = StopReason.MAX_TURNS
                    break
                outputs = [result.text for result in turn.results]
                new_ids, observation = self.chat.tool_ids(outputs), "\n".join(outputs)
                if num_tokens + len(new_ids) >= self.config.max_trajectory_tokens:
                    trajectory.stop = StopReason.TRUNCATED
                    break
                turn.tool_ids = new_ids
                num_tokens += len(new_ids)
        finally:
            if session is not None:
                await session.close()
        if cases := self.environment.program_cases(task):
            await self._judge_program(task, cases, trajectory)
        else:
            trajectory.outcome = self.environment.grade(task, trajectory.answer)
        return trajectory

    async def _judge_program(self, task: Task, cases: Sequence[ProgramCase], trajectory: Trajectory) -> None:
        """The outcome of a trajectory whose result is a program; it is lost where the sandbox could not run that."""
        if not isinstance(self.sandbox, SandboxPool):
            raise ValueError(f"task {task.id!r} has program_cases, which need the sandbox of gtpo and the tool python")
        program = program_of(trajectory.turns[-1].text) if trajectory.stop is StopReason.FINISHED else None
        try:
            trajectory.outcome = float(program is not None and await passes(self.sandbox, program, cases))
        except (SandboxUnavailable, OSError):
            trajectory.stop = StopReason.LOST

    async def _write_turn(
        self, write: Writer, new_ids: list[int], observation: str, num_tokens: int
    ) -> tuple[Turn, bool]:
        started = time.perf_counter()
        room = min(self.config.max_completion_tokens, self.config.max_trajectory_tokens - num_tokens)
        completion = await write(new_ids, observation, room)
        turn = Turn(
            completion_ids=completion.token_ids,
            rollout_logprobs=completion.logprobs,
            text=self.chat.decode(completion.token_ids),
            seconds=time.perf_counter() - started,
        )
        return turn, completion.finished

    async def _call_tools(self, task: Task, turn: Turn, toolbox: Toolbox) -> None:
        turn.results = await toolbox.execute(turn.calls)
        self.tool_seconds += sum(result.seconds for result in turn.results)
        verdicts = [
            self.environment.expected_output(task, call.code, result.text)
            for call, result in zip(turn.calls, turn.results, strict=True)
            if result.status is ToolStatus.OK and call.code
        ]
        decided = [verdict for verdict in verdicts if verdict is not None]
        turn.as_expected = all(decided) if decided else None
