"""Settings reach the place that they are meant for, and records keep what went into them."""

import asyncio
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from gtpo.assembly import make_chat, make_mixture, make_sampler
from gtpo.batch import pack
from gtpo.config import METHODS, SftConfig, config_from_dict
from gtpo.credit import assign_credit
from gtpo.finite import NonFiniteLoss
from gtpo.metrics import turn_rows, update_metrics
from gtpo.policy import Policy
from gtpo.rewards import turn_rewards
from gtpo.rollout import Rollout
from gtpo.run_folder import read_rows
from gtpo.sft import run_sft, to_demonstration_sequence
from gtpo.tools import RunTools, ToolSet
from gtpo_kernels import LossMetrics
from tests.trainer.conftest import make_sequence, make_trajectory, make_turn, tiny_policy
from tests.trainer.test_trainer import make_trainer, random_sequences


def test_each_clip_bound_stands_on_its_side(tmp_path: Path) -> None:
    with make_trainer(tmp_path, "--loss.clip_low", "0.1", "--loss.clip_high", "0.5") as trainer:
        batch = pack([make_sequence([5, 6, 7, 8, 9])])
        now = trainer.learner.with_old_logprobs(batch).old_logprobs
        assert now is not None
        off_policy = dataclasses.replace(
            batch,
            advantages=torch.tensor([1.0, 1.0, -1.0, -1.0]),
            old_logprobs=now - torch.tensor([1.3, 1.6, 0.95, 0.8]).log(),
        )
        loss, metrics, _ = trainer.learner.accumulate_gradient(off_policy, num_loss_tokens=4)
    # only 1.6 and 0.8 are outside [0.9, 1.5]
    assert loss == pytest.approx(-(1.3 + 1.5 - 0.95 - 0.9) / 4, abs=1e-5)
    assert float(metrics.clip_low_fraction) == float(metrics.clip_high_fraction) == 0.25


def test_weight_decay_shrinks_what_has_no_gradient(tmp_path: Path) -> None:
    with make_trainer(tmp_path, "--train.weight_decay", "0.5") as trainer:
        groups = trainer.learner.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.5]


def test_the_gradients_of_the_warm_up_are_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, norms = tiny_policy(), []

    class Recorded(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            norms.append(float(torch.stack([p.grad.norm() for p in self.param_groups[0]["params"]]).norm()))

    optimizer = Recorded(policy.trainable().values(), lr=1.0)
    monkeypatch.setattr("gtpo.sft.make_optimizers", lambda policy, kind: [optimizer])
    demonstration = to_demonstration_sequence(make_trajectory(make_turn(5)))
    for max_grad_norm in (1e9, 0.01):
        run_sft(
            policy,
            [demonstration],
            config=SftConfig(steps=1),
            seed=0,
            micro_batch_tokens=64,
            max_grad_norm=max_grad_norm,
            on_step=lambda step, loss: None,
        )
    assert norms[0] > 0.1 and norms[1] == pytest.approx(0.01, rel=1e-3)


def test_a_gradient_norm_that_is_not_finite_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a loss can be finite where its gradient is not
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, max_norm: torch.tensor(float("inf")))
    with make_trainer(tmp_path) as trainer:
        kept = trainer.policy.head.weight.detach().clone()
        with pytest.raises(NonFiniteLoss, match=r"loss -?\d.*, gradient norm inf"):
            trainer.update(random_sequences(3), step=0)
        assert torch.equal(trainer.policy.head.weight, kept)


def test_the_last_evaluation_can_be_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with make_trainer(tmp_path, "--sft.steps", "1", "--train.steps", "1") as trainer:
        outcomes = iter([0.1, 0.9])
        plain = trainer.evaluate(step=0)
        monkeypatch.setattr(trainer, "evaluate", lambda step: dataclasses.replace(plain, outcome=next(outcomes)))
        trainer.train()
    assert (tmp_path / "run" / "checkpoints" / "best").resolve().name == "step-000001"


def loss_metrics(**values: float) -> LossMetrics:
    return LossMetrics(*(torch.tensor(values.get(name, 0.0)) for name in LossMetrics._fields))


def test_metrics_are_those_of_all_micro_batches() -> None:
    parts = [
        loss_metrics(entropy=2.0, ratio_max=1.5, num_active_tokens=1, dropped_tokens=2),
        loss_metrics(entropy=4.0, ratio_max=1.2, num_active_tokens=3, dropped_tokens=5),
    ]
    merged = update_metrics(parts, [torch.tensor([0.5]), torch.tensor([0.1, 0.3, 0.1])])
    assert merged["entropy"] == 3.5 and merged["loss/ratio_max"] == 1.5
    assert (merged["loss/num_active_tokens"], merged["loss/dropped_tokens"]) == (4, 7)
    assert merged["sampling/sampling_logp_difference/mean"] == pytest.approx(0.25)
    assert merged["sampling/sampling_logp_difference/max"] == 0.5
    assert update_metrics([], []) == {}


