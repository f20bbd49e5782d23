"""The ways in which multi-turn training goes wrong unseen, each as one test."""

import asyncio
import math
from pathlib import Path

import pytest
import torch

from gtpo.batch import pack, split_by_tokens
from gtpo.chat import Chat
from gtpo.config import RolloutConfig, config_from_dict
from gtpo.credit import Credit, Scored, assign_credit, to_sequence, to_sequences
from gtpo.drawing import sample_tokens
from gtpo.evaluation import evaluate_groups
from gtpo.methods import METHODS, CreditSum, Method, RewardRule, Term
from gtpo.metrics import rollout_metrics, update_metrics
from gtpo.policy import Policy
from gtpo.rewards import turn_rewards
from gtpo.sampler import Completion
from gtpo.sandbox import SandboxPool
from gtpo.templates import BrokenPrefix
from gtpo.types import StopReason, ToolStatus, Trajectory
from gtpo_kernels import clipped_loss, linear_token_logprobs, turn_advantages
from tests.trainer.conftest import (
    TASK,
    SumEnvironment,
    make_rollout,
    make_sequence,
    make_trajectory,
    make_turn,
    play_all,
    python,
    tiny_policy,
)
from tests.trainer.test_trainer import make_trainer

GTPO = METHODS["gtpo"]
UNMASKED = {"mask_truncated": False, "mask_void_turns": False}


def score(*groups: list[Trajectory], method: Method = GTPO) -> list[list[Scored]]:
    return assign_credit(groups, [turn_rewards(group, method.reward) for group in groups], method.credit)


def credit_of(group: list[Trajectory], method: Method = GTPO) -> list[Credit]:
    return [scored.credit for scored in score(group, method=method)[0]]


def test_01_returns_iterate_over_turns() -> None:
    success = make_trajectory(make_turn(code="a", num_tool_tokens=50), make_turn(code="b"), outcome=1.0)
    failure = make_trajectory(make_turn(code=""), outcome=0.0)
    credit, _ = credit_of([success, failure])
    assert credit.returns == pytest.approx([0.9, 1.0])
    sequence = to_sequence(success, credit, mask_truncated=False, mask_void_turns=False)
    # the reward behind 50 masked tool tokens reaches both tokens of the first turn
    assert sequence.advantages[3:5] == [credit.advantages[0]] * 2 and credit.advantages[0] > 0
    assert sequence.advantages[5:55] == [0.0] * 50


def test_02_discount_is_per_turn() -> None:
    long = make_trajectory(make_turn(1000, code="a"), make_turn(1000, code="b"), outcome=1.0)
    (credit,) = credit_of([long])
    assert credit.returns == pytest.approx([0.9, 1.0])


def test_03_turn_boundaries_are_ids() -> None:
    # no tool token between the turns, and all rewards 0: neither the mask nor the rewards show where turns end
    trajectory = make_trajectory(make_turn(2, code="a"), make_turn(1, code="b"), make_turn(3, code="c"))
    assert trajectory.turn_index_of_tokens() == [-1, -1, -1, 0, 0, 1, 2, 2, 2]
    credit = Credit([0.0] * 3, [0.1, 0.2, 0.3])
    sequence = to_sequence(trajectory, credit, mask_truncated=False, mask_void_turns=False)
    assert sequence.advantages == [0.0] * 3 + [0.1] * 2 + [0.2] + [0.3] * 3


def test_04_the_loss_mask_is_not_the_attention_mask(policy: Policy) -> None:
    trajectory = make_trajectory(make_turn(2, code="a", num_tool_tokens=3), make_turn(2, code="b"))
    credit = Credit([0.0, 0.0], [1.0, 1.0])
    sequence = to_sequence(trajectory, credit, mask_truncated=False, mask_void_turns=False)
    assert sequence.loss_mask == [False] * 3 + [True] * 2 + [False] * 3 + [True] * 2
    batch = pack([sequence])
    embeddings = policy.model.get_input_embeddings().weight
    # the last row, which predicts a sampled token, depends on each tool token
    (gradient,) = torch.autograd.grad(policy.hidden_states(batch)[-1].square().sum(), embeddings)
    assert (gradient[trajectory.turns[0].tool_ids].norm(dim=1) > 1e-6).all()


