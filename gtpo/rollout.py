"""Rollouts: one coroutine a trajectory, which samples, hands the turn to its episode, reads the reply and goes on.

Token-in, token-out: a completion is kept as it was sampled and what the episode says is appended behind it. Whatever
the model does wrong comes back to it as a message; only a fault of the infrastructure ends a trajectory as lost.
"""

import time
from collections.abc import Awaitable, Callable, Sequence

from gtpo.chat import Chat
from gtpo.config import RolloutConfig
from gtpo.environments import Environment, EpisodeHost, EpisodeLost, HostedEpisode
from gtpo.environments.from_code import CalledFromCode
from gtpo.sampler import Completion, SampledSequence, Sampler
from gtpo.tools import RunTools
from gtpo.types import StopReason, Task, ToolStatus, Trajectory, Turn

# Takes the ids to append, the text that they render (for demonstrators) and a token budget; gives the next completion.
Writer = Callable[[list[int], str, int], Awaitable[Completion]]

# No text of more characters than this a token can fit: it is not even tokenized, which would hold up the event loop.
_MAX_CHARS_PER_TOKEN = 256


class OverlongPrompt(ValueError):
    """A prompt of `num_tokens` leaves no room for a turn."""

    def __init__(self, task: Task, num_tokens: int, *, limit: int) -> None:
        super().__init__(
            f"the prompt of task {task.id!r} has {num_tokens} tokens; "
            f"rollout.max_trajectory_tokens must be above that, got {limit}"
        )
        self.num_tokens = num_tokens


class Rollout:
    """Plays the tasks of a run. environment_of: the environment of a task. tools: what a run offers to each episode."""

    def __init__(
        self, environment_of: Callable[[Task], Environment], chat: Chat, tools: RunTools, config: RolloutConfig
    ) -> None:
        self.host = EpisodeHost(environment_of, tools)
        self.chat = chat
        self.config = config
        self.tool_seconds = 0.0

    async def prompt_ids(self, task: Task) -> list[int]:
        """The ids that a trajectory of `task` starts with. Raises OverlongPrompt where they leave no room."""
        async with self.host.open(task, sample=0) as episode:
            return self._prompt_ids(task, episode)

    async def overlong(self, tasks: Sequence[Task]) -> dict[str, int]:
        """The tasks whose prompt leaves no room for a turn: id and number of tokens."""
        found = {}
        for task in tasks:
            try:
                await self.prompt_ids(task)
            except OverlongPrompt as error:
                found[task.id] = error.num_tokens
        return found

    async def sample_groups(
        self,
        sampler: Sampler,
        tasks: Sequence[Task],
        *,
        group_size: int,
        temperature: float,
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
        trajectories = await sampler.run(start, seeds=seeds, temperature=temperature, on_finished=on_finished)
        return [trajectories[i : i + group_size] for i in range(0, len(trajectories), group_size)]

    async def play(self, task: Task, sample: int, write: Writer) -> Trajectory:
        """One trajectory: completions by `write`, replies by the task's episode, until it is done or at a limit."""
        trajectory = Trajectory(task=task, sample=sample, prompt_ids=[])
        try:
            async with self.host.open(task, sample=sample) as episode:
                trajectory.prompt_ids = self._prompt_ids(task, episode)
                trajectory.stop = await self._converse(episode, trajectory, write)
                if trajectory.stop is not StopReason.LOST:
                    grade = await episode.grade(trajectory)
                    trajectory.outcome, trajectory.measures = grade.outcome, grade.measures
        except EpisodeLost as loss:
            trajectory.stop, trajectory.lost_because = StopReason.LOST, str(loss)
        return trajectory

    async def _converse(
        self, episode: HostedEpisode | CalledFromCode, trajectory: Trajectory, write: Writer
    ) -> StopReason:
        new_ids, observation, num_tokens = trajectory.prompt_ids, "", len(trajectory.prompt_ids)
        for number in range(1, self.config.max_turns + 1):
            turn, finished = await self._write_turn(write, new_ids, observation, num_tokens)
            trajectory.turns.append(turn)
            num_tokens += len(turn.completion_ids)
            if not finished:
                return StopReason.TRUNCATED
            parsed = self.chat.parse(turn.text, behind=new_ids)
            turn.calls, turn.answer, turn.said = list(parsed.calls), parsed.answer, parsed.said
            reply = await episode.step(turn)
            turn.calls = turn.calls if reply.calls is None else list(reply.calls)
            turn.results, turn.rewards, turn.as_expected = list(reply.results), reply.rewards, reply.as_expected
            self.tool_seconds += sum(result.seconds for result in turn.results)
            if faults := [result.text for result in turn.results if result.status is ToolStatus.INFRA_ERROR]:
                trajectory.lost_because = faults[0]
                return StopReason.LOST
            if reply.done:
                trajectory.answer = turn.answer
                return StopReason.FINISHED
            if number == self.config.max_turns:
                return StopReason.MAX_TURNS
            outputs = [result.text for result in turn.results]
            num_chars = sum(map(len, outputs)) + sum(len(message.content) for message in reply.messages)
            if num_chars > _MAX_CHARS_PER_TOKEN * self.config.max_trajectory_tokens:
                return StopReason.TRUNCATED
            new_ids = self.chat.reply_ids(outputs, reply.messages, reply.tools)
            observation = "\n".join([*outputs, *(message.content for message in reply.messages)])
            if num_tokens + len(new_ids) >= self.config.max_trajectory_tokens:
                return StopReason.TRUNCATED
            turn.tool_ids = new_ids
            num_tokens += len(new_ids)
        raise AssertionError("a trajectory has at least one turn")

    def _prompt_ids(self, task: Task, episode: HostedEpisode | CalledFromCode) -> list[int]:
        prompt_ids = self.chat.prompt_ids(episode.messages, episode.tools, explain_protocol=episode.explain_protocol)
        if len(prompt_ids) >= self.config.max_trajectory_tokens:
            raise OverlongPrompt(task, len(prompt_ids), limit=self.config.max_trajectory_tokens)
        return prompt_ids

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
            policy_version=completion.policy_version,
        )
        return turn, completion.finished