def test_a_turn_row_has_the_expected_and_the_given_answer() -> None:
    group = [make_trajectory(make_turn(code="a"), make_turn(), answer=answer) for answer in ("5", None)]
    rewards = [turn_rewards(group, METHODS["gtpo"].reward)]
    rows = list(turn_rows(1, assign_credit([group], rewards, METHODS["gtpo"].credit)))
    assert [(row["expected_answer"], row["given_answer"]) for row in rows] == [("4", "5")] * 2 + [("4", None)] * 2


def test_the_guide_names_every_metric_and_every_column(tmp_path: Path) -> None:
    terms = ("--loss.kl", "k3", "--loss.kl_coef", "0.1", "--loss.dual_clip", "3")
    with make_trainer(tmp_path, "--sft.steps", "0", "--train.updates_per_rollout", "2", *terms) as trainer:
        trainer.learner.keep_reference()
        trainer.evaluate(step=0)
        trainer.step(0)
    evaluation, row = read_rows(tmp_path / "run" / "metrics.jsonl")
    turn = read_rows(tmp_path / "run" / "turns.jsonl")[0]
    guide = (Path(__file__).parents[2] / "docs" / "run_folder.md").read_text()
    parts = re.split("Rows of phase .*|## turns.jsonl", guide)[1:]
    for part, written in zip(parts, (evaluation, row, turn), strict=True):
        first_cells = "".join(line.split("|")[1] for line in part.splitlines() if line.startswith("|"))
        assert set(re.findall("`([^`]+)`", first_cells)) == written.keys() - {"phase"}
    assert 0 < row["sampling/sampling_logp_difference/mean"] <= row["sampling/sampling_logp_difference/max"] < 1e-4


def test_a_task_that_one_environment_holds_out_and_another_trains_on_is_refused(tmp_path: Path) -> None:
    for name, first in (("a", 0), ("b", 4)):
        rows = [{"prompt": f"{n} + 0?", "answer": n} for n in range(first, first + 4)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tables = ", ".join(
        f'{{name = "jsonl", options = {{path = "{tmp_path}/{train}.jsonl", eval_path = "{tmp_path}/{held_out}.jsonl", '
        f'name = "{train}"}}}}'
        for train, held_out in ("ab", "ba")
    )
    with pytest.raises(
        ValueError, match=r"train on no task that is held out .*, got \d, the first is [ab]-train-0-\d: '\d"
    ):
        make_trainer(tmp_path, "--environments", f"[{tables}]", "--sft.steps", "0")


def test_the_ids_of_the_generation_config_end_a_turn_too(tmp_path: Path) -> None:
    other = 7
    with make_trainer(tmp_path) as trainer:
        trainer.policy.model.generation_config.eos_token_id = [trainer.chat.end_of_turn_id, other]
        trainer.chat = make_chat(trainer.policy, trainer.config)
        trainer.sampler = make_sampler(trainer.policy, trainer.chat, trainer.config.rollout)
        trainer.policy.head.weight.data.zero_()
        (group,) = trainer._sample(trainer.train_tasks[:1], group_size=300, temperature=1.0, seed=[0], label="sampling")
    completions = [turn.completion_ids for trajectory in group for turn in trajectory.turns]
    assert {ids[-1] for ids in completions if len(ids) < 32} == {trainer.chat.end_of_turn_id, other}
    assert all(other not in ids[:-1] for ids in completions)


@pytest.mark.parametrize("call_format", ["code", "json"])
def test_the_environment_decides_whether_the_protocol_is_explained(
    policy: Policy, tmp_path: Path, call_format: str
) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n} + 0?", "answer": n}) + "\n" for n in range(5)))
    shown = {}
    for name, options in (("jsonl", {"path": str(path)}), ("retry", {})):
        config = config_from_dict(
            {"environments": [{"name": name, "options": options}], "rollout": {"call_format": call_format}}
        )
        mixture, chat = make_mixture(config), make_chat(policy, config)
        tools = RunTools(ToolSet(config.rollout.tools), call_format=config.rollout.call_format)
        (task,) = mixture.tasks("train", 1, seed=0)
        rollout = Rollout(mixture.of, chat, tools, config.rollout)
        shown[name] = policy.tokenizer.decode(asyncio.run(rollout.prompt_ids(task)))
    assert "Give the result as: answer: ..." in shown["jsonl"]
    assert ("answer: ..." in shown["retry"]) == (call_format == "json")


def test_variables_of_the_chat_template_come_from_the_config() -> None:
    policy = tiny_policy()
    policy.tokenizer.chat_template += "{% if add_generation_prompt and thinking %}<think>\n{% endif %}"
    for raw, opens in (({}, False), ({"chat": {"template_kwargs": {"thinking": True}}}, True)):
        assert make_chat(policy, config_from_dict(raw)).opens_thought is opens
    with pytest.raises(
        ValueError,
        match=r"^chat\.template_kwargs must hold variables of the chat template, got 'think'; did you .* 'thinking'\?$",
    ):
        make_chat(policy, config_from_dict({"chat": {"template_kwargs": {"think": True}}}))
    with pytest.raises(ValueError, match=r"unknown config key 'chat\.kwargs'"):
        config_from_dict({"chat": {"kwargs": {}}})
