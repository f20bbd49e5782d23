"""Supervised warm-up: demonstrations of the tool protocol by the environment's oracle, cross-entropy on its turns."""

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch

from gtpo.batch import PackedSequence, pack, split_by_tokens
from gtpo.config import SftConfig
from gtpo.environments import Demonstration, written
from gtpo.policy import Policy
from gtpo.rollout import Rollout
from gtpo.sampler import Completion
from gtpo.schedule import learning_rate
from gtpo.types import RunFault, StopReason, Task, Trajectory
from gtpo_kernels import linear_token_logprobs


async def demonstrate(
    rollout: Rollout,
    oracle_of: Callable[[Task, random.Random], Demonstration],
    tasks: Sequence[Task],
    *,
    seed: int,
    max_concurrent: int,
    on_finished: Callable[[], None] = lambda: None,
) -> list[Trajectory]:
    """One demonstration a task, played by the oracle against the real tools."""
    limit = asyncio.Semaphore(max_concurrent)

    async def one(position: int, task: Task) -> Trajectory:
        async with limit:
            trajectory = await demonstrate_one(rollout, oracle_of(task, random.Random(f"{seed}/{position}")), task)
            on_finished()
            return trajectory

    return list(await asyncio.gather(*(one(position, task) for position, task in enumerate(tasks))))


async def demonstrate_one(rollout: Rollout, oracle: Demonstration, task: Task) -> Trajectory:
    """The oracle writes through the policy's own loop: its text becomes ids, its calls run, its outputs are real."""
    started = False

    async def write(new_ids: list[int], observation: str, max_new_tokens: int) -> Completion:
        nonlocal started
        try:
            step = oracle.send(observation) if started else next(oracle)
        except StopIteration:
            raise ValueError(f"the oracle of task {task.id!r} ended before its episode") from None
        started = True
        chat = rollout.chat
        ids = chat.completion_ids(written(step, chat.call_format, chat.written_call), behind=new_ids)
        return Completion(
            ids[:max_new_tokens], [0.0] * min(len(ids), max_new_tokens), finished=len(ids) <= max_new_tokens
        )

    return await rollout.play(task, 0, write)


def to_demonstrations(played: Sequence[Trajectory], *, only_successful: bool) -> list[PackedSequence]:
    """Those that came to an end of their own or ran out of turns, as training sees them. Raises RunFault for none."""
    whole = (StopReason.FINISHED, StopReason.MAX_TURNS)
    kept = [t for t in played if t.stop in whole and (t.is_success or not only_successful)]
    if not kept:
        raise RunFault("no demonstration to learn from: the oracle finished none within the rollout's limits")
    return [to_demonstration_sequence(trajectory) for trajectory in kept]


def to_demonstration_sequence(trajectory: Trajectory) -> PackedSequence:
    """The oracle's turns are what is learned; prompt and tool tokens are context."""
    turns = trajectory.turn_index_of_tokens()
    return PackedSequence(
        token_ids=trajectory.token_ids(),
        advantages=[0.0] * len(turns),
        loss_mask=[turn >= 0 for turn in turns],
        rollout_logprobs=[0.0] * len(turns),
    )


def sft_batch(
    demonstrations: Sequence[PackedSequence], *, step: int, batch_size: int, seed: int
) -> list[PackedSequence]:
    """The batch of one step: drawn without replacement, a function of (seed, step) only."""
    rng = np.random.default_rng([seed, step])
    chosen = rng.choice(len(demonstrations), size=min(batch_size, len(demonstrations)), replace=False)
    return [demonstrations[i] for i in chosen]


def accumulate_sft_gradient(policy: Policy, sequences: Sequence[PackedSequence], *, micro_batch_tokens: int) -> float:
    """Adds the gradient of -1/num_loss_tokens * sum of log-probs of the oracle's tokens; returns that loss."""
    num_loss_tokens = sum(sum(sequence.loss_mask[1:]) for sequence in sequences)
    total = 0.0
    for group in split_by_tokens(sequences, max_tokens=micro_batch_tokens):
        batch = pack(group, device=policy.device)
        hidden = policy.hidden_states(batch)[batch.loss_mask]
        logprobs = linear_token_logprobs(
            hidden, policy.head.weight, batch.targets[batch.loss_mask], bias=policy.logit_bias
        ).logprobs
        loss = -logprobs.sum() / num_loss_tokens
        loss.backward()
        total += float(loss.detach())
    return total


def make_optimizers(policy: Policy, kind: Literal["adamw", "muon"]) -> list[torch.optim.Optimizer]:
    """The optimizers of the warm-up, for one learning rate: Muon's steps are scaled to the size of AdamW's.

    "muon" takes the matrices between embedding and head (source: https://kellerjordan.github.io/posts/muon/); all else
    is AdamW's.
    """
    trainable = list(policy.trainable().values())
    matrices: list[torch.nn.Parameter] = []
    if kind == "muon":
        edges = {id(weight) for weight in policy.edges}
        matrices = [weight for weight in trainable if weight.ndim == 2 and id(weight) not in edges]
    chosen = {id(weight) for weight in matrices}
    rest = [weight for weight in trainable if id(weight) not in chosen]
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    if rest:
        optimizers.append(torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0))
    return optimizers


def run_sft(
    policy: Policy,
    demonstrations: Sequence[PackedSequence],
    *,
    config: SftConfig,
    seed: int,
    micro_batch_tokens: int,
    max_grad_norm: float,
    on_step: Callable[[int, float], None],
    check: Callable[[int, float, float, list[PackedSequence]], None] = lambda step, loss, norm, sequences: None,
) -> None:
    """The warm-up loop, with optimizers of its own: `check(step, loss, gradient_norm, sequences)` may refuse a step
    before its weights move; `on_step(step, loss)` comes after it."""
    optimizers = make_optimizers(policy, config.optimizer)
    for step in range(config.steps):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = learning_rate(
                step, total=config.steps, base=config.learning_rate, warmup=config.warmup_steps, schedule="linear"
            )
        sequences = sft_batch(demonstrations, step=step, batch_size=config.batch_size, seed=seed)
        loss = accumulate_sft_gradient(policy, sequences, micro_batch_tokens=micro_batch_tokens)
        norm = torch.nn.utils.clip_grad_norm_(policy.trainable().values(), max_grad_norm)
        check(step, loss, float(norm), sequences)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        on_step(step, loss)
