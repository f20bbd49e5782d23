"""`make bench-adapters`, its second half: forward and backward of TRL's loss, by `GRPOTrainer` and by `GTPOTrainer`.

One model and one batch, one advantage a completion.  The floor is forward and backward of the model without its head.
TRL 1.16 has no Liger loss any more: its `use_liger_kernel=True` exchanges layers of the model for Triton kernels, which
need a GPU.  Liger's GRPO loss is called as TRL did before, on the model's hidden states.
"""

import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import (
    Contestant,
    Outputs,
    Row,
    compare,
    find,
    parse_arguments,
    publish,
    set_ratios,
    smoke_run,
)

CAPTION = """A step of TRL: forward and backward of its loss.
CPU ms: of all threads; medians of interleaved rounds.  extra MiB: peak above what was held before, gradients included.
errors: of loss, gradient of the head, of the embeddings, relative to float64.  x floor: see the module."""
FLOOR = "floor: the model without its head"
TRL_STEP, OUR_STEP, LIGER_STEP = "TRL's own loss", "GTPOTrainer", "Liger's GRPO loss, once TRL's option"


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
        "advantages": torch.randn(shape.num_rows, 1, generator=generator).expand(rows),
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
    """`compute_liger_loss` of earlier TRLs, and the settings that they made the loss with; it takes [B] advantages."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    trainer, inputs = step.trainer, step.inputs
    module = LigerFusedLinearGRPOLoss(
        beta=0.0,
        epsilon_low=trainer.epsilon_low,
        epsilon_high=trainer.epsilon_high,
        temperature=trainer.temperature,
        use_ref_model=False,
        loss_type="dapo",
        max_completion_length=trainer.max_completion_length,
    )
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    length = inputs["completion_ids"].shape[1]

    def run() -> Outputs:
        hidden = trainer.model.model(input_ids=ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        loss, _ = module(
            _input=hidden[:, -length - 1 : -1],
            lin_weight=trainer.model.lm_head.weight,
            selected_token_ids=inputs["completion_ids"],
            attention_mask=step.mask,
            advantages=inputs["advantages"][:, 0],
            old_per_token_logps=inputs["old_per_token_logps"],
        )
        return step.outputs(loss)

    return run


def _model_alone(step: Step) -> Callable[[], Outputs]:
    ids = torch.cat([step.inputs["prompt_ids"], step.inputs["completion_ids"]], dim=1)

    def run() -> Outputs:
        step.trainer.model.zero_grad()
        step.trainer.model.model(input_ids=ids, use_cache=False).last_hidden_state.sum().backward()
        return {}

    return run


STEPS: list[Contestant[Step]] = [
    Contestant(FLOOR, "torch", _model_alone),
    Contestant(TRL_STEP, "trl", _trl_step),
    Contestant(LIGER_STEP, "liger-kernel", _liger_step, compiles=True),
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
    set_ratios(rows, find(rows, FLOOR).cpu_s)
    set_ratios(rows, find(rows, TRL_STEP).cpu_s, label="x the trainer's own")
    return rows


def judge_step(rows: Sequence[Row]) -> None:
    ours, theirs = find(rows, OUR_STEP), find(rows, TRL_STEP)
    for name, at_most in (("cpu_s", "CPU"), ("extra_mb", "memory")):
        pair = getattr(ours, name), getattr(theirs, name)
        ours.gate(f"{at_most} <= {TRL_STEP}", None not in pair and pair[0] <= pair[1])


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(__doc__, arguments)
    with smoke_run(options.smoke), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's own
        rows = measure_step(SMOKE_STEP, rounds=1) if options.smoke else measure_step(FULL_STEP, rounds=11)
    if not options.smoke:
        judge_step(rows)
    publish("bench-trl-step", f"{CAPTION}  Threads: {torch.get_num_threads()}.", rows, options.results)


if __name__ == "__main__":
    main()