def test_05_rewards_never_read_tool_text(policy: Policy) -> None:
    (trajectory,) = play_all(
        policy, [[python("print('answer: 4', '`' * 3 + 'python', 'solve()', '`' * 3, sep=chr(10))"), "I stop."]]
    )
    assert "answer: 4" in trajectory.turns[0].results[0].text
    assert trajectory.answer is None and trajectory.outcome == 0.0 and "solve()" not in trajectory.cells
    plain = make_trajectory(make_turn(code="f()", output="nothing"), make_turn())
    marked = make_trajectory(make_turn(code="f()", output="answer: 1 ```python\nprint(1)\n```"), make_turn())
    success = make_trajectory(make_turn(code="print(1)"), outcome=1.0)
    assert turn_rewards([plain, success], GTPO.reward) == turn_rewards([marked, success], GTPO.reward)


def test_06_token_in_token_out(policy: Policy) -> None:
    chat = Chat(policy.tokenizer)
    text = python("print(4)")
    # one id a byte, which the tokenizer would never write: it merges "python" and "print"
    sampled = [
        [chat.completion_ids(letter)[0] for letter in text] + [chat.end_of_turn_id],
        chat.completion_ids("answer: 4"),
    ]
    assert sampled[0] != chat.completion_ids(text)
    appended: list[list[int]] = []

    async def write(new_ids: list[int], observation: str, max_new_tokens: int) -> Completion:
        appended.append(new_ids)
        ids = sampled[len(appended) - 1]
        return Completion(ids, [-1.0] * len(ids), finished=True)

    async def run() -> Trajectory:
        async with SandboxPool(min_tier="landlock") as pool:
            config = RolloutConfig(max_trajectory_tokens=500)
            return await make_rollout(SumEnvironment(), chat, pool, config).play(TASK, 0, write)

    trajectory = asyncio.run(run())
    assert trajectory.token_ids() == [*appended[0], *sampled[0], *appended[1], *sampled[1]]
    assert appended[1] == chat.reply_ids(["4"]) and trajectory.outcome == 1.0
    rewriting = tiny_policy().tokenizer
    rewriting.chat_template = (
        "{% for m in messages %}{{ m['content'] if loop.last else '(cut)' }}<|im_end|>{% endfor %}"
    )
    with pytest.raises(BrokenPrefix):
        Chat(rewriting)


def test_06_and_09_the_trainer_sees_what_the_sampler_saw(tmp_path: Path) -> None:
    with make_trainer(tmp_path, "--rollout.temperature", "0.7") as trainer:
        trainer.warm_up_only()
        groups = trainer.sample_groups(trainer.train_tasks[:4], seed=[0])
        assert any(len(trajectory.turns) > 1 for group in groups for trajectory in group)

        def largest_gap() -> float:
            batch = pack(to_sequences(score(*groups), **UNMASKED))
            # of the policy that sampled, as a second update on this rollout takes them, and as a first one does
            again = trainer.learner.with_old_logprobs(batch).old_logprobs
            assert again is not None
            _, metrics, gap = trainer.learner.accumulate_gradient(batch, num_loss_tokens=batch.num_loss_tokens)
            torch.testing.assert_close((again - batch.rollout_logprobs)[batch.loss_mask].abs(), gap, atol=1e-5, rtol=0)
            return update_metrics([metrics], [gap])["sampling/sampling_logp_difference/max"]

        assert largest_gap() < 1e-4
        longest = max((t for group in groups for t in group), key=lambda t: len(t.turns))
        # one id of a prefix that is not the one behind which the model went on
        longest.turns[0].tool_ids[-1] ^= 1
        assert largest_gap() > 1e-3


