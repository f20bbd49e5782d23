"""Counts the bytes that the logits sweep loads and stores, by running it in Triton's interpreter.

`TRITON_INTERPRET=1 python -m benchmarks.gpu_bytes` prints one JSON row a shape.  Masked lanes count nothing.
"""

import json
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

from gtpo_kernels import gtpo_loss_
from gtpo_kernels.token_logprobs import kernel_triton_sweeps as sweeps

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# The last is too long for one block: read twice, written once.  Before it stands one whose rows are not aligned.
VOCABULARIES = (32000, 32768, 31999, 151936)
NUM_ROWS = 3


class CountingBuilder:
    """Wraps the two functions of the interpreter that touch memory."""

    def __init__(self) -> None:
        self.bytes = 0
        builder = interpreter.interpreter_builder
        self.load, self.store = builder.create_masked_load, builder.create_masked_store
        builder.create_masked_load, builder.create_masked_store = self.counted_load, self.counted_store

    def counted_load(self, ptrs: Any, mask: Any, *rest: Any) -> Any:
        self.bytes += int(np.sum(mask.data)) * ptrs.get_element_ty().primitive_bitwidth // 8
        return self.load(ptrs, mask, *rest)

    def counted_store(self, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        self.bytes += int(np.sum(mask.data)) * ptrs.get_element_ty().primitive_bitwidth // 8
        return self.store(ptrs, value, mask, *rest)


def count(vocab: int, dtype: str, few_rows: int) -> dict[str, Any]:
    """Bytes of one in-place sweep of NUM_ROWS rows, with all that it reads and writes beside them."""
    sweeps.FEW_ROWS = few_rows
    logits = torch.randn(NUM_ROWS, vocab, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    before = COUNTER.bytes
    rows = {"advantages": torch.ones(NUM_ROWS), "old_logprobs": torch.zeros(NUM_ROWS)}
    gtpo_loss_(logits, torch.arange(NUM_ROWS), **rows, backend="triton")
    matrix = NUM_ROWS * vocab * DTYPES[dtype].itemsize
    passes = 2 if vocab <= sweeps.MAX_BLOCK else 3
    counted = COUNTER.bytes - before
    return {
        "name": "sweep bytes" + (", split rows" if few_rows else ""),
        "shape": f"V={vocab}",
        "dtype": dtype,
        "counted_bytes": counted,
        "minimum_bytes": passes * matrix,
        "bytes_over_minimum": counted / (passes * matrix),
        "bytes_over_floor": counted / (2 * matrix),
    }


COUNTER = CountingBuilder()

if __name__ == "__main__":
    for vocab in VOCABULARIES:
        for dtype in DTYPES:
            print(json.dumps(count(vocab, dtype, 0)))
    print(json.dumps(count(VOCABULARIES[-1], "bf16", 256)))
