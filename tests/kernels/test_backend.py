"""Which backend runs: the one that was asked for, or none."""

import importlib.metadata
import importlib.util

import pytest
import torch

from gtpo_kernels import BackendUnavailable, gtpo_loss, turn_returns
from gtpo_kernels import backend as backends
from gtpo_kernels.backend import BACKENDS, DEFAULT_BACKEND, FAMILIES, Backend, release_of, select_backend

CPU = torch.device("cpu")


def test_the_definition_and_the_default_run_everywhere() -> None:
    for name in ("reference", DEFAULT_BACKEND):
        for family in FAMILIES:
            assert select_backend(family, name, CPU) == name


def test_a_backend_without_the_kernel_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "partial", Backend(frozenset({"turn_advantages"})))
    with pytest.raises(BackendUnavailable, match="backend='partial' has no kernel for gtpo_loss"):
        gtpo_loss(torch.zeros(1, 3), torch.zeros(1).long(), torch.ones(1), backend="partial")


def test_the_default_is_the_compiled_one_on_a_cpu_and_torch_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for family in FAMILIES:
        assert select_backend(family, None, CPU) == "cpp"
        assert select_backend(family, None, torch.device("meta")) == DEFAULT_BACKEND
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for family in FAMILIES:
        assert select_backend(family, None, CPU) == DEFAULT_BACKEND


def test_an_unknown_backend_is_refused_by_name() -> None:
    for family in FAMILIES:
        with pytest.raises(ValueError, match=r"backend must be one of 'reference', 'torch', .*, got 'tpu'"):
            select_backend(family, "tpu", CPU)


def test_the_compiled_backend_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendUnavailable, match="backend='cpp' runs on the CPU only, got tensors on meta"):
        turn_returns(torch.zeros(2, device="meta"), torch.zeros(2, device="meta").int(), backend="cpp")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    rewards, cu_turns = torch.tensor([0.0, 1.0]), torch.tensor([0, 2])
    with pytest.raises(BackendUnavailable, match=r"backend='cpp' needs the compiled module gtpo_kernels\._cpu"):
        turn_returns(rewards, cu_turns, backend="cpp")
    # the rest works without it
    assert turn_returns(rewards, cu_turns, gamma=0.5).tolist() == [0.5, 1.0]


@pytest.mark.parametrize(("version", "runs"), [("3.3.1", False), ("3.4.0", True), ("3.10.0", True), ("4.0.0rc1", True)])
def test_a_triton_that_cannot_compile_the_kernels_is_named(
    version: str, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda package: version)
    backends._fault_of_triton.cache_clear()
    try:
        if runs:
            assert select_backend("gtpo_loss", "triton", CPU) == "triton"
        else:
            with pytest.raises(
                BackendUnavailable, match=r"backend='triton' needs triton 3\.4 or newer, got triton 3\.3\.1"
            ):
                select_backend("gtpo_loss", "triton", CPU)
    finally:
        backends._fault_of_triton.cache_clear()


def test_versions_are_compared_as_numbers() -> None:
    versions = ["2.9.1", "2.10.0a0", "2.10.0+cu128", "2.11.0.dev20260101", "3.0"]
    assert [release_of(version) for version in versions] == [(2, 9), (2, 10), (2, 10), (2, 11), (3, 0)]
