"""`make bench-adapters`: advantages through each adapter beside the trainers' own, and a step of TRL with our loss.

The first table computes GRPO, the one credit that all of them know: 4,096 trajectories of 8 turns, one reward at the
end.  The trainers' own lines are restated from their sources, named at each.  The floor writes the result once.

The second table is forward and backward of TRL's `_compute_loss`, one model and one batch, by `GRPOTrainer` and by
`GTPOTrainer`.  The floor is forward and backward of the model without its head.  `use_liger_kernel=True` in TRL 1.16
exchanges layers of the model for Triton kernels, and needs a GPU.
"""

import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import Contestant, Outputs, Row, compare, find, parse_arguments, publish, set_ratios, smoke_run
from gtpo.adapters import nemo_rl, openrlhf, rllm, skyrl, slime, verl
from gtpo.adapters.layouts import GRPO, list_turn_advantages, packed_turn_advantages, padded_turn_advantages
from gtpo_kernels import BackendUnavailable

EPS = 1e-6
GROUP_SIZE, NUM_TURNS = 8, 8
OPTIONS = {**GRPO, "eps": EPS}
FLOOR, STEP_FLOOR = "floor: the result written once", "floor: the model without its head"
VERL, TRL, OPENRLHF, RLLM = "verl's loop (SkyRL's)", "TRL's lines", "OpenRLHF's lines", "rLLM's loop"
OWN = {"verl": VERL, "SkyRL": VERL, "TRL": TRL, "OpenRLHF": OPENRLHF, "rLLM": RLLM}
TRL_STEP, OUR_STEP, LIGER_STEP = "TRL's own loss", "GTPOTrainer", "TRL with use_liger_kernel"


@dataclass(frozen=True)
class Rollout:
    """Trajectories of NUM_TURNS turns, each of `sampled` tokens and as many of tool output after it."""

    outcomes: Tensor
    sampled: int

    @property
    def num_trajectories(self) -> int:
        return len(self.outcomes)

    @cached_property
    def turn_ids(self) -> Tensor:
        turns = torch.arange(NUM_TURNS).repeat_interleave(self.sampled).view(NUM_TURNS, -1)
        row = torch.cat([turns, torch.full_like(turns, -1)], dim=1).flatten()
        return row.expand(self.num_trajectories, -1).contiguous()

    @cached_property
    def mask(self) -> Tensor:
        return (self.turn_ids >= 0).float()

    @cached_property
    def turn_rewards(self) -> Tensor:
        rewards = torch.zeros(self.num_trajectories, NUM_TURNS)
        rewards[:, -1] = self.outcomes
        return rewards

    @cached_property
    def token_rewards(self) -> Tensor:
        rewards = torch.zeros(self.turn_ids.shape)
        rewards[:, -1 - self.sampled] = self.outcomes
        return rewards

    @cached_property
    def groups(self) -> Tensor:
        return torch.arange(self.num_trajectories) // GROUP_SIZE

    @cached_property
    def uids(self) -> np.ndarray:
        return np.array([f"task {group}" for group in self.groups.tolist()], dtype=object)

    @cached_property
    def num_tokens(self) -> list[list[int]]:
        return [[self.sampled] * NUM_TURNS] * self.num_trajectories

    def spread(self, by_trajectory: Tensor) -> Outputs:
        return {"advantages": by_trajectory.float().unsqueeze(1) * self.mask}


def make_rollout(num_trajectories: int, sampled: int) -> Rollout:
    return Rollout(torch.rand(num_trajectories, generator=torch.Generator().manual_seed(0)), sampled)


def exact_outputs(rollout: Rollout) -> Outputs:
    groups = rollout.outcomes.double().view(-1, GROUP_SIZE)
    values = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + EPS)
    return {"advantages": values.flatten().unsqueeze(1) * rollout.mask.double()}


# The trainers' own.  Each call starts from what the trainer holds, and ends with [B, T].


