"""The loss part of a method in training: the learner's gradient against loops, and the reference of KL terms."""

import dataclasses
import math
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gtpo.batch import PackedSequence, pack
from gtpo.config import load_config
from gtpo.learner import Learner
from gtpo.methods import METHODS, PolicyLoss
from gtpo.policy import Policy
from tests.trainer.conftest import tiny_policy
from tests.trainer.test_trainer import make_trainer, write_config

LOSSES = {
    **{name: method.loss for name, method in METHODS.items()},
    "turn ratio": PolicyLoss(ratio_level="turn", clip_low=0.05, clip_high=0.05, dual_clip=1.02, entropy_coef=0.1),
    "truncated": PolicyLoss(rollout_correction="truncated", rollout_correction_high=1.1, kl="k2", kl_coef=0.2),
    "masked turns": PolicyLoss(
        rollout_correction="masked",
        rollout_correction_level="turn",
        rollout_correction_low=0.8,
        rollout_correction_high=1.2,
        aggregation="seq-mean-token-sum",
    ),
    "sapo of turns": PolicyLoss(surrogate="sapo", ratio_level="turn", gate=(0.5, 2.0)),
    "sampler": PolicyLoss(ratio_to="sampler", clip_low=0.1, clip_high=0.1, kl="k3", kl_coef=0.1),
}


def sequences_of_turns(num: int) -> list[PackedSequence]:
    """Three prompt tokens, then turns of 1 to 3 tokens, a tool token after each; one sequence is out of the loss."""
    rng = random.Random(0)
    sequences = []
    for number in range(num):
        turns = [-1, -1, -1]
        for turn in range(rng.randint(1, 3)):
            turns += [turn] * rng.randint(1, 3) + [-1]
        of_turn = [rng.gauss(0.0, 1.0) for _ in turns]
        sequences.append(
            PackedSequence(
                [rng.randrange(3, 250) for _ in turns],
                [0.0 if turn < 0 else of_turn[turn] for turn in turns],
                [turn >= 0 and number != 1 for turn in turns],
                [0.0 if turn < 0 else -5.5 + rng.gauss(0.0, 0.2) for turn in turns],
                turn_ids=turns,
            )
        )
    return sequences


def plain_loss(policy: Policy, loss: PolicyLoss, sequences: list[PackedSequence], old: Tensor, ref: Tensor) -> Tensor:
    """The loss of whole sequences, by loops and plain PyTorch.  old, ref: [N] of the packed sequences."""
    batch = pack(sequences)
    log_p = (policy.hidden_states(batch) @ policy.head.weight.T).log_softmax(dim=1)
    logprobs = log_p.gather(1, batch.targets[:, None]).squeeze(1)
    entropy = -(log_p.exp() * log_p).sum(dim=1)
    rows = [
        (number, turn, is_counted)
        for number, sequence in enumerate(sequences)
        for turn, is_counted in zip(sequence.turn_ids or (), sequence.loss_mask, strict=True)
    ]
    # the first token of a sequence is predicted by nothing
    rows = [row for i, row in enumerate(rows) if i and rows[i - 1][0] == row[0]]

    def sharing(level: str, i: int) -> list[int]:
        depth = {"turn": 2, "sequence": 1}.get(level)
        if depth is None:
            return [i]
        return [j for j, row in enumerate(rows) if row[2] and row[:depth] == rows[i][:depth]]

    of_sequences, counts = [], []
    for number in range(len(sequences)):
        in_loss = [i for i, row in enumerate(rows) if row[0] == number and row[2]]
        total = logprobs.new_zeros(())
        for i in in_loss:
            same = sharing(loss.ratio_level, i)
            below = batch.rollout_logprobs if loss.ratio_to == "sampler" else old
            product = float((logprobs[same] - below[same]).detach().sum().exp())
            change = float((logprobs[i].exp() - below[i].exp()).detach())
            # a token's own gradient on a shared value
            ratio = (logprobs[same] - below[same]).mean().detach().exp() * (logprobs[i] - logprobs[i].detach()).exp()
            same = sharing(loss.rollout_correction_level, i)
            weight = math.exp(float((old[same] - batch.rollout_logprobs[same]).mean()))
            if loss.rollout_correction == "none":
                weight = 1.0
            elif loss.rollout_correction == "truncated":
                weight = min(weight, loss.rollout_correction_high)
            elif not loss.rollout_correction_low <= weight <= loss.rollout_correction_high:
                weight = 0.0
            advantage = float(batch.advantages[i]) * weight
            bounded = ratio.clamp(1 - loss.clip_low, 1 + loss.clip_high)
            gain = torch.minimum(ratio * advantage, bounded * advantage)
            if loss.dual_clip is not None and advantage < 0:
                gain = gain.clamp(min=loss.dual_clip * advantage)
            is_up = advantage > 0
            if loss.surrogate == "sapo":
                tau = loss.gate[0] if is_up else loss.gate[1]
                gain = 4 / tau * (tau * (ratio - 1)).sigmoid() * advantage
            elif loss.surrogate == "vespo":
                k, decay = loss.gate[:2] if advantage >= 0 else loss.gate[2:]
                gain = product**k * math.exp(decay * (1 - product)) * advantage * logprobs[i]
            elif loss.surrogate in ("dppo", "ipo"):
                falls, rises = change < -loss.clip_low, change > loss.clip_high
                cut = (falls or rises) if loss.surrogate == "ipo" else (rises if is_up else falls)
                gain = ratio * advantage * (not cut)
            elif loss.surrogate != "ppo":
                gain = advantage * logprobs[i] * (bounded.detach() if loss.surrogate == "cispo" else 1.0)
            x = (ref if loss.kl_reference == "start" else batch.rollout_logprobs)[i] - logprobs[i]
            kl = {"none": 0.0 * x, "k1": -x, "k2": x * x / 2, "k3": x.exp() - 1 - x}[loss.kl]
            total = total - gain + loss.kl_coef * kl - loss.entropy_coef * entropy[i]
        if in_loss:
            of_sequences.append(total / len(in_loss) if loss.aggregation == "seq-mean-token-mean" else total)
            counts.append(len(in_loss))
    divisor = {"token-mean": sum(counts), "constant": len(counts) * 48}.get(loss.aggregation, len(counts))
    return torch.stack(of_sequences).sum() / divisor


