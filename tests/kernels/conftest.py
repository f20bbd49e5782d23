"""What the kernel tests share: the backends they run over, and batches of rows.

A test that takes `kernel` runs once for every registered backend of the `FAMILY` of its file, the reference aside; one
that takes `backend` runs with the reference too.  GTPO_TEST_DEVICE=cuda runs them all on a GPU.
"""

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from gtpo_kernels import ClippedLoss, linear_token_logprobs
from gtpo_kernels.backend import BACKENDS
from gtpo_kernels.clipped_loss.reference import LossTerms
from gtpo_kernels.token_logprobs.reference import project
from tests.kernels.emulation import emulated_cuda

DEVICE = torch.device(os.environ.get("GTPO_TEST_DEVICE", "cpu"))
# Backends tied to one kind of device; the others run on all.  One that cannot run here for another reason fails.
RUNS_ON = {"cpp": "cpu"}
INF, NAN = float("inf"), float("nan")
HEAD = ["hidden", "weight", "bias"]
# the default rule, as the registered ops take it
CLIPPED = tuple(LossTerms(0.2, 0.28))
ROWS = ["targets", "advantages", "loss_mask", "old_logprobs"]
Case = dict[str, Any]

# (rows, vocabulary, width) and dtype: every dtype at one size, the corners in float32
SIZES = [
    *(((126, 507, 123), dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)),
    *((shape, torch.float32) for shape in ((1, 130, 5), (5, 1, 3), (0, 7, 4))),
]

sizes = pytest.mark.parametrize(("shape", "dtype"), SIZES)
cpu_only = pytest.mark.skipif(DEVICE.type != "cpu", reason="needs a CPU: bad values end a GPU process")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for argument, with_reference in (("backend", True), ("kernel", False)):
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, backends(metafunc.module.FAMILY, with_reference=with_reference))


def backends(family: str, *, with_reference: bool = False) -> list[str]:
    """The backends of a family on the device that the tests run on."""
    return [
        name
        for name, backend in BACKENDS.items()
        if family in backend.families
        and RUNS_ON.get(name, DEVICE.type) == DEVICE.type
        and (with_reference or name != "reference")
    ]


@pytest.fixture(autouse=True)
def on_the_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tensors that a test makes are on DEVICE; the cuda backend is emulated where that is the CPU."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if DEVICE.type == "cpu" and "cuda" in parameters.values():
        with emulated_cuda():
            yield
    elif DEVICE.type == "cpu":
        yield
    else:
        with DEVICE, products_of_rounded_gradients():
            yield


@contextmanager
def products_of_rounded_gradients() -> Iterator[None]:
    """The yardstick errs as the kernels of a GPU do, whose products with bfloat16 inputs take rounded d_logits."""

    def rounding(hidden: Tensor, *head: Any) -> Tensor:
        logits = project(hidden, *head)
        if hidden.dtype == torch.bfloat16 and logits.requires_grad:
            logits.register_hook(lambda d_logits: d_logits.to(hidden.dtype).to(logits.dtype))
        return logits

    with pytest.MonkeyPatch.context() as patch:
        for family in ("token_logprobs", "gtpo_loss"):
            patch.setattr(importlib.import_module(f"gtpo_kernels.{family}.reference"), "project", rounding)
        yield


def interpreted(kernel: str) -> bool:
    """Whether a kernel runs in Triton's interpreter, which takes 3 ms for what a device does in a microsecond."""
    return kernel == "triton" and DEVICE.type == "cpu"


def emulated(kernel: str) -> bool:
    """Whether a kernel is CUDA run on the CPU: about 0.1 ms a row."""
    return kernel == "cuda" and DEVICE.type == "cpu"


def fit(kernel: str, *shape: int) -> tuple[int, ...]:
    """The shape (rows, vocabulary, width), cut where the kernel runs on no real device; never a power of two."""
    most = (9, 293, 19) if interpreted(kernel) else (61, 507, 123) if emulated(kernel) else shape
    return tuple(min(pair) for pair in zip(shape, most, strict=False))


def examples(kernel: str, most: int) -> int:
    """How many hypothesis examples a kernel is given."""
    return 4 if interpreted(kernel) else most


def draws(
    kernel: str,
    make: Callable[..., Case],
    *shape: int,
    dtype: torch.dtype = torch.float32,
    scalar: bool = False,
    **options: Any,
) -> list[Case]:
    """Enough cases to say what float32 errs: several of few rows, or where a result is one scalar a case."""
    shape = fit(kernel, *shape)
    num_rows = shape[0]
    if num_rows == 1:
        num_draws = 24 if interpreted(kernel) else 100
    elif num_rows >= 9 and not scalar:
        num_draws = 1
    elif interpreted(kernel):
        num_draws = 8
    else:
        num_draws = 12 if emulated(kernel) or num_rows > 100 else 40
    return [make(*shape, seed=seed, dtype=dtype, **options) for seed in range(num_draws)]