def _verl_own(rollout: Rollout) -> Callable[[], Outputs]:
    """verl 0.9.1, `compute_grpo_outcome_advantage`; SkyRL 0.3.0 has the same."""

    def loop() -> Outputs:
        scores = rollout.token_rewards.sum(dim=-1)
        by_group = defaultdict(list)
        for i in range(len(scores)):
            by_group[rollout.uids[i]].append(scores[i])
        pools = {uid: torch.stack(members) for uid, members in by_group.items()}
        scale = {uid: (pool.mean(), pool.std()) for uid, pool in pools.items()}
        for i in range(len(scores)):
            middle, spread = scale[rollout.uids[i]]
            scores[i] = (scores[i] - middle) / (spread + EPS)
        return rollout.spread(scores)

    return loop


def _trl_own(rollout: Rollout) -> Callable[[], Outputs]:
    """TRL 1.16.0, `_generate_and_score_completions` with scale_rewards="group"; its loss spreads them over tokens."""

    def lines() -> Outputs:
        rewards = rollout.outcomes
        means = torch.nanmean(rewards.view(-1, GROUP_SIZE), dim=1).repeat_interleave(GROUP_SIZE, dim=0)
        stds = rewards.view(-1, GROUP_SIZE).std(dim=1).repeat_interleave(GROUP_SIZE, dim=0)
        return rollout.spread((rewards - means) / (stds + EPS))

    return lines


def _openrlhf_own(rollout: Rollout) -> Callable[[], Outputs]:
    """OpenRLHF 0.11.2, `compute_advantages_and_returns` with group_norm, then `get_cumulative_returns` over tokens."""

    def lines() -> Outputs:
        rewards = rollout.outcomes.reshape(-1, GROUP_SIZE)
        rewards = (rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True) + EPS)
        token_rewards = torch.zeros(rollout.mask.shape)
        token_rewards[:, -1 - rollout.sampled] = rewards.flatten()
        returns = torch.zeros_like(token_rewards)
        running = torch.zeros(len(returns))
        for t in reversed(range(returns.shape[1])):
            running = token_rewards[:, t] + running
            returns[:, t] = running
        return {"advantages": returns * rollout.mask}

    return lines


def _rllm_own(rollout: Rollout) -> Callable[[], Outputs]:
    """rllm-org/rllm, `calculate_grpo_advantages` (its deviation has ddof 0: scaled here to be comparable)."""
    scale = (GROUP_SIZE / (GROUP_SIZE - 1)) ** 0.5
    groups = list(rollout.outcomes.double().view(-1, GROUP_SIZE).numpy())

    def loop() -> Outputs:
        values = [(rewards - rewards.mean()) / (rewards.std() * scale + EPS) for rewards in groups]
        return rollout.spread(torch.from_numpy(np.concatenate(values)))

    return loop


# Ours: GRPO by options, through each adapter.


def _padded(rollout: Rollout) -> Callable[[], Outputs]:
    def call() -> Outputs:
        credit = padded_turn_advantages(rollout.turn_rewards, rollout.turn_ids, rollout.groups, **OPTIONS)
        return {"advantages": credit.advantages}

    return call


def _packed(rollout: Rollout) -> Callable[[], Outputs]:
    flat, width = rollout.turn_ids.flatten(), rollout.turn_ids.shape[1]
    cu_seqlens = torch.arange(rollout.num_trajectories + 1) * width

    def call() -> Outputs:
        credit = packed_turn_advantages(rollout.turn_rewards, flat, cu_seqlens, rollout.groups, **OPTIONS)
        return {"advantages": credit.advantages.view(-1, width)}

    return call


def _lists(rollout: Rollout) -> Callable[[], Outputs]:
    rewards, uids = rollout.turn_rewards.tolist(), rollout.uids.tolist()

    def call() -> Outputs:
        values = list_turn_advantages(rewards, uids, num_tokens=rollout.num_tokens, **OPTIONS)
        return rollout.spread(torch.tensor([row[0] for row in values]))

    return call


def _verl(rollout: Rollout) -> Callable[[], Outputs]:
    config = {"gtpo": OPTIONS}

    def call() -> Outputs:
        return {"advantages": verl.gtpo_advantages(rollout.token_rewards, rollout.mask, rollout.uids, config)[0]}

    return call


def _skyrl(rollout: Rollout) -> Callable[[], Outputs]:
    """SkyRL's options are its own; a reward at the end of one turn each is GRPO with GTPO's."""

    class Trainer:
        def compute_advantages_and_returns(self, data: dict[str, Any]) -> dict[str, Any]:
            data["advantages"] = skyrl.gtpo_advantages(
                data["rewards"], data["response_mask"], rollout.uids, config={"gtpo": OPTIONS}
            )[0]
            return data

    trainer = skyrl.trainer_class(Trainer)()
    data = {"rewards": rollout.token_rewards, "response_mask": rollout.mask, "loss_mask": rollout.mask}
    return lambda: {"advantages": trainer.compute_advantages_and_returns(dict(data))["advantages"]}