@pytest.fixture(scope="module")
def policies() -> tuple[Policy, Policy]:
    """The policy in training, and the one that it is held against: as it was some steps before."""
    now, before = tiny_policy(), tiny_policy()
    with torch.no_grad():
        for parameter in now.trainable().values():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    return now, before


@pytest.mark.parametrize("name", list(LOSSES))
def test_the_gradient_is_that_of_the_loss_by_loops(name: str, policies: tuple[Policy, Policy], tmp_path: Path) -> None:
    policy, before = policies
    config = load_config(write_config(tmp_path), ["--rollout.max_trajectory_tokens", "48"])
    config = dataclasses.replace(config, loss=LOSSES[name])
    learner = Learner(policy, config)
    learner.reference = before.reference_weights()
    sequences = sequences_of_turns(5)
    with torch.no_grad():
        whole = pack(sequences)
        log_p = (before.hidden_states(whole) @ before.head.weight.T).log_softmax(dim=1)
        ref = log_p.gather(1, whole.targets[:, None]).squeeze(1)
        old = 0.5 * (ref + learner.with_old_logprobs(whole).old_logprobs)
    batches, start = [], 0
    for part in (sequences[:2], sequences[2:]):
        batch = pack(part)
        part_old = old[start : start + len(batch.targets)]
        batch = dataclasses.replace(batch, old_logprobs=part_old)
        batches.append(learner.with_ref_logprobs(batch) if learner.has_reference else batch)
        start += len(part_old)
    denominator = sum(float(learner.mean_of(batch).num_loss_tokens) for batch in batches)
    policy.model.zero_grad()
    loss = sum(learner.accumulate_gradient(batch, num_loss_tokens=denominator)[0] for batch in batches)
    found = {name: p.grad.clone() for name, p in policy.trainable().items() if p.grad is not None}
    policy.model.zero_grad()
    expected = plain_loss(policy, config.loss, sequences, old, ref)
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-4, abs=1e-6)
    assert found
    for name, p in policy.trainable().items():
        assert p.grad is not None
        torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=1e-6)


def test_only_tokens_of_the_loss_are_projected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with make_trainer(tmp_path, "--loss.kl", "k3", "--loss.kl_coef", "0.1") as trainer:
        learner = trainer.learner
    learner.keep_reference()
    sequences = sequences_of_turns(3)
    batch = pack(sequences)
    log_p = (learner.policy.hidden_states(batch) @ learner.policy.head.weight.T).log_softmax(dim=1)
    expected = log_p.gather(1, batch.targets[:, None]).squeeze(1).detach() * batch.loss_mask
    projected, score = [], learner._logprobs

    def recorded(hidden: Tensor, targets: Tensor) -> Tensor:
        projected.append(len(hidden))
        return score(hidden, targets)

    monkeypatch.setattr(learner, "_logprobs", recorded)
    for found in (learner.with_old_logprobs(batch).old_logprobs, learner.with_ref_logprobs(batch).ref_logprobs):
        torch.testing.assert_close(found, expected)
    assert projected == [batch.num_loss_tokens] * 2 and batch.num_loss_tokens < len(batch.targets)
    # the second sequence has no token in the loss
    outside = learner.with_old_logprobs(pack(sequences[1:2])).old_logprobs
    assert outside is not None and not outside.any()


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_the_reference_is_the_policy_as_training_began(lora_rank: int, tmp_path: Path) -> None:
    with make_trainer(tmp_path, "--loss.kl", "k3", "--loss.kl_coef", "0.1") as trainer:
        config = trainer.config
    policy = tiny_policy(lora_rank=lora_rank)
    learner = Learner(policy, config)
    batch = pack(sequences_of_turns(3))
    loaded = learner.with_old_logprobs(batch).old_logprobs
    with torch.no_grad():
        # as a warm-up would
        for parameter in policy.trainable().values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    learner.keep_reference()
    first = learner.with_old_logprobs(batch).old_logprobs
    assert loaded is not None and first is not None and not torch.allclose(first, loaded, atol=1e-3)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    moved = learner.with_old_logprobs(batch).old_logprobs
    assert moved is not None and not torch.allclose(moved, first, atol=1e-3)
    kept = learner.with_ref_logprobs(batch).ref_logprobs
    assert kept is not None and torch.equal(kept, first)
    after = learner.with_old_logprobs(batch).old_logprobs
    assert after is not None and torch.equal(after, moved)


def test_under_lora_too_the_first_kl_is_that_of_the_warmed_up_policy_to_itself(tmp_path: Path) -> None:
    changes = ("--model.lora_rank", "2", "--sft.learning_rate", "0.05", "--train.updates_per_rollout", "1")
    with make_trainer(tmp_path, *changes, "--loss.kl", "k2", "--loss.kl_coef", "0.1") as trainer:
        trainer.warm_up_only()
        adapters = [value for name, value in trainer.policy.trainable().items() if "lora_B" in name]
        assert min(float(value.detach().abs().max()) for value in adapters) > 1e-3
        assert trainer.step(0)["kl"] < 1e-10
