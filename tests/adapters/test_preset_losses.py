"""The loss of every preset against verl's formulas with numbers stated apart; foreign/test_verl_losses.py runs verl."""

import pytest
import torch

from gtpo.methods import METHODS
from tests.adapters.test_verl_losses import mean_of, of_tokens
from tests.adapters.verl_losses import CONFIG, assert_same, ragged
from tests.adapters.verl_presets import PRESETS, moved, preset_loss


def test_only_losses_that_verl_has_not_are_left_out() -> None:
    other = {name for name, method in METHODS.items() if method.loss.surrogate in ("sapo", "vespo", "dppo", "ipo")}
    assert METHODS.keys() - PRESETS.keys() == other


@pytest.mark.parametrize("name", PRESETS)
def test_the_loss_of_a_preset_is_that_of_verl(name: str) -> None:
    of_verl = PRESETS[name]
    for seed in range(30):
        rows = moved(ragged(seed))
        leaf = torch.stack([rows.logprobs, -rows.ref_logprobs]).requires_grad_()
        by_token = of_tokens(of_verl.name, leaf[0], rows, CONFIG | of_verl.config)
        if of_verl.penalty is not None:
            x = rows.ref_logprobs - leaf[0]
            estimate = {"mse": x.square() / 2, "low_var_kl": x.exp() - x - 1}[of_verl.penalty[0]]
            by_token = by_token + of_verl.penalty[1] * estimate
        loss = mean_of(by_token - of_verl.entropy * leaf[1], rows.mask, of_verl.mean)
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert_same(preset_loss(METHODS[name].loss, rows), (loss.detach(), gradient))
