"""Our losses against those of the installed verl, value and gradient: 100 random ragged multi-turn batches each."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from verl.trainer.ppo import core_algos

from gtpo.methods import METHODS
from tests.adapters.verl_losses import CONFIG, LOSSES, MEANS, PENALTIES, assert_same, our_loss, our_penalty, ragged
from tests.adapters.verl_presets import PRESETS, moved, preset_loss


class Config(SimpleNamespace):
    def get(self, name: str, default: object = None) -> Any:
        return getattr(self, name, default)


@pytest.mark.parametrize("mean", list(MEANS))
@pytest.mark.parametrize("name", list(LOSSES))
def test_verl(name: str, mean: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # verl asks for its own class, which has dozens of fields that no loss reads
    monkeypatch.setattr(core_algos, "ActorConfig", Config)
    of_verl, ours = LOSSES[name]
    config = Config(**CONFIG | of_verl, global_batch_info={})
    for seed in range(100):
        rows = ragged(seed)
        leaf = rows.logprobs.clone().requires_grad_()
        loss, _ = core_algos.get_policy_loss_fn(name)(
            old_log_prob=rows.old_logprobs,
            log_prob=leaf,
            advantages=rows.advantages,
            response_mask=rows.mask.to(leaf.dtype),
            loss_agg_mode=mean,
            config=config,
        )
        assert_same(our_loss(rows, mean, **ours), (loss.detach(), torch.autograd.grad(loss, leaf)[0]))


@pytest.mark.parametrize("penalty", list(PENALTIES))
def test_verl_penalties(penalty: str) -> None:
    for seed in range(100):
        rows = ragged(seed)
        leaf = rows.logprobs.clone().requires_grad_()
        by_token = core_algos.kl_penalty(leaf, rows.ref_logprobs, penalty)
        loss = core_algos.agg_loss(by_token, rows.mask.to(leaf.dtype), "token-mean")
        assert_same(our_penalty(rows, PENALTIES[penalty]), (loss.detach(), torch.autograd.grad(loss, leaf)[0]))


@pytest.mark.parametrize("name", PRESETS)
def test_the_loss_of_a_preset_is_that_of_verl(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As verl's actor adds it up: the policy's loss, less the entropy bonus, plus the KL term, in one mean each."""
    monkeypatch.setattr(core_algos, "ActorConfig", Config)
    of_verl = PRESETS[name]
    config = Config(**CONFIG | of_verl.config, global_batch_info={})
    for seed in range(100):
        rows = moved(ragged(seed))
        leaf = torch.stack([rows.logprobs, -rows.ref_logprobs]).requires_grad_()
        mask = rows.mask.to(leaf.dtype)
        loss, _ = core_algos.get_policy_loss_fn(of_verl.name)(
            old_log_prob=rows.old_logprobs,
            log_prob=leaf[0],
            advantages=rows.advantages,
            response_mask=mask,
            loss_agg_mode=of_verl.mean,
            config=config,
        )
        loss = loss - of_verl.entropy * core_algos.agg_loss(leaf[1], mask, of_verl.mean)
        if of_verl.penalty is not None:
            by_token = core_algos.kl_penalty(leaf[0], rows.ref_logprobs, of_verl.penalty[0])
            loss = loss + of_verl.penalty[1] * core_algos.agg_loss(by_token, mask, of_verl.mean)
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert_same(preset_loss(METHODS[name].loss, rows), (loss.detach(), gradient))
