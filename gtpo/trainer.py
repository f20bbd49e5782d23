"""The trainer: warm-up, then policy-gradient steps, with evaluation and checkpoints around them.

The step reads in the method's verbs: sample groups, reward turns, assign credit, pack, update. All randomness derives
from (seed, phase, step, task, sample), so nothing but weights, optimizer and step number has to survive a restart.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gtpo.assembly import (
    describe_sandbox,
    leave_out_overlong,
    load_model,
    make_chat,
    make_mixture,
    make_own_terms,
    make_run_tools,
    make_sampler,
    make_tasks,
    refuse_unusable_model,
    tokenizer_corpus,
)
from gtpo.batch import PackedSequence
from gtpo.callbacks import Callback
from gtpo.checkpoints import step_of
from gtpo.config import Config
from gtpo.credit import Scored, assign_credit, check_credit, to_sequences
from gtpo.environments import EnvironmentFault
from gtpo.evaluation import Evaluation, evaluate_groups
from gtpo.finite import NonFiniteLoss, refuse_non_finite_loss, refuse_non_finite_weights
from gtpo.learner import Learner
from gtpo.loop_thread import LoopThread
from gtpo.memory import refuse_unaffordable, refuse_unaffordable_cache
from gtpo.metrics import lost_turn_rows, measure_metrics, reward_term_metrics, rollout_metrics, tool_metrics, turn_rows
from gtpo.provenance import data_digests
from gtpo.report.progress import Progress
from gtpo.report.reward_audit import RewardAudit
from gtpo.report.signal import SpreadWatch
from gtpo.rewards import turn_rewards
from gtpo.rollout import Rollout
from gtpo.run_folder import RunFolder
from gtpo.schedule import places_of_step
from gtpo.sft import demonstrate, run_sft, to_demonstrations
from gtpo.staleness import refuse_other_version
from gtpo.tools import RunTools
from gtpo.types import RunFault, StopReason, Task, Trajectory
from gtpo_kernels.backend import select_backend

# first component of the seed of a sampled trajectory, so that no two phases share a stream
_TRAIN, _EVAL = 0, 1


class Trainer:
    """Everything of one run. Use as a context manager: the sandbox and the logs are closed at the end.

    callbacks: are told of each step, evaluation and checkpoint, see `Callback`.
    What can be known to be wrong is refused with ValueError, before the run's folder is touched.
    """

    def __init__(
        self,
        config: Config,
        *,
        resume: bool = False,
        overwrite: bool = False,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        refuse_unusable_model(config)
        check_credit(config.credit)
        refuse_unaffordable(config)
        self.config = config
        # looked at and locked from now on; changed only when all else is known to be right
        self.run = RunFolder(config, resume=resume, overwrite=overwrite)
        try:
            self._prepare()
        except BaseException:
            self.run.close()
            raise
        self.callbacks = tuple(callbacks)
        self.progress = Progress()
        self.spread = SpreadWatch()
        self.audit = RewardAudit()
        self.seconds = {"sft": 0.0, "generate": 0.0, "train": 0.0, "eval": 0.0, "tools": 0.0}
        self.num_tokens = {"sampled": 0, "trained": 0}
        self.best_outcome = -1.0
        # steps done, and whether no more are to be
        self.num_steps, self._stopping = 0, False
        self._started = time.perf_counter()
        self._resources = contextlib.ExitStack()

    def _prepare(self) -> None:
        config = self.config
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        # adapters draw their first weights from the global generator
        torch.manual_seed(config.seed)
        self.mixture = make_mixture(config)
        self.own_terms = make_own_terms(config)
        self.train_tasks, self.eval_tasks, self.demonstration_tasks = make_tasks(config, self.mixture)
        self._digests = data_digests(config, self.train_tasks)
        self.run.refuse_other_data(self._digests)
        run_tools = make_run_tools(config, self.mixture.by_name)
        self.tools, self.sandbox = run_tools.tools, run_tools.sandbox
        try:
            self._load(run_tools)
        except BaseException:
            self.tools.stop()
            raise

    def _load(self, tools: RunTools) -> None:
        config = self.config
        model, corpus = config.model, list[str]()
        if self.run.checkpoint is not None and not model.lora_rank:
            # a checkpoint's model holds all weights; where adapters train, they are beside it
            model = dataclasses.replace(model, source=str(self.run.checkpoint))
        if model.source == "tiny":
            with LoopThread() as loop:
                corpus = loop.run(tokenizer_corpus(self.mixture, self.train_tasks, tools))
        self.policy = load_model(
            model, corpus=corpus, seed=config.seed, max_tokens=config.rollout.max_trajectory_tokens
        )
        refuse_unaffordable_cache(config, self.policy)
        self.learner = Learner(self.policy, config)
        self.chat = make_chat(self.policy, config)
        self.rollout = Rollout(self.mixture.of, self.chat, tools, config.rollout)
        self.sampler = make_sampler(self.policy, self.chat, config.rollout)
        lists = {"eval": self.eval_tasks, "demonstration": self.demonstration_tasks}
        if config.train.steps:
            lists["training"] = self.train_tasks
        refuse = config.tasks.overlong_prompts == "refuse"
        with LoopThread() as loop:
            self.run.notes += loop.run(leave_out_overlong(self.rollout, lists, refuse=refuse))

    def __enter__(self) -> "Trainer":
        with contextlib.ExitStack() as resources:
            resources.callback(self.run.close)
            self._loop = resources.enter_context(LoopThread())
            resources.callback(lambda: self._loop.run(self.sampler.close()))
            resources.callback(self._close_tools)
            if self.sandbox is not None:
                self._loop.run(self.sandbox.start())
                resources.callback(self._close_sandbox)
            # only now: where the sandbox does not start, an older run is not deleted
            self.run.open(self._digests)
            self._resources = resources.pop_all()
        return self

    def _close_tools(self) -> None:
        self._loop.run(self.tools.close())

    def _close_sandbox(self) -> None:
        assert self.sandbox is not None
        self._loop.run(self.sandbox.close())

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()
        self._resources.close()

    def train(self) -> tuple[Evaluation, Evaluation]:
        """The whole job; returns the evaluations before and after the policy-gradient steps."""
        if self.run.checkpoint is None:
            self._begin()
        else:
            self._restore()
        first_step = self.num_steps
        with self.progress.phase("training", total=self.config.train.steps, done=first_step) as advance:
            for step in range(first_step, self.config.train.steps):
                try:
                    metrics = self.step(step)
                except EnvironmentFault:
                    # it was raised while sampling: the weights are those of the last whole step
                    self._keep(step)
                    raise
                reward, success, turns = (metrics[name] for name in ("reward", "success", "turns/mean"))
                advance(
                    f"reward {reward:.2f}  success {success:.0%}  turns {turns:.1f}{self.audit.after_step(metrics)}"
                )
                self._evaluate_and_checkpoint(step + 1)
                if self._stopping:
                    break
        after = self.evaluate(step=self.num_steps)
        if after.outcome > self.best_outcome:
            self.best_outcome = after.outcome
            self.run.mark_best()
        return self.before, after

    def stop(self) -> None:
        """Ends training behind the step in progress, with a checkpoint and the closing evaluation."""
        self._stopping = True

    def warm_up_only(self) -> Evaluation:
        """The warm-up, an evaluation and a checkpoint, from which a resumed run goes on."""
        self._begin()
        return self.before

    def _begin(self) -> None:
        self._warm_up()
        self.learner.keep_reference()
        self.before = self.evaluate(step=0)
        self.best_outcome = self.before.outcome
        self._checkpoint(0, best=True)

    def describe(self) -> list[str]:
        """What a run says of itself before it starts."""
        config, policy = self.config, self.policy
        trained = sum(weight.numel() for weight in policy.trainable().values())
        adapted = f", of them {trained / 1e6:.2f} M trained in adapters" if config.model.lora_rank else ""
        drawn = f"temperature {config.eval_temperature:g}" if config.eval_temperature else "greedy"
        return [
            f"method {config.method}, seed {config.seed}: {config.train.steps} steps of "
            f"{config.rollout.tasks_per_step} tasks x {config.rollout.group_size} trajectories",
            f"model {config.model.source}: {policy.num_parameters / 1e6:.2f} M parameters{adapted}, "
            f"{config.model.dtype} weights, {config.model.computes_in} passes on {policy.device}, "
            f"{torch.get_num_threads()} threads, loss backend {select_backend('gtpo_loss', None, policy.device)}",
            f"evaluation: {len(self.eval_tasks)} tasks x {config.eval.samples}, {drawn}",
            describe_sandbox(self.sandbox),
            f"run folder: {self.run.path}",
            *self.run.notes,
        ]

    def summary(self, before: Evaluation, after: Evaluation) -> dict[str, Any]:
        return {
            "method": self.config.method,
            "seed": self.config.seed,
            **{f"{name}_before": getattr(before, name) for name in ("success", "turns", "calls", "invalid_calls")},
            **{f"{name}_after": getattr(after, name) for name in ("success", "turns", "calls", "invalid_calls")},
            "num_tokens": self.num_tokens,
            "seconds": {"total": self.total_seconds, **self.seconds},
        }

    @property
    def total_seconds(self) -> float:
        """Wall time of the run; of a resumed one, with what led to the checkpoint that it went on from."""
        return time.perf_counter() - self._started

    def step(self, step: int) -> dict[str, Any]:
        """One step of the method: sample groups, reward their turns, assign credit, update the policy."""
        started = time.perf_counter()
        played = self.sample_groups(self._tasks_of_step(step), seed=[self.config.seed, _TRAIN, step])
        groups = self._without_lost(played, step=step)
        rewards = [turn_rewards(group, self.config.reward, self.own_terms) for group in groups]
        scored = assign_credit(groups, rewards, self.config.credit)
        sampled = time.perf_counter()
        loss = self.config.loss
        sequences = to_sequences(scored, mask_truncated=loss.mask_truncated, mask_void_turns=loss.mask_void_turns)
        update = self.update(sequences, step=step)
        ended = time.perf_counter()
        self.num_steps = step + 1
        self.num_tokens["trained"] += sum(len(sequence.token_ids) for sequence in sequences)
        seconds = {"generate": sampled - started, "train": ended - sampled, "step": ended - started}
        row = self._log_step(played, scored, update, seconds)
        for callback in self.callbacks:
            callback.after_step(step + 1, row, scored)
        return row

    def update(self, sequences: Sequence[PackedSequence], *, step: int) -> dict[str, float]:
        """Optimizer steps on one rollout, none of them along a gradient that is not finite."""
        check = functools.partial(refuse_non_finite_loss, step=step, folder=self.run.path)
        return self.learner.update(sequences, step=step, check=check)

    def _without_lost(self, played: Sequence[Sequence[Trajectory]], *, step: int) -> list[list[Trajectory]]:
        """The groups that something is left of. Logs what is lost; raises RunFault where all is."""
        lost = [trajectory for group in played for trajectory in group if trajectory.stop is StopReason.LOST]
        for turn in lost_turn_rows(step + 1, lost):
            self.run.log_turn(turn)
        groups = [present for group in played if (present := [t for t in group if t.stop is not StopReason.LOST])]
        if not groups:
            raise RunFault(
                f"step {step + 1}: all {len(lost)} trajectories were lost, the first to: {lost[0].lost_because}"
            )
        return groups

    def _log_step(
        self,
        played: Sequence[Sequence[Trajectory]],
        scored: Sequence[Sequence[Scored]],
        update: Mapping[str, float],
        seconds: Mapping[str, float],
    ) -> dict[str, Any]:
        """The step's row of metrics and its rows of turns. played: with lost trajectories, scored: without them."""
        step = self.num_steps
        everyone = [trajectory for group in played for trajectory in group]
        present = [trajectory for group in scored for trajectory, _, _ in group]
        row: dict[str, Any] = {
            "phase": "train",
            "step": step,
            **rollout_metrics(scored),
            **reward_term_metrics(scored),
            **measure_metrics(present),
            **tool_metrics(everyone, self.tools.names),
            "stop/lost": float(len(everyone) - len(present)),
            **update,
            **{f"time/{name}_s": value for name, value in seconds.items()},
        }
        if warning := self.spread.after_step(row):
            self.progress.say(f"step {step}: {warning}")
        if step == 1 and (warning := self.own_terms.not_given(present)):
            self.progress.say(f"step 1: {warning}")
        row["steps_without_spread"] = float(self.spread.count)
        self.seconds["generate"] += seconds["generate"]
        self.seconds["train"] += seconds["train"]
        for turn in turn_rows(step, scored):
            self.run.log_turn(turn)
        self.run.log(row)
        return row

    def sample_groups(self, tasks: Sequence[Task], *, seed: list[int]) -> list[list[Trajectory]]:
        """`group_size` trajectories for each task at the training temperature."""
        rollout = self.config.rollout
        return self._sample(
            tasks, group_size=rollout.group_size, temperature=rollout.temperature, seed=seed, label="generating"
        )

    def evaluate(self, *, step: int) -> Evaluation:
        """Success on the held-out tasks, logged as a row of phase "eval"."""
        started = time.perf_counter()
        groups = self._sample(
            self.eval_tasks,
            group_size=self.config.eval.samples,
            temperature=self.config.eval_temperature,
            seed=[self.config.seed, _EVAL],
            label="evaluating",
        )
        evaluation = evaluate_groups(groups)
        seconds = time.perf_counter() - started
        self.seconds["eval"] += seconds
        self.run.log({"phase": "eval", "step": step, **dataclasses.asdict(evaluation), "time/eval_s": seconds})
        for callback in self.callbacks:
            callback.after_evaluation(step, evaluation)
        return evaluation

    def _sample(
        self, tasks: Sequence[Task], *, group_size: int, temperature: float, seed: list[int], label: str
    ) -> list[list[Trajectory]]:
        refuse_non_finite_weights(self.policy)
        tool_seconds = self.rollout.tool_seconds
        with self.progress.phase(label, total=len(tasks) * group_size) as advance:
            try:
                self._loop.run(self.sampler.load(self.policy.weights().items(), version=self.num_steps))
                groups = self._loop.run(
                    self.rollout.sample_groups(
                        self.sampler,
                        tasks,
                        group_size=group_size,
                        temperature=temperature,
                        seed=seed,
                        on_finished=advance,
                    )
                )
            except FloatingPointError as error:
                raise NonFiniteLoss(f"{error}; the last good weights are in the last checkpoint") from error
        refuse_other_version(groups, version=self.num_steps)
        turns = [turn for group in groups for trajectory in group for turn in trajectory.turns]
        self.num_tokens["sampled"] += sum(len(turn.completion_ids) for turn in turns)
        self.seconds["tools"] += self.rollout.tool_seconds - tool_seconds
        return groups

    def _warm_up(self) -> None:
        config = self.config.sft
        if not config.steps:
            return
        started = time.perf_counter()
        with self.progress.phase("demonstrations", total=len(self.demonstration_tasks)) as advance:
            played = self._loop.run(
                demonstrate(
                    self.rollout,
                    self.mixture.oracle,
                    self.demonstration_tasks,
                    seed=self.config.seed,
                    max_concurrent=self.config.rollout.max_concurrent,
                    on_finished=advance,
                )
            )
        demonstrations = to_demonstrations(played, only_successful=config.only_successful)
        with self.progress.phase("warm-up", total=config.steps) as advance:

            def check(step: int, loss: float, norm: float, sequences: list[PackedSequence]) -> None:
                refuse_non_finite_loss(loss, norm, sequences, step=step, folder=self.run.path, phase="warm-up ")

            def on_step(step: int, loss: float) -> None:
                self.run.log({"phase": "sft", "step": step + 1, "loss": loss})
                advance(f"loss {loss:.3f}")

            run_sft(
                self.policy,
                demonstrations,
                config=config,
                seed=self.config.seed,
                micro_batch_tokens=self.config.train.micro_batch_tokens,
                max_grad_norm=self.config.train.max_grad_norm,
                check=check,
                on_step=on_step,
            )
        self.seconds["sft"] += time.perf_counter() - started

    def _tasks_of_step(self, step: int) -> list[Task]:
        size, count = self.config.rollout.tasks_per_step, len(self.train_tasks)
        return [self.train_tasks[place] for place in places_of_step(step, size, count, seed=self.config.seed)]

    def _evaluate_and_checkpoint(self, step: int) -> None:
        config = self.config.train
        is_best = False
        if config.eval_every and step % config.eval_every == 0 and step < config.steps:
            outcome = self.evaluate(step=step).outcome
            is_best, self.best_outcome = outcome > self.best_outcome, max(outcome, self.best_outcome)
        if is_best or step % config.checkpoint_every == 0 or step == config.steps or self._stopping:
            self._checkpoint(step, best=is_best)

    def _checkpoint(self, step: int, *, best: bool = False) -> None:
        # all weights, adapters too, are in the model beside it
        state = {
            "step": step,
            "before": dataclasses.asdict(self.before),
            "best_outcome": self.best_outcome,
            **self.learner.state_dict(),
            "torch_rng": torch.get_rng_state(),
            "seconds": self.seconds,
            "total_seconds": self.total_seconds,
            "num_tokens": self.num_tokens,
            "steps_without_spread": self.spread.count,
        }
        path = self.run.save_checkpoint(step, state, self.policy.save_model, best=best)
        for callback in self.callbacks:
            callback.after_checkpoint(step, path)

    def _keep(self, step: int) -> None:
        """A checkpoint out of turn, so that the steps before a fault need not be done again."""
        last = self.run.last_checkpoint()
        if last is None or step_of(last) < step:
            self._checkpoint(step)

    def _restore(self) -> None:
        """The state of the checkpoint. Nothing else of it is kept: it would be weights and moments twice."""
        state = self.run.load_state()
        assert state is not None and self.run.checkpoint is not None
        self.policy.load_adapters(self.run.checkpoint)
        self.learner.load_state_dict(state)
        torch.set_rng_state(state["torch_rng"])
        self.before, self.num_steps = Evaluation(**state["before"]), int(state["step"])
        # the second is the name of before outcomes were graded
        self.best_outcome = state["best_outcome"] if "best_outcome" in state else state["best_success"]
        self.spread.count = state["steps_without_spread"]
        self._started -= state["total_seconds"]
        self.seconds, self.num_tokens = dict(state["seconds"]), dict(state["num_tokens"])