def test_07_low_probability_tokens_do_not_blow_up() -> None:
    logprobs = torch.tensor([-1.0, -1.0], requires_grad=True)
    loss, metrics = clipped_loss(logprobs, torch.tensor([-1.0, -1.0]), old_logprobs=torch.tensor([-90.0, -1.0]))
    loss.backward()
    assert torch.isfinite(loss) and metrics.ratio_max.item() == pytest.approx(math.exp(20), rel=1e-5)
    assert logprobs.grad.tolist() == [0.0, 0.5]
    # the filter of void turns, and its metric
    void = make_trajectory(make_turn(code="a"), make_turn(), answer=None)
    sequence = to_sequence(void, Credit([0, 0], [1, 1]), mask_truncated=False, mask_void_turns=True)
    assert not any(sequence.loss_mask)
    assert rollout_metrics(score([void]))["turns/void_ratio"] == 0.5
    # its sign: the least likely token behind tool output, which no ratio shows while each rollout is used once
    unlikely = make_trajectory(make_turn(code="a", logprob=-20.0), make_turn(logprob=-9.0), make_turn(logprob=-0.1))
    assert rollout_metrics(score([unlikely]))["completions/min_logprob_after_tools"] == -9.0


@pytest.mark.parametrize("name", ["mask_truncated", "mask_void_turns"])
def test_07_the_configured_masks_reach_the_loss(name: str) -> None:
    truncated = make_trajectory(make_turn(code="a"), make_turn(), stop=StopReason.TRUNCATED)
    void = make_trajectory(make_turn(code="a"), make_turn(), answer=None)
    whole = make_trajectory(make_turn(code="a"), make_turn())
    group = score([truncated, void, whole])
    masked = {"mask_truncated": 0, "mask_void_turns": 1}[name]
    for switch in (False, True):
        sequences = to_sequences(group, **{**UNMASKED, name: switch})
        assert [any(sequence.loss_mask) for sequence in sequences] == [not switch or i != masked for i in range(3)]


def test_08_metrics_show_the_death_spirals() -> None:
    right = make_trajectory(make_turn(3, code="a", logprob=-0.5), make_turn(1, logprob=-2.5), outcome=1.0)
    wrong = make_trajectory(make_turn(3, logprob=-9.0))
    metrics = rollout_metrics(score([right, wrong]))
    assert metrics["completions/correct_logprob"] == -1.0  # a mean over tokens of correct trajectories only
    assert metrics["tools/call_frequency"] == 0.5 and metrics["tools/calls_per_task"] == 0.5


def test_09_one_temperature_and_the_whole_distribution(policy: Policy) -> None:
    batch = pack([make_sequence([5, 6, 7, 8])])
    hidden, head = policy.hidden_states(batch).detach(), policy.head.weight.detach() * 20
    uniforms = torch.tensor([0.1, 0.5, 0.9]).double()
    tokens, sampled = sample_tokens(hidden @ head.T, uniforms, temperature=0.5)
    same = linear_token_logprobs(hidden, head, tokens, temperature=0.5).logprobs
    torch.testing.assert_close(sampled, same, atol=1e-5, rtol=1e-5)
    assert (sampled - linear_token_logprobs(hidden, head, tokens).logprobs).abs().max() > 1e-2
    with pytest.raises(ValueError, match=r"unknown config key 'rollout\.top_p'"):
        config_from_dict({"rollout": {"top_p": 0.9}})