def _trl(rollout: Rollout) -> Callable[[], Outputs]:
    from gtpo.adapters.trl import ScoredRow, advantages_by_token, group_advantages

    rewards, turn_ids = rollout.turn_rewards.tolist(), rollout.turn_ids.tolist()
    rows = [ScoredRow(*row) for row in zip(rewards, rollout.num_tokens, strict=True)]

    def call() -> Outputs:
        return {"advantages": advantages_by_token(group_advantages(rows, GROUP_SIZE, OPTIONS), turn_ids, rollout.mask)}

    return call


def _openrlhf(rollout: Rollout) -> Callable[[], Outputs]:
    experience = SimpleNamespace(
        index=list(range(rollout.num_trajectories)), action_mask=rollout.mask, rewards=rollout.outcomes, info={}
    )

    def call() -> Outputs:
        openrlhf.set_turn_advantages([experience], GROUP_SIZE, **OPTIONS)
        return {"advantages": experience.advantages}

    return call


def _nemo_rl(rollout: Rollout) -> Callable[[], Outputs]:
    estimator = nemo_rl.GTPOAdvantageEstimator({"gtpo": OPTIONS})
    prompts = rollout.groups[:, None].expand(-1, 32).contiguous()
    return lambda: {"advantages": estimator.compute_advantage(prompts, rollout.outcomes, rollout.mask)}


def _slime(rollout: Rollout) -> Callable[[], Outputs]:
    masks = rollout.mask.int()
    lists = masks.tolist()
    samples = [
        SimpleNamespace(
            group_index=i // GROUP_SIZE,
            loss_mask=lists[i],
            response_length=len(lists[i]),
            metadata=None,
            get_reward_value=lambda args, reward=reward: reward,
        )
        for i, reward in enumerate(rollout.outcomes.tolist())
    ]

    def call() -> Outputs:
        _, rewards = slime.reward_post_process(SimpleNamespace(gtpo=OPTIONS), samples)
        data: dict[str, Any] = {"rewards": rewards, "loss_masks": list(masks)}
        slime.compute_advantages(None, data)
        return {"advantages": torch.stack(data["advantages"])}

    return call


def _rllm(rollout: Rollout) -> Callable[[], Outputs]:
    tokens = [0] * rollout.sampled
    rewards = list(rollout.outcomes.double().view(-1, GROUP_SIZE).numpy())

    def group() -> Any:
        steps = [
            [SimpleNamespace(reward=0.0, response_ids=tokens) for _ in range(NUM_TURNS)] for _ in range(GROUP_SIZE)
        ]
        return SimpleNamespace(trajectories=[SimpleNamespace(steps=row) for row in steps])

    groups = [group() for _ in rewards]

    def call() -> Outputs:
        values, _ = rllm.gtpo_advantages(rewards, SimpleNamespace(gtpo=OPTIONS), traj_groups=groups)
        return rollout.spread(torch.from_numpy(np.concatenate(values)))

    return call


def _floor(rollout: Rollout) -> Callable[[], Outputs]:
    def write() -> Outputs:
        rollout.spread(rollout.outcomes)
        return {}

    return write


CREDIT: list[Contestant[Rollout]] = [
    Contestant(FLOOR, "torch", _floor),
    Contestant(VERL, "verl, restated", _verl_own),
    Contestant(TRL, "trl, restated", _trl_own),
    Contestant(OPENRLHF, "openrlhf, restated", _openrlhf_own),
    Contestant(RLLM, "rllm, restated", _rllm_own),
    Contestant("padded", "cpp", _padded),
    Contestant("packed", "cpp", _packed),
    Contestant("lists", "cpp", _lists),
    Contestant("verl", "cpp", _verl),
    Contestant("SkyRL", "cpp", _skyrl),
    Contestant("TRL", "cpp", _trl),
    Contestant("OpenRLHF", "cpp", _openrlhf),
    Contestant("NeMo-RL", "cpp", _nemo_rl),
    Contestant("slime", "cpp", _slime),
    Contestant("rLLM", "cpp", _rllm),
]


