"""TRL: `GTPOTrainer` is TRL's `GRPOTrainer` with rewards of turns, turn-level credit and the fused loss.

Written against TRL 1.16, whose methods of one leading underscore it overrides; another version that changed them is
refused on import.  Tools, environments, datasets and `GRPOConfig` stay as TRL has them.
"""

import functools
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import trl
from accelerate.utils import gather_object
from torch import Tensor, nn
from trl import GRPOTrainer
from trl.trainer.utils import is_async_callable

from gtpo.adapters.layouts import list_turn_advantages
from gtpo_kernels import linear_gtpo_loss
from gtpo_kernels.clipped_loss.reference import ClippedLoss

HOOKS = {
    "_generate": ("prompts",),
    "_calculate_rewards": ("inputs", "prompts", "completions", "completion_ids_list"),
    "_generate_and_score_completions": ("inputs",),
    "_compute_loss": ("model", "inputs"),
}
FUSED_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")
LOGIT_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


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


class ScoredRow(NamedTuple):
    """One completion: the reward of each of its turns (None: no reward function applied), and their token counts."""

    turn_rewards: list[float] | None
    num_tokens: list[int]


class Rollout(NamedTuple):
    """Of the last generation, one entry a completion: the turn that sampled each of its ids, and how many there are."""

    turn_ids: list[list[int]]
    num_turns: list[int]


class FusedLoss(NamedTuple):
    """What the model's forward needs to return the loss.  [B, T] each, at the place of the token that is predicted."""

    targets: Tensor
    advantages: Tensor
    loss_mask: Tensor
    old_logprobs: Tensor | None
    options: dict[str, Any]


class GTPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` with turn-level credit.

    A reward function may return, for each completion, a float, or a list with one float for each of its assistant
    messages (its turns), or None.  A float is paid on the last turn.  All are added, weighted by `reward_weights`.

    credit: keywords of `gtpo_kernels.turn_advantages`; left out, GTPO's.  `gtpo.adapters.layouts.GRPO` with
        `eps=1e-4` gives TRL's own advantages.  `scale_rewards` and `multi_objective_aggregation` are TRL's and unused.
    fused_loss: `linear_gtpo_loss` inside the model's forward pass, for loss_type grpo, bnpo, dr_grpo and dapo, and
        without KL term, entropy bonus and the like, which are refused by name; False takes TRL's own loss.
    Everything else: as for `trl.GRPOTrainer`.
    Raises ValueError for options that the fused loss does not compute.
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
        super().__init__(*args, **kwargs)
        self.credit = dict(credit or {})
        self.fused_loss = fused_loss
        if fused_loss:
            self._refuse_other_losses()
            _add_fused_loss(self._base_model(), cast_head=self.args.cast_lm_head_to_fp32)
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

    def _keep_turns(self, index: int, rewards: Sequence[Any]) -> list[float | None]:
        totals = list(rewards)
        for row, value in enumerate(totals):
            if isinstance(value, list | tuple | Tensor):
                self._turn_rewards[row, index] = [float(reward) for reward in value]
                totals[row] = sum(self._turn_rewards[row, index])
        return totals

    def _generate(self, prompts: list[Any]) -> Any:
        output = super()._generate(prompts)
        _, completion_ids, sampled, completions, _, extra_fields, *_ = output
        turn_ids = extra_fields.get("turn_ids") or _turn_ids(completion_ids, sampled)
        self._rollout = Rollout(turn_ids, [1 + max(ids, default=-1) for ids in turn_ids])
        if self.tools:
            _check_turns(self._rollout.num_turns, completions)
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
        num_rows = len(self._rollout.num_turns)
        first = self.accelerator.process_index * num_rows
        by_func = self._row_rewards[first : first + num_rows].tolist()
        weights = self.reward_weights.tolist()
        rows = []
        for row, (num_turns, turn_ids) in enumerate(zip(self._rollout.num_turns, self._rollout.turn_ids, strict=True)):
            rewards: list[float] | None = None
            for index, (value, weight) in enumerate(zip(by_func[row], weights, strict=True)):
                if value != value:  # NaN: this function does not apply
                    continue
                rewards = rewards or [0.0] * num_turns
                turns = self._turn_rewards.get((row, index), [0.0] * (num_turns - 1) + [value])
                if len(turns) != num_turns:
                    raise ValueError(
                        f"{self.reward_func_names[index]} must return one reward for each turn, or a float: completion "
                        f"{row} has {num_turns} turns, got {len(turns)} rewards"
                    )
                rewards = [total + weight * reward for total, reward in zip(rewards, turns, strict=True)]
            rows.append(ScoredRow(rewards, [turn_ids.count(turn) for turn in range(num_turns)]))
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
            rows, self.num_generations if mode == "train" else self.num_generations_eval, self.credit
        )
        first = self.accelerator.process_index * len(local)
        output["advantages"] = advantages_by_token(
            advantages[first : first + len(local)], self._rollout.turn_ids, output["completion_ids"]
        )
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

    def _refuse_other_losses(self) -> None:
        config = self._base_model().config.get_text_config()
        scale = next((name for name in LOGIT_SCALES if getattr(config, name, None) not in (None, 1.0)), None)
        refused = {
            f"loss_type={self.loss_type!r}": self.loss_type not in FUSED_LOSS_TYPES,
            f"importance_sampling_level={self.importance_sampling_level!r}": self.importance_sampling_level != "token",
            f"beta={self.beta}": self.beta != 0.0,
            f"delta={self.args.delta}": self.args.delta is not None,
            f"top_entropy_quantile={self.top_entropy_quantile}": self.top_entropy_quantile < 1.0,
            "an entropy bonus": self._entropy_bonus_enabled,
            "off_policy_mask_threshold": self.off_policy_mask_threshold is not None,
            "a router loss (router_aux_loss_coef)": self.aux_loss_enabled,
            "a vision model": self._is_vlm,
            f"a model with {scale}": scale is not None,
            "DeepSpeed": self.is_deepspeed_enabled,
        }
        found = [name for name, holds in refused.items() if holds]
        if found:
            raise ValueError(
                f"fused_loss=True does not cover {', '.join(found)}: pass fused_loss=False for TRL's own loss"
            )

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if not self.fused_loss:
            loss: Tensor = super()._compute_loss(model, inputs)
            return loss
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        advantages = inputs["advantages"]
        if "importance_sampling_ratio" in inputs:  # of vLLM's log-probs: a positive weight of the token's loss
            advantages = advantages * inputs["importance_sampling_ratio"]
        if self.loss_type == "grpo":  # the mean over a completion is a weight of its tokens, too
            advantages = advantages / (mask.sum(dim=1, keepdim=True).clamp(min=1) * len(mask))
        fused = FusedLoss(
            inputs["completion_ids"],
            advantages,
            mask.bool(),
            inputs.get("old_per_token_logps"),
            {
                "temperature": self.temperature,
                "clip_low": self.epsilon_low,
                "clip_high": self.epsilon_high,
                "num_loss_tokens": self._num_loss_tokens(mask, inputs["num_items_in_batch"]),
                "metrics": "all",
            },
        )
        with self.accelerator.autocast():
            result = model(
                input_ids=torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
                attention_mask=torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
                gtpo_loss=fused,
            )
        self._log_loss(result)
        return result.loss

    def _num_loss_tokens(self, mask: Tensor, num_items_in_batch: Tensor) -> Tensor | float:
        """What TRL divides the sum over tokens by, for each of its loss types."""
        training = self.model.training
        accumulated = self.current_gradient_accumulation_steps if training else 1.0
        if self.loss_type == "dapo":
            share = accumulated / self.args.steps_per_generation if training else 1.0
            return num_items_in_batch.clamp(min=1.0) / self.accelerator.num_processes * share
        if self.loss_type == "bnpo":
            return mask.sum().clamp(min=1.0) * accumulated
        if self.loss_type == "dr_grpo":
            return float(len(mask) * self.max_completion_length * accumulated)
        return float(accumulated)

    def _log_loss(self, result: ClippedLoss) -> None:
        """TRL's metrics of the same names, over the loss tokens of all ranks."""
        seen = result.metrics
        assert seen.entropy is not None
        count = (seen.num_active_tokens - seen.nonfinite_tokens).float()
        sums = (
            torch.stack([seen.entropy, seen.clip_low_fraction, seen.clip_high_fraction, torch.ones_like(count)]) * count
        )
        totals = self.accelerator.reduce(sums.detach(), reduction="sum").tolist()
        entropy, low, high = (total / max(totals[-1], 1.0) for total in totals[:-1])
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["entropy"].append(entropy)
        metrics["clip_ratio/low_mean"].append(low)
        metrics["clip_ratio/high_mean"].append(high)
        metrics["clip_ratio/region_mean"].append(low + high)


def group_advantages(rows: Sequence[ScoredRow], group_size: int, credit: Mapping[str, Any]) -> list[list[float]]:
    """Advantages of the turns of each row.  rows: of all ranks, whole groups of `group_size` one after another.

    A row that no reward function scored has advantages 0 and leaves the statistics of its group.

    >>> rows = [ScoredRow([0.0, 1.0], [2, 1]), ScoredRow([0.0], [3]), ScoredRow(None, [1])]
    >>> [[round(a, 3) for a in row] for row in group_advantages(rows, 3, {"gamma": 1.0})]
    [[0.577, 0.577], [-1.155], [0.0]]
    """
    if len(rows) % group_size:
        raise ValueError(f"there must be whole groups of {group_size} rows, got {len(rows)}: were the ranks gathered?")
    scored = [index for index, row in enumerate(rows) if row.turn_rewards is not None]
    advantages = [[0.0] * len(row.num_tokens) for row in rows]
    values = list_turn_advantages(
        [rows[index].turn_rewards or [] for index in scored],
        [index // group_size for index in scored],
        num_tokens=[rows[index].num_tokens for index in scored],
        **credit,
    )
    for index, row in zip(scored, values, strict=True):
        advantages[index] = row
    return advantages


def _turn_ids(completion_ids: Sequence[Sequence[int]], sampled: Sequence[Sequence[int]] | None) -> list[list[int]]:
    """The turn of each id, -1 for tool output, from TRL's lists before they are padded.

    sampled: 1 for sampled ids; TRL puts the template's tokens of a tool message between two turns, so they never touch.
    """
    turn_ids = []
    for row, ids in enumerate(completion_ids):
        turns, last, before = [], -1, 0
        for now in [1] * len(ids) if sampled is None else sampled[row]:
            last += bool(now) and not before
            turns.append(last if now else -1)
            before = now
        turn_ids.append(turns)
    return turn_ids


def _check_turns(num_turns: Sequence[int], completions: Sequence[Any]) -> None:
    """Refuse masks that disagree with the messages: turns that touch would share one advantage in silence."""
    for row, (counted, messages) in enumerate(zip(num_turns, completions, strict=True)):
        if isinstance(messages, str):
            continue
        written = sum(message["role"] == "assistant" for message in messages)
        if counted != written:
            raise RuntimeError(
                f"completion {row} has {written} assistant messages, but its tool mask shows {counted} turns: does the "
                "chat template render tool messages?"
            )


def advantages_by_token(advantages: list[list[float]], turn_ids: list[list[int]], like: Tensor) -> Tensor:
    """[B, T] float32: the advantage of each token's turn, 0 for tool output and padding."""
    values = torch.zeros(like.shape, dtype=torch.float32)
    for row, (by_turn, turns) in enumerate(zip(advantages, turn_ids, strict=True)):
        looked_up = torch.tensor([*by_turn, 0.0])  # which the index -1 finds
        values[row, : len(turns)] = looked_up[torch.tensor(turns, dtype=torch.long)]
    return values.to(like.device)


def _whole(parameter: Any) -> Tensor:
    """The parameter itself; under FSDP2, where it is a DTensor, gathered."""
    whole: Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return whole


def _add_fused_loss(model: Any, *, cast_head: bool) -> None:
    """Let `model(..., gtpo_loss=FusedLoss)` return the loss.

    Inside forward, since wrappers (DDP, FSDP) gather parameters and reduce gradients around forward only.
    """
    original: Callable[..., Any] = model.forward
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)

    @functools.wraps(type(model).forward)  # `generate` looks at the signature
    def forward(self: Any, *args: Any, gtpo_loss: FusedLoss | None = None, **kwargs: Any) -> Any:
        if gtpo_loss is None:
            return original(*args, **kwargs)
        kwargs["use_cache"] = False
        hidden = self.base_model(*args, **kwargs).last_hidden_state
        head = self.get_output_embeddings()
        weight, bias = _whole(head.weight), None if head.bias is None else _whole(head.bias)
        device_type = hidden.device.type
        mixed = torch.is_autocast_enabled(device_type) and not cast_head
        dtype = torch.get_autocast_dtype(device_type) if mixed else weight.dtype
        length = gtpo_loss.targets.shape[1]
        return linear_gtpo_loss(
            hidden[:, -length - 1 : -1].reshape(-1, hidden.shape[-1]).to(dtype),
            weight.to(dtype),
            gtpo_loss.targets.reshape(-1),
            gtpo_loss.advantages.reshape(-1),
            bias=None if bias is None else bias.to(dtype),
            loss_mask=gtpo_loss.loss_mask.reshape(-1),
            old_logprobs=None if gtpo_loss.old_logprobs is None else gtpo_loss.old_logprobs.reshape(-1),
            softcap=softcap,
            **gtpo_loss.options,
        )

    model.forward = types.MethodType(forward, model)
