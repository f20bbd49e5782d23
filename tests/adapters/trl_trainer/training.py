"""The example's small trainer, and what tests look at in one."""

import io
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

from torch import Tensor

from gtpo.adapters.layouts import GRPO
from tests.adapters.conftest import load_example

example = load_example("trl_turn_rewards")
example_model = example.build_model
TRL_GRPO = {**GRPO, "eps": 1e-4}
BUILT = Callable[..., Any]


def generated(trainer: Any) -> dict[str, Any]:
    """Rollouts of one generation batch, as `_prepare_inputs` gets them before it shuffles."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    batch = next(iter(trainer.get_train_dataloader()))
    return trainer._generate_and_score_completions(batch)


def trained(trainer: Any) -> list[dict[str, float]]:
    with redirect_stdout(io.StringIO()):
        trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


def loss_and_gradients(loss: Tensor, model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def totals(func: Callable[..., Any]) -> Callable[..., list[float]]:
    """The reward function as TRL's own trainer takes it: one number for each trajectory."""

    def total(**kwargs: Any) -> list[float]:
        return [sum(row) if isinstance(row, list) else row for row in func(**kwargs)]

    return total