def measure_credit(num_trajectories: int, sampled: int, rounds: int) -> list[Row]:
    rollout = make_rollout(num_trajectories, sampled)
    shape = {"B": num_trajectories, "J": NUM_TURNS, "T": rollout.turn_ids.shape[1]}
    rows = compare(
        CREDIT,
        rollout,
        exact_outputs(rollout),
        lambda name, backend: Row(name, backend, shape, "float32"),
        allowed=1e-5,
        rounds=rounds,
        device=torch.device("cpu"),
        warm_up_batch=make_rollout(2 * GROUP_SIZE, 2),
    )
    set_ratios(rows, find(rows, FLOOR).cpu_s)
    for ours, own in OWN.items():
        set_ratios([find(rows, ours)], find(rows, own).cpu_s, label="x the trainer's own")
    return rows


# A step of TRL


@dataclass(frozen=True)
class StepShape:
    num_rows: int
    prompt: int
    completion: int
    vocab: int
    hidden: int
    num_layers: int


FULL_STEP = StepShape(num_rows=8, prompt=64, completion=192, vocab=32768, hidden=256, num_layers=2)
SMOKE_STEP = StepShape(num_rows=4, prompt=4, completion=8, vocab=64, hidden=16, num_layers=1)


@dataclass(frozen=True)
class Step:
    trainer: Any
    inputs: dict[str, Tensor]

    @property
    def mask(self) -> Tensor:
        return self.inputs["completion_mask"] * self.inputs["tool_mask"]

    def outputs(self, loss: Tensor) -> Outputs:
        model = self.trainer.model
        model.zero_grad()
        loss.backward()
        return {
            "loss": loss.detach(),
            "d_head": model.lm_head.weight.grad,
            "d_embeddings": model.model.embed_tokens.weight.grad,
        }


