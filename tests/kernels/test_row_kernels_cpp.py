"""The compiled sweep of softmax rows: each instruction set by force, its vector functions, threads, bad addresses."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gtpo_kernels import _cpu, gtpo_loss, linear_gtpo_loss, linear_token_logprobs, token_logprobs
from gtpo_kernels.testing import assert_matches_reference
from gtpo_kernels.token_logprobs.kernel_cpp import logits_in_memory

INF, NAN = float("inf"), float("nan")


@pytest.fixture(params=["portable", "avx2", "avx512"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[_cpu.InstructionSet]:
    """Everything compiled runs with this one until the test ends."""
    wanted, before = getattr(_cpu.InstructionSet, request.param), _cpu.instruction_set()
    if wanted not in _cpu.instruction_sets():
        with pytest.raises(ValueError, match="does not run that instruction set"):
            _cpu.set_instruction_set(wanted)
        return pytest.skip("needs a CPU with this instruction set")
    _cpu.set_instruction_set(wanted)
    yield wanted
    _cpu.set_instruction_set(before)


def cases(*shape: int, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    num_rows, vocab, width = shape
    for seed in range(24):
        generator = torch.Generator().manual_seed(seed)
        logprobs = -9 * torch.rand(num_rows, generator=generator)
        yield {
            "hidden": torch.randn(num_rows, width, generator=generator).to(dtype),
            "weight": (torch.randn(vocab, width, generator=generator) * 3 / width**0.5).to(dtype),
            "targets": torch.randint(vocab, (num_rows,), generator=generator),
            "advantages": torch.randn(num_rows, generator=generator),
            "old_logprobs": logprobs,
        }


def select(case: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: case[name] for name in names}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
# vocabularies shorter than a vector, with a rest, and over several blocks of rows (4,096) and of columns (1,024)
@pytest.mark.parametrize("shape", [(5, 3, 4), (21, 507, 12), (3, 9001, 5)])
def test_every_instruction_set_matches_the_reference(
    instruction_set: _cpu.InstructionSet, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    for options in ({}, {"temperature": 0.7, "softcap": 4.0}, {"temperature": torch.linspace(0.5, 2.0, shape[0])}):
        heads = list(cases(*shape, dtype=dtype))
        logits = [{**case, "logits": (case["hidden"] @ case["weight"].T)} for case in heads]
        checks: list[tuple[Callable[..., Any], list[dict[str, Tensor]], list[str]]] = [
            (
                linear_token_logprobs,
                [select(case, "hidden", "weight", "targets") for case in heads[:8]],
                ["hidden", "weight"],
            ),
            (token_logprobs, [select(case, "logits", "targets") for case in logits[:8]], ["logits"]),
        ]
        for op, arguments, leaves in checks:
            assert_matches_reference(op, arguments, leaves, backend="cpp", **options)
    # ratios near 1, so that all of them are in the gradient
    for case in heads:
        case["old_logprobs"] = linear_token_logprobs(**select(case, "hidden", "weight", "targets")).logprobs + 0.1
    assert_matches_reference(linear_gtpo_loss, heads, ["hidden", "weight"], backend="cpp")


def test_exp_and_tanh_keep_their_error_bounds(instruction_set: _cpu.InstructionSet) -> None:
    generator = np.random.default_rng(0)
    tiny = 10.0 ** generator.uniform(-37, 0, 1 << 18)
    for ours, exact, x in (
        (_cpu.exp, np.exp, np.concatenate([-generator.uniform(0, 86.6, 1 << 20), -tiny, [0.0]])),
        (_cpu.tanh, np.tanh, np.concatenate([generator.uniform(-12, 12, 1 << 20), tiny, -tiny, [0.0, INF, -INF]])),
    ):
        x = x.astype(np.float32)
        expected = exact(x.astype(np.float64))
        ulp = np.spacing(np.abs(expected).astype(np.float32)).astype(np.float64)
        assert (np.abs(ours(x) - expected) / ulp).max() <= 2.0
    assert not _cpu.exp(np.array([-86.7, -1e5], np.float32)).any()
    assert np.isnan([*_cpu.exp(np.full(3, NAN, np.float32)), *_cpu.tanh(np.full(3, NAN, np.float32))]).all()


def test_the_number_of_threads_changes_no_bit(instruction_set: _cpu.InstructionSet) -> None:
    # over a block of either layout, and enough logits that threads are woken
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 5003, generator=generator)
    columns = torch.randn(5003, 64, generator=generator).t()[:50]
    targets, gradient = np.arange(50), np.linspace(-1.0, 1.0, 50)
    for logits in (rows, columns):
        results = []
        for num_threads in (1, 2, 5):
            x = logits.t().contiguous().t() if logits is columns else logits.clone()
            x = torch.empty(5003, 64).t()[:50].copy_(logits) if logits is columns else x
            memory = logits_in_memory(x)
            statistics = _cpu.token_statistics(memory, None, targets, None, softcap=0.0, num_threads=num_threads)
            options = {"softcap": 0.0, "grad_logprobs": gradient, "grad_entropy": gradient, "num_threads": num_threads}
            _cpu.token_gradient(memory, memory, None, targets, None, **options)
            results.append((statistics, x.numpy()))
        for statistics, d_logits in results[1:]:
            assert np.array_equal(statistics, results[0][0])
            assert np.array_equal(d_logits, results[0][1])


def test_long_rows_stay_within_the_error_budget(instruction_set: _cpu.InstructionSet) -> None:
    draws = []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        logits = 3 * torch.randn(2, 151_936, generator=generator)
        draws.append({"logits": logits, "targets": torch.randint(151_936, (2,), generator=generator)})
    assert_matches_reference(token_logprobs, draws, ["logits"], backend="cpp")


def test_nan_and_infinite_logits_spoil_their_own_row_only(instruction_set: _cpu.InstructionSet) -> None:
    logits = torch.zeros(6, 40)
    logits[0, 17], logits[1, 39], logits[2], logits[3], logits[4, 3:] = NAN, INF, NAN, -INF, -INF
    targets = torch.zeros(6).long()
    for temperature in (1.0, 0.7):
        token = token_logprobs(logits, targets, temperature=temperature, backend="cpp")
        assert token.logprobs[:3].isnan().all()
        assert token.logprobs[3] == -INF
        expected = -torch.tensor([3.0, 40.0]).log()
        torch.testing.assert_close(token.logprobs[4:], expected)
        loss = gtpo_loss(logits[3:], targets[3:], torch.ones(3), temperature=temperature, backend="cpp").loss
        assert loss.isfinite()


def test_the_compiled_sweep_checks_what_it_dereferences() -> None:
    logits = torch.zeros(3, 5)
    memory, options = logits_in_memory(logits), {"softcap": 0.0, "num_threads": 1}
    targets = np.zeros(3, np.int64)
    for bad in (-1, 5):
        with pytest.raises(ValueError, match=r"targets must lie in \[0, vocab\)"):
            _cpu.token_statistics(memory, None, np.array([0, bad, 0]), None, **options)
    for bad in (-1, 3):
        with pytest.raises(ValueError, match="rows must lie in"):
            _cpu.token_statistics(memory, np.array([0, 1, bad]), targets, None, **options)
    with pytest.raises(ValueError, match="rows must lie in"):
        _cpu.token_statistics(memory, None, np.zeros(4, np.int64), None, **options)
    with pytest.raises(ValueError, match=r"temperature must be \[3\]"):
        _cpu.token_statistics(memory, None, targets, np.ones(2), **options)
    # three columns without room for a whole vector
    with pytest.raises(ValueError, match="contiguous rows, or columns"):
        _cpu.token_statistics(logits_in_memory(torch.zeros(5, 3).t()), None, targets, None, **options)
    with pytest.raises(ValueError, match="V at least 1"):
        _cpu.Logits(data=0, type=_cpu.LogitType.float32, num_rows=1, vocab=1, row_stride=1, vocab_stride=1)
    with pytest.raises(TypeError):
        _cpu.token_statistics(memory, None, targets.astype(np.int32), None, **options)