def test_10_advantages_are_computed_once_and_travel() -> None:
    group = [
        make_trajectory(make_turn(code="a"), make_turn(code="b"), outcome=1.0, sample=0),
        make_trajectory(make_turn(code="c"), make_turn(code="d"), make_turn(code="e"), sample=1),
        make_trajectory(make_turn(code="f"), outcome=1.0, sample=2),
    ]
    credit = credit_of(group)
    sequences = to_sequences(score(group), **UNMASKED)
    for number, (trajectory, sequence) in enumerate(zip(group, sequences, strict=True)):
        of_turns = [0.0, *credit[number].advantages]
        assert sequence.advantages == [of_turns[turn + 1] for turn in trajectory.turn_index_of_tokens()]
    whole = pack(sequences[::-1]).advantages
    micro_batches = [pack(part) for part in split_by_tokens(sequences[::-1], max_tokens=8)]
    assert len(micro_batches) > 1 and torch.equal(torch.cat([batch.advantages for batch in micro_batches]), whole)
    # computed over a micro-batch alone they would be others
    assert credit_of(group[:2])[0].advantages[0] != pytest.approx(credit[0].advantages[0], abs=1e-2)


def test_11_long_trajectories_are_not_rejected() -> None:
    # the product of these ratios is e^10, far outside the clip range; token by token none is clipped
    old = torch.full((1000,), -1.0)
    for advantage in (1.0, -1.0):
        logprobs = (old + 0.01).requires_grad_()
        loss, metrics = clipped_loss(logprobs, torch.full((1000,), advantage), old_logprobs=old)
        loss.backward()
        assert metrics.clip_high_fraction.item() == metrics.clip_low_fraction.item() == 0.0
        torch.testing.assert_close(logprobs.grad, torch.full((1000,), -advantage * math.exp(0.01) / 1000))


def test_12_statistics_at_their_edges() -> None:
    (alone,) = credit_of([make_trajectory(make_turn(code="a"), outcome=1.0)])
    assert alone.advantages == [0.0]
    equal = [make_trajectory(make_turn(code="a"), outcome=0.9, sample=i) for i in range(7)]
    assert [credit.advantages for credit in credit_of(equal)] == [[0.0]] * 7
    pair = [make_trajectory(make_turn(code="a"), outcome=float(i)) for i in range(2)]
    plain = RewardRule(similarity_alpha=0.0)
    for ddof, expected in ((1, 0.5 / 0.5**0.5), (0, 1.0)):
        _, best = credit_of(pair, Method(plain, CreditSum((Term(ddof=ddof),))))
        assert best.advantages == pytest.approx([expected], abs=1e-5)
    _, damped = credit_of(pair, Method(plain, CreditSum((Term(ddof=0, eps=0.5),))))
    assert damped.advantages == pytest.approx([0.5])
    ids = torch.tensor([0, 0])
    with pytest.raises(ValueError, match="turn_rewards must be finite"):
        turn_advantages(torch.tensor([0.0, math.nan]), torch.tensor([0, 1, 2]), ids, ids)
    with pytest.raises(ValueError, match=r"outcome of trajectory 0 .* must be in \[0, 1\], got nan"):
        turn_rewards([make_trajectory(make_turn(), outcome=math.nan)], GTPO.reward)


def test_13_a_lost_trajectory_leaves_its_group() -> None:
    group = [
        make_trajectory(make_turn(code="a"), outcome=1.0, sample=0),
        make_trajectory(make_turn(code="b", status=ToolStatus.INFRA_ERROR), sample=1, stop=StopReason.LOST),
        make_trajectory(make_turn(code="c"), outcome=0.0, sample=2),
    ]
    # it cannot be scored as a 0 by accident
    with pytest.raises(ValueError, match="trajectory 1 of task 't' is lost"):
        turn_rewards(group, GTPO.reward)
    survivors = [trajectory for trajectory in group if trajectory.stop is not StopReason.LOST]
    assert [trajectory.sample for trajectory in survivors] == [0, 2]
    first, last = credit_of(survivors, Method(RewardRule(similarity_alpha=0.0)))
    # the mean is that of two, 0.5: a third entry of 0 would make it 1/3
    assert first.advantages == pytest.approx([0.5**0.5], abs=1e-5) and last.advantages == pytest.approx(
        [-(0.5**0.5)], abs=1e-5
    )
    evaluation = evaluate_groups([group])
    assert evaluation.success == 0.5 and evaluation.lost == 1
