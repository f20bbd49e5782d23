"""TRL: `GTPOTrainer` is TRL's `GRPOTrainer` with rewards of turns, turn-level credit and the fused loss.

Written against TRL 1.16, whose methods of one leading underscore it overrides; another version that changed them is
refused on import.  Tools, environments, datasets and `GRPOConfig` stay as TRL has them.
"""

import inspect
import math
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import trl
from accelerate.utils import gather_object
from torch import Tensor, nn
from trl import GRPOTrainer
from trl.trainer.utils import is_async_callable

from gtpo.adapters.options import credit_settings
from gtpo.adapters.trl_loss import (
    add_fused_loss,
    fused_arguments,
    log_loss,
    refuse_other_logits,
    refuse_other_losses,
)
from gtpo.adapters.trl_turns import (
    ScoredRow,
    check_turns,
    group_advantages,
    messages_of_turns,
    options_of_batch,
)
from gtpo.adapters.turn_lists import advantages_by_token, padded, padded_turn_ids, turn_lengths

HOOKS = {
    "_generate": ("prompts",),
    "_calculate_rewards": ("inputs", "prompts", "completions", "completion_ids_list"),
    "_generate_and_score_completions": ("inputs",),
    "_compute_loss": ("model", "inputs"),
}


def check_hooks(trainer: type = GRPOTrainer) -> None:
    """Refuse a TRL whose methods that `GTPOTrainer` overrides are gone or take other arguments."""
    for name, expected in HOOKS.items():
        method = getattr(trainer, name, None)
        found = None if method is None else tuple(inspect.signature(method).parameters)[1:]
        if found != expected:
            has = "is gone" if found is None else f"takes {found}, not {expected}"
            raise ImportError(
                f"gtpo.adapters.trl overrides {trainer.__name__}.{name}, which {has} in TRL {trl.__version__}"
            )


check_hooks()


class Rollout(NamedTuple):
    """Of the last generation: the turn of each id, [B, T], the tokens of each turn, and TRL's completions."""

    turn_ids: Tensor
    num_tokens: list[list[int]]
    completions: list[Any]


class GTPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` with turn-level credit.

    A reward function may return, for each completion, a float, or a list with one float for each of its assistant
    messages (its turns), or None.  A float is paid on the last turn.  All are added, weighted by `reward_weights`.

    credit: options of `gtpo.adapters.layouts`; left out, GTPO's.  `gtpo.adapters.layouts.GRPO` with
        `eps=1e-4` gives TRL's own advantages.  `scale_rewards` and `multi_objective_aggregation` are TRL's and unused.
        A `method` names a credit only: the loss stands in `GRPOConfig`, see `gtpo.adapters.trl_loss.loss_arguments`.
        Where a credit asks for them, outcomes are the rewards that came as floats, and the states of turns and their
        calls are read from the messages.
    fused_loss: `linear_gtpo_loss` inside the model's forward pass, for the loss types of
        `gtpo.adapters.trl_loss.FUSED_LOSS_TYPES`, with KL term, entropy bonus, two-sided clip and the ratio of a
        sequence; what it does not cover is refused by name.  False takes TRL's own loss.
    Everything else: as for `trl.GRPOTrainer`.
    Raises ValueError for options that are no credit, and for those that the fused loss does not compute.
    Source: arXiv 2511.14846.
    """

    reward_funcs: list[Any]
    _tag_names = ("trl", "gtpo")
    _name = "GTPO"
    _paper = types.MappingProxyType(
        {
            "title": "Group Turn Policy Optimization for Multi-Turn Tool-Integrated Reasoning",
            "id": "2511.14846",
        }
    )

    def __init__(self, *args: Any, credit: Mapping[str, Any] | None = None, fused_loss: bool = True, **kwargs: Any):
        self.credit = dict(credit or {})
        self._needs = credit_settings(self.credit, given=("outcomes", "anchor_ids", "turns_with_calls")).needs
        super().__init__(*args, **kwargs)
        self.fused_loss = fused_loss
        if fused_loss:
            refuse_other_losses(self, self._base_model())
            refuse_other_logits(self._base_model())
            add_fused_loss(self._base_model(), cast_head=self.args.cast_lm_head_to_fp32)
        self._rollout: Rollout | None = None
        self._row_rewards: Tensor | None = None
        self._turn_rewards: dict[tuple[int, int], list[float]] = {}
        self.reward_funcs = [self._with_turns(index, func) for index, func in enumerate(self.reward_funcs)]

    # rewards of turns

    def _with_turns(self, index: int, func: Any) -> Any:
        """`func`, whose lists of turn rewards are kept aside while TRL is given their sums."""
        if isinstance(func, nn.Module):
            return func
        if is_async_callable(func):

            async def scored_async(**kwargs: Any) -> list[float | None]:
                return self._keep_turns(index, await func(**kwargs))

            return scored_async
        return lambda **kwargs: self._keep_turns(index, func(**kwargs))

    def _keep_turns(self, index: int, rewards: Any) -> list[float | None]:
        """rewards: an entry a completion, each a number, None, or those of its turns; tensors and arrays too."""
        totals: list[float | None] = []
        for row, of_row in enumerate(rewards):
            value = of_row.tolist() if hasattr(of_row, "tolist") else of_row
            if isinstance(value, list | tuple):
                turns = [float(reward) for reward in value]
                if not all(map(math.isfinite, turns)):
                    raise ValueError(
                        f"{self.reward_func_names[index]} must return finite rewards of turns, completion {row} has "
                        f"{turns}: None for the completion says that the function does not apply"
                    )
                self._turn_rewards[row, index] = turns
                value = sum(turns)
            totals.append(value)
        return totals

    def _generate(self, prompts: list[Any]) -> Any:
        output = super()._generate(prompts)
        _, completion_ids, sampled, completions, _, extra_fields, *_ = output
        # from the lists: TRL's tensors lose the turns of truncated completions that are masked
        turn_ids = _turn_ids(completion_ids, sampled, extra_fields.get("turn_ids"))
        self._rollout = Rollout(turn_ids, turn_lengths(turn_ids), completions)
        if self.tools:
            check_turns([len(counts) for counts in self._rollout.num_tokens], completions)
        return output

    def _calculate_rewards(
        self, inputs: list[Any], prompts: list[Any], completions: list[Any], completion_ids_list: list[list[int]]
    ) -> Tensor:
        self._turn_rewards.clear()
        self._row_rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return self._row_rewards

    def _scored_rows(self) -> list[ScoredRow]:
        """The rows of this rank, in the order of generation."""
        assert self._rollout is not None and self._row_rewards is not None
        num_rows = len(self._rollout.num_tokens)
        first = self.accelerator.process_index * num_rows
        by_func = self._row_rewards[first : first + num_rows].tolist()
        weights = self.reward_weights.tolist()
        asks_for_messages = self._needs & {"anchor_ids", "turns_with_calls"}
        rows = []
        for row, num_tokens in enumerate(self._rollout.num_tokens):
            num_turns = len(num_tokens)
            rewards: list[float] | None = None
            outcome = 0.0
            for index, (value, weight) in enumerate(zip(by_func[row], weights, strict=True)):
                if value != value:  # NaN: this function does not apply
                    continue
                rewards = rewards or [0.0] * num_turns
                turns = self._turn_rewards.get((row, index))
                if turns is None:
                    outcome += weight * value
                    turns = [0.0] * (num_turns - 1) + [value]
                if len(turns) != num_turns:
                    raise ValueError(
                        f"{self.reward_func_names[index]} must return one reward for each turn, or a float: completion "
                        f"{row} has {num_turns} turns, got {len(turns)} rewards"
                    )
                rewards = [total + weight * reward for total, reward in zip(rewards, turns, strict=True)]
            messages = messages_of_turns(self._rollout.completions[row], num_turns) if asks_for_messages else None
            rows.append(ScoredRow(rewards, num_tokens, outcome, messages))
        return rows

    # credit

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        assert self._rollout is not None
        mode = "train" if self.model.training else "eval"
        local = self._scored_rows()
        # a group may be split over ranks, and its statistics are those of all its rows
        rows = gather_object(local)
        advantages = group_advantages(
            rows,
            self.num_generations if mode == "train" else self.num_generations_eval,
            {**self.credit, **options_of_batch(rows, self._needs)},
        )
        first = self.accelerator.process_index * len(local)
        turn_ids, ids = self._rollout.turn_ids, output["completion_ids"]
        turn_ids = nn.functional.pad(turn_ids, (0, ids.shape[1] - turn_ids.shape[1]), value=-1)
        by_token = advantages_by_token(advantages[first : first + len(local)], turn_ids)
        output["advantages"] = by_token.to(ids.device)
        self._log_turns(mode, rows, advantages)
        return output

    def _log_turns(self, mode: str, rows: list[ScoredRow], advantages: list[list[float]]) -> None:
        turns = [len(row.num_tokens) for row in rows]
        rewards = [reward for row in rows for reward in row.turn_rewards or ()]
        metrics = self._metrics[mode]
        metrics["turns/mean"].append(sum(turns) / max(len(turns), 1))
        metrics["turns/max"].append(float(max(turns, default=0)))
        metrics["turn_reward/mean"].append(sum(rewards) / max(len(rewards), 1))
        # TRL's own column would show an advantage that nothing is trained on
        logged = self._logs["advantages"]
        for _ in range(min(len(rows), len(logged))):
            logged.pop()
        logged.extend(
            sum(a * n for a, n in zip(values, row.num_tokens, strict=True)) / max(sum(row.num_tokens), 1)
            for values, row in zip(advantages, rows, strict=True)
        )
        self._logs["extra"]["turn_rewards"].extend(row.turn_rewards for row in rows)
        self._logs["extra"]["turn_advantages"].extend(advantages)

    # loss

    def _base_model(self) -> Any:
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if not self.fused_loss:
            loss: Tensor = super()._compute_loss(model, inputs)
            return loss
        with self.accelerator.autocast():
            result = model(
                input_ids=torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
                attention_mask=torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
                gtpo_loss=fused_arguments(self, inputs),
            )
        log_loss(self, result)
        fused: Tensor = result.loss
        return fused


def _turn_ids(
    completion_ids: Sequence[Sequence[int]],
    sampled: Sequence[Sequence[int]] | None,
    given: Sequence[Sequence[int]] | None,
) -> Tensor:
    """[B, longest]: the turn of each id, -1 for tool output and padding.

    sampled: 1 for sampled ids; TRL puts the template's tokens of a tool message between two turns, so they never touch.
    given: the turns themselves, as a `rollout_func` may return them.
    """
    lengths = [len(ids) for ids in completion_ids]
    for name, rows in (("turn_ids", given), ("env_mask", sampled)):
        if rows is not None and [len(row) for row in rows] != lengths:
            raise ValueError(f"{name} must have one entry for each id of each completion, got other lengths")
    if given is not None:
        return padded(given)
    return padded_turn_ids([[1] * n for n in lengths] if sampled is None else sampled, name="env_mask")