def on_device(case: Case) -> Case:
    return {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in case.items()}


def head_case(num_rows: int, vocab: int, width: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Case:
    """Hidden states, a head that makes logits of about 3, and targets."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu")

    return on_device(
        {
            "hidden": normal(num_rows, width).to(dtype),
            "weight": (normal(vocab, width) * 3 / width**0.5).to(dtype),
            "bias": normal(vocab).to(dtype),
            "targets": torch.randint(vocab, (num_rows,), generator=generator, device="cpu"),
        }
    )


def logits_case(num_rows: int, vocab: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Case:
    generator = torch.Generator().manual_seed(seed)
    return on_device(
        {
            "logits": (3 * torch.randn(num_rows, vocab, generator=generator, device="cpu")).to(dtype),
            "targets": torch.randint(vocab, (num_rows,), generator=generator, device="cpu"),
        }
    )


def edge_logits() -> Case:
    """-inf among finite logits, at the target, everywhere; one huge logit at and off the target; |logit| of 1e4."""
    case = logits_case(9, 37, seed=4)
    logits, targets = case["logits"], case["targets"]
    logits[0, ::2], targets[0] = -INF, 1
    logits[1, targets[1]] = -INF
    logits[2] = -INF
    logits[3], targets[3] = -INF, 5
    logits[3, 5] = 70_000.0
    logits[4, (targets[4] + 1) % 37] = 70_000.0
    logits[5] *= 1e4
    logits[6, targets[6]] = 70_000.0
    logits[7] = 1e4 + torch.linspace(-1, 1, 37)
    logits[8] = -1e4
    return case


def loss_case(
    num_rows: int, vocab: int, width: int, *, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any
) -> Case:
    """A head and rows with some advantages of 0, a loss mask with holes, and ratios around 1.

    Targets are sampled from the head and noise is bounded: float32 errs alike on all rows, and the budget is no luck.
    options: temperature and softcap, of the case and of its old log-probabilities.
    """
    head = head_case(num_rows, vocab, width, seed=seed, dtype=dtype)
    generator = torch.Generator().manual_seed(seed + 1)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device="cpu").to(DEVICE)

    plain = {name: value.float() if value.is_floating_point() else value for name, value in head.items()}
    logits = plain["hidden"] @ plain["weight"].T + plain["bias"]
    head["targets"] = plain["targets"] = (logits.softmax(dim=1) / -uniform(num_rows, vocab).log()).argmax(dim=1)
    logprobs = linear_token_logprobs(**plain, **options, backend="reference").logprobs
    return {
        **head,
        "advantages": (3.0 * uniform(num_rows) - 1.5).masked_fill(uniform(num_rows) < 0.2, 0.0),
        "loss_mask": uniform(num_rows) < 0.8,
        "old_logprobs": logprobs + 0.8 * uniform(num_rows) - 0.4,
        **options,
    }


def logits_loss_case(
    num_rows: int, vocab: int, *, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any
) -> Case:
    """The same from logits."""
    case = loss_case(num_rows, vocab, 5, seed=seed, **options)
    logits = case["hidden"] @ case["weight"].T + case["bias"]
    return {"logits": logits.to(dtype), **{name: case[name] for name in ROWS}, **options}


def loss_and_gradients(op: Callable[..., ClippedLoss], case: Case, names: list[str], **options: Any) -> list[Tensor]:
    leaves = {name: case[name].detach().clone().requires_grad_() for name in names}
    loss = op(**{**case, **leaves}, **options).loss
    return [loss.detach(), *torch.autograd.grad(loss, list(leaves.values()))]


def permutation(size: int, seed: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed), device="cpu").to(DEVICE)


def single_rows(case: Case) -> Iterator[Case]:
    """Each row alone: beside a logit of 70,000 no other error counts."""
    for row in range(len(case["targets"])):
        yield {name: value[row : row + 1] for name, value in case.items()}


def row_temperature(num_rows: int) -> Tensor:
    return torch.linspace(0.5, 2.0, num_rows, device=DEVICE)


def strided(tensor: Tensor) -> Tensor:
    """The same values, every second element of its memory."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


def assert_equal(one: Any, other: Any) -> None:
    """Bit for bit, NaN equal to NaN."""
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=0.0, equal_nan=True)


def assert_close(one: Any, other: Any) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b)


def assert_opcheck(op: Any, *arguments: Any) -> None:
    assert set(torch.library.opcheck(op.default, arguments).values()) == {"SUCCESS"}


def assert_compiles(function: Callable[..., Tensor], *leaves: Tensor) -> None:
    """function(*leaves), a scalar, and its gradients are the same bits under torch.compile(fullgraph=True)."""
    results = []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        copies = [leaf.clone().requires_grad_() for leaf in leaves]
        value = run(*copies)
        results.append([value.detach(), *torch.autograd.grad(value, copies)])
    assert_equal(*results)
