"""What calls into the compiled CUDA module have in common: addresses of tensors, and the stream to run on."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gtpo_kernels import _cuda


def launch(function: Callable[..., None], device: torch.device, *args: Any, **kwargs: Any) -> None:
    """Call `function` of the compiled module for the current stream of the device."""
    with torch.cuda.device(device):
        function(*args, **kwargs, stream=torch.cuda.current_stream(device).cuda_stream)


def address(tensor: Tensor | None) -> int:
    """Of the first element; 0 for None.  The caller keeps the tensor alive until its kernel is enqueued."""
    return 0 if tensor is None else tensor.data_ptr()


def dtype_of(tensor: Tensor) -> _cuda.DType:
    """The compiled module's name of the tensor's dtype."""
    name: _cuda.DType = getattr(_cuda.DType, str(tensor.dtype).removeprefix("torch."))
    return name


def packed(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The tensor contiguous and in `dtype`: itself where it is so already."""
    return None if tensor is None else tensor.detach().to(dtype).contiguous()
