"""Weights that train in float32 while the model computes with bfloat16 copies of them.

The forward and the backward pass are those of a bfloat16 model, in training as in sampling. What a step moves is
the float32 weight, the *master*: a step of 1e-5 would vanish in the rounding of the copy. Gradients of the copies are
added up in the masters' `.grad`, in float32.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Masters:
    """Puts copies of `dtype` in the place of a model's weights and keeps the weights, under the names they had.

    kept: modules that go on computing with the weights themselves. Adapters, `lora_*`, do so too.
    A weight that several modules share has a copy in each, and one gradient.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, *, kept: Collection[nn.Module]) -> None:
        # by identity: of weights that are shared, the first name stands for all
        self.weights = dict(model.named_parameters())
        self._copies: list[_Copy] = []
        for path, module in model.named_modules():
            if module in kept or "lora_" in path:
                continue
            for name, master in list(module.named_parameters(recurse=False)):
                copy = nn.Parameter(master.detach().to(dtype), requires_grad=master.requires_grad)
                self._copies.append(_Copy(module, name, copy, master))
                setattr(module, name, copy)
                if copy.requires_grad:
                    copy.register_post_accumulate_grad_hook(_adding_to(master))
        self._versions = self._read_versions()

    def refresh(self) -> None:
        """The copies become what the masters are now; call it before a forward pass."""
        # in-place operations are counted by PyTorch; fused optimizers' are not, nor what is done to `.data`
        versions = self._read_versions()
        if versions != self._versions:
            self._versions = versions
            with torch.no_grad():
                for entry in self._copies:
                    entry.copy.copy_(entry.master)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the model has the masters themselves, to be saved."""
        try:
            for entry in self._copies:
                setattr(entry.module, entry.name, entry.master)
            yield
        finally:
            for entry in self._copies:
                setattr(entry.module, entry.name, entry.copy)

    def _read_versions(self) -> list[int]:
        return [entry.master._version for entry in self._copies]


def cast_weights(model: nn.Module, dtype: torch.dtype, *, kept: Collection[nn.Module] = ()) -> None:
    """Gives the weights of all modules but `kept` this dtype, in place.

    What a model computes for itself, and does not save, stays as transformers makes it: `model.to(torch.bfloat16)`
    would round the frequencies of rotary positions, whose angles are off by a radian at token 1,000 then.
    """
    for module in model.modules():
        if module in kept:
            continue
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                setattr(module, name, buffer.to(dtype))


def meet_bfloat16(model: nn.Module, head: nn.Module) -> None:
    """Embeddings and a head that are float32 get along with bfloat16 states between them."""
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight.dtype != torch.bfloat16:
            module.register_forward_hook(lambda module, inputs, output: output.to(torch.bfloat16))
    head.register_forward_pre_hook(lambda module, inputs: (inputs[0].to(module.weight.dtype), *inputs[1:]))


class _Copy(NamedTuple):
    module: nn.Module
    name: str
    copy: nn.Parameter
    master: nn.Parameter


def _adding_to(master: nn.Parameter) -> Callable[[Tensor], None]:
    """A hook that moves the gradient of a copy to its master as soon as it is there."""

    def move(copy: Tensor) -> None:
        assert copy.grad is not None
        if master.grad is None:
            master.grad = copy.grad.to(master.dtype)
        else:
            master.grad.add_(copy.grad)
        copy.grad = None

    return move
