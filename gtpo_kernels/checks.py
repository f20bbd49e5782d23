"""Checks at the door.  Each refusal gives the argument's name, what was expected, and what came."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

Kind = Literal["float", "int", "bool"]

_KINDS: dict[str, tuple[torch.dtype, ...]] = {
    "float": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    "int": (torch.int32, torch.int64),
    "bool": (torch.bool,),
}

# Beyond these, what float32 makes of a logit divided by a temperature, or of a cap, overflows or is 0.
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-30, 1e38
MIN_SOFTCAP, MAX_SOFTCAP = 1e-30, 1e30


def check_tensor(
    name: str,
    tensor: Tensor,
    *,
    layout: str,
    shape: Sequence[int | None],
    kind: Kind,
    device: torch.device | None = None,
) -> None:
    """Refuse a tensor of another rank, size, dtype kind or device.

    layout: ("[N, V]") for the message.  shape: None is any size.

    >>> check_tensor("logits", torch.zeros(3), layout="[N, V]", shape=(None, None), kind="float")
    Traceback (most recent call last):
    ...
    ValueError: logits must be [N, V], got shape (3,)
    """
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor {layout}, got {type(tensor).__name__}")
    # Sharded parameters look like plain ones, but a row of the softmax needs the whole vocabulary.
    if type(tensor).__name__ == "DTensor":
        raise ValueError(f"{name} must be a plain tensor, got a DTensor: {_plain_tensor_of(name)}")
    wrong_rank = tensor.dim() != len(shape)
    if wrong_rank or any(want is not None and have != want for have, want in zip(tensor.shape, shape, strict=True)):
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        wanted = layout if wrong_rank or all(size is None for size in shape) else f"{layout} = [{sizes}]"
        raise ValueError(f"{name} must be {wanted}, got shape {tuple(tensor.shape)}")
    if tensor.dtype not in _KINDS[kind]:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _KINDS[kind])
        raise ValueError(f"{name} must be {allowed}, got {str(tensor.dtype).removeprefix('torch.')}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")


def _plain_tensor_of(name: str) -> str:
    """What to pass for a DTensor."""
    if name not in ("weight", "bias"):
        return f"pass {name}.to_local(), the rows of this rank"
    # A gathered tensor counts as replicated, of equal gradients on all ranks: each would keep its own rows' share.
    return (
        f"pass {name}.full_tensor(grad_placements=[Partial()] * {name}.device_mesh.ndim), which adds up the gradients "
        "of all ranks, with num_loss_tokens of all ranks"
    )


def check_no_tangent(**tensors: Tensor | None) -> None:
    """Refuse forward-mode derivatives: a registered op would drop them without a word."""
    if forward_ad._current_level < 0:
        return
    for name, tensor in tensors.items():
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(f"{name} has a forward-mode tangent: kernels differentiate in reverse mode only")


def check_first_order() -> None:
    """Refuse to go backward with create_graph: the gradient would count as a constant."""
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "create_graph is not supported: kernels give first derivatives only; backend='reference' gives any"
        )


def values_are_known(tensor: Tensor) -> bool:
    """Whether looking at values costs no wait, and is possible: on a CPU, outside of tracing."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not isinstance(tensor, FakeTensor)


def check_values(holds: Tensor, message: str) -> None:
    """Refuse values: ValueError on a CPU; elsewhere, and when traced, an assertion of the device."""
    if values_are_known(holds):
        if not bool(holds):
            raise ValueError(message)
    else:
        torch._assert_async(holds, message)


def check_targets(targets: Tensor, vocab: int) -> None:
    """Refuse target ids outside [0, vocab)."""
    inside = ((targets >= 0) & (targets < vocab)).all()
    if values_are_known(inside) and not bool(inside):
        low, high = targets.min().item(), targets.max().item()
        raise ValueError(f"targets must lie in [0, {vocab}), got values from {low} to {high}")
    check_values(inside, f"targets must lie in [0, {vocab})")


def split_temperature(temperature: float | Tensor, like: Tensor) -> tuple[float, Tensor | None]:
    """(One temperature for all rows, or 1.0) and (None, or one a row).  `like`: the [N, ...] tensor that it divides."""
    if isinstance(temperature, Tensor):
        check_tensor("temperature", temperature, layout="[N]", shape=(like.shape[0],), kind="float", device=like.device)
        return 1.0, temperature
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if not MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE:
        raise ValueError(f"temperature must lie in [{MIN_TEMPERATURE}, {MAX_TEMPERATURE}], got {temperature}")
    return temperature, None


def check_softcap(softcap: float | None) -> float:
    """The softcap as ops take it: 0.0 for None."""
    if softcap is None:
        return 0.0
    if not 0.0 < softcap < float("inf"):
        raise ValueError(f"softcap must be positive and finite, or None, got {softcap}")
    if not MIN_SOFTCAP <= softcap <= MAX_SOFTCAP:
        raise ValueError(f"softcap must lie in [{MIN_SOFTCAP}, {MAX_SOFTCAP}], or be None, got {softcap}")
    return float(softcap)


def check_row_temperature(row_temperature: Tensor) -> None:
    """Refuse temperatures, one a row, of which some divide by 0 or turn the distribution over."""
    # the bounds are no numbers of every dtype
    given = row_temperature.float()
    holds = ((given >= MIN_TEMPERATURE) & (given <= MAX_TEMPERATURE)).all()
    message = f"temperature must be positive and finite in every row, in [{MIN_TEMPERATURE}, {MAX_TEMPERATURE}]"
    check_values(holds, f"{message}, got values that are not")


def check_vocab(name: str, tensor: Tensor, dim: int) -> None:
    """Refuse a vocabulary of nothing: it has no softmax."""
    if tensor.shape[dim] == 0:
        raise ValueError(f"{name} must have a vocabulary of at least 1, got shape {tuple(tensor.shape)}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a name that is not one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def accumulator_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype of sums and results: float64 where an input is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32