def make_step(shape: StepShape, folder: str) -> Step:
    import transformers
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from trl import GRPOConfig

    from gtpo.adapters.trl import GTPOTrainer

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=shape.vocab,
            hidden_size=shape.hidden,
            intermediate_size=2 * shape.hidden,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=max(shape.hidden // 64, 1),
            initializer_range=0.1,
        )
    )
    inner = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    trainer = GTPOTrainer(
        model=model,
        reward_funcs=lambda completions, **columns: [0.0] * len(completions),
        args=GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=shape.num_rows,
            num_generations=shape.num_rows,
            max_completion_length=shape.completion,
            epsilon_high=0.28,
            use_cpu=True,
            bf16=False,
            report_to="none",
        ),
        train_dataset=Dataset.from_dict({"prompt": ["a"]}),
        processing_class=transformers.PreTrainedTokenizerFast(
            tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>"
        ),
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    generator = torch.Generator().manual_seed(1)
    rows = (shape.num_rows, shape.completion)
    # a third of the tokens are tool output, and the shortest completion is half as long as the longest
    places = torch.arange(shape.completion)
    lengths = torch.linspace(shape.completion / 2, shape.completion, shape.num_rows).long()
    completion_mask = (places < lengths[:, None]).long()
    inputs = {
        "prompt_ids": torch.randint(2, shape.vocab, (shape.num_rows, shape.prompt), generator=generator),
        "prompt_mask": torch.ones(shape.num_rows, shape.prompt, dtype=torch.long),
        "completion_ids": torch.randint(2, shape.vocab, rows, generator=generator),
        "completion_mask": completion_mask,
        "tool_mask": (places // 4 % 3 != 1).long().expand(rows),
        "advantages": torch.randn(rows, generator=generator),
    }
    step = Step(trainer, inputs)
    inputs["num_items_in_batch"] = step.mask.sum()
    with torch.no_grad():
        logprobs = _eager_logprobs(trainer.model, inputs)
    inputs["old_per_token_logps"] = logprobs + 0.2 * torch.randn(rows, generator=generator)
    return step


def _eager_logprobs(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    length = inputs["completion_ids"].shape[1]
    logits = model(input_ids=ids, attention_mask=attention_mask, use_cache=False).logits[:, -length - 1 : -1]
    return logits.log_softmax(-1).gather(-1, inputs["completion_ids"][..., None]).squeeze(-1)


def exact_step(step: Step) -> Outputs:
    """Eager, in float64: the token-mean of the clipped loss, TRL's "dapo"."""
    import transformers

    trainer = step.trainer
    model = transformers.LlamaForCausalLM(trainer.model.config).double()
    model.load_state_dict({name: value.double() for name, value in trainer.model.state_dict().items()})
    ratio = (_eager_logprobs(model, step.inputs) - step.inputs["old_per_token_logps"].double()).exp()
    advantages = step.inputs["advantages"].double()
    token_loss = -torch.min(
        ratio * advantages, ratio.clamp(1 - trainer.epsilon_low, 1 + trainer.epsilon_high) * advantages
    )
    loss = (token_loss * step.mask).sum() / step.mask.sum()
    return Step(SimpleNamespace(model=model), step.inputs).outputs(loss)


def _trl_step(step: Step) -> Callable[[], Outputs]:
    from trl import GRPOTrainer

    return lambda: step.outputs(GRPOTrainer._compute_loss(step.trainer, step.trainer.model, step.inputs))


def _our_step(step: Step) -> Callable[[], Outputs]:
    return lambda: step.outputs(step.trainer._compute_loss(step.trainer.model, step.inputs))


def _liger_step(step: Step) -> Callable[[], Outputs]:
    if not torch.cuda.is_available():
        raise BackendUnavailable("backend='triton' needs a GPU: use_liger_kernel exchanges layers for Triton kernels")
    raise BackendUnavailable("backend='triton': this table is of the CPU")


def _model_alone(step: Step) -> Callable[[], Outputs]:
    ids = torch.cat([step.inputs["prompt_ids"], step.inputs["completion_ids"]], dim=1)

    def run() -> Outputs:
        step.trainer.model.zero_grad()
        step.trainer.model.model(input_ids=ids, use_cache=False).last_hidden_state.sum().backward()
        return {}

    return run


STEPS: list[Contestant[Step]] = [
    Contestant(STEP_FLOOR, "torch", _model_alone),
    Contestant(TRL_STEP, "trl", _trl_step),
    Contestant(LIGER_STEP, "triton", _liger_step),
    Contestant(OUR_STEP, "cpp", _our_step),
]


def measure_step(shape: StepShape, rounds: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        step = make_step(shape, folder)
        sizes = {"B": shape.num_rows, "T": shape.completion, "V": shape.vocab, "D": shape.hidden}
        dropped = 1 - step.mask.float().mean().item()
        rows = compare(
            STEPS,
            step,
            exact_step(step),
            lambda name, backend: Row(name, backend, sizes, "float32", round(dropped, 2)),
            allowed=1e-3,
            rounds=rounds,
            device=torch.device("cpu"),
            warm_up_batch=make_step(SMOKE_STEP, folder),
        )
    set_ratios(rows, find(rows, STEP_FLOOR).cpu_s)
    set_ratios(rows, find(rows, TRL_STEP).cpu_s, label="x the trainer's own")
    return rows


def judge_step(rows: Sequence[Row]) -> None:
    ours, theirs = find(rows, OUR_STEP), find(rows, TRL_STEP)
    for name, at_most in (("cpu_s", "CPU"), ("extra_mb", "memory")):
        pair = getattr(ours, name), getattr(theirs, name)
        ours.gate(f"{at_most} <= {TRL_STEP}", None not in pair and pair[0] <= pair[1])


CAPTION = """Advantages of 8 turns through each adapter, beside the trainers' own lines; then a step of TRL.
CPU ms: of all threads; medians of interleaved rounds.  extra MiB: peak above what was held before, outputs included.
errors: relative to float64 (advantages; loss, gradient of the head, of the embeddings).  x floor: see the module."""


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(__doc__, arguments)
    with smoke_run(options.smoke), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's own
        if options.smoke:
            rows = measure_credit(2 * GROUP_SIZE, 2, rounds=1) + measure_step(SMOKE_STEP, rounds=1)
        else:
            rows = measure_credit(4096, 16, rounds=11)
            steps = measure_step(FULL_STEP, rounds=11)
            judge_step(steps)
            rows += steps
    publish("bench-adapters", f"{CAPTION}  Threads: {torch.get_num_threads()}.", rows, options.results)


if __name__ == "__main__":
    main()
