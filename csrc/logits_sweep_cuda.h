// What the CUDA sweeps over logits share: their dtypes and operands. Pointers are to device memory.
#pragma once

#include <cstdint>

#include "cuda_types.h"

namespace gtpo {

// "accumulator" is double for float64 logits, float for every other.
struct Logits {
    DType dtype;
    const void* data;            // [num_rows, vocab] of dtype
    std::int64_t stride;         // elements from row to row; within a row they are contiguous
    std::int64_t num_rows;
    std::int64_t vocab;
    const std::int64_t* rows;    // [num_rows], where in the batch a row stands; null: row i is the batch's row i
    const std::int64_t* targets; // [batch]
    double temperature;          // of all rows, unless
    const void* row_temperature; // [batch] accumulator, or null
    double softcap;              // 0 for none
};

}  // namespace gtpo
