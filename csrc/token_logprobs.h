// Softmax statistics of rows of logits, and the gradient that flows back to them.
// The definition is gtpo_kernels/token_logprobs/reference.py. Pointers and sizes in, status out, no torch headers.
#pragma once

#include <cstdint>
#include <vector>

#include "row_kernels.h"

namespace gtpo {

enum class LogitType { float32, bfloat16, float64 };
enum class SweepStatus { ok, bad_row, bad_target, bad_layout };

// [num_rows, vocab]: rows next to each other (vocab_stride 1), or columns (row_stride 1; not for bfloat16).  A matrix of
// columns must have room for a multiple of column_multiple rows, vocab_stride at least that.
struct Logits {
    void* data;
    LogitType type;
    std::int64_t num_rows;
    std::int64_t vocab;
    std::int64_t row_stride;
    std::int64_t vocab_stride;
};

// What is wanted of the logits; every array but `rows` has an entry a wanted row.
struct RowBatch {
    std::int64_t num_rows;
    const std::int64_t* rows;      // rows of the logits, each once; null for the first num_rows
    const std::int64_t* targets;
    const double* temperature;     // null for 1 everywhere
    double softcap;                // 0 for none
};

struct RowStatistics {
    double logprob;
    double entropy;
    double row_max;
    double log_sum;
};

// d loss / d logprob and d loss / d entropy of a row.
struct RowUpstream {
    double logprob;
    double entropy;
};

// Where rows are columns all of them are swept at once, else one after the other; either way a row's bits depend on
// nothing but the row and the instruction set.
//   statistics: [num_rows].
//   d_logits: null for none; or of the shape of the logits, whose memory it may be, with num_rows rows wanted.  Rows that
//       are not wanted stay as they are.  Must be the logits' own memory where those are columns.
//   upstream(context, i, statistics of wanted row i): what flows back to it; called once a row, from any thread.
//   has_entropy_gradient: whether any of that may be to the entropy.
SweepStatus sweep_rows_cpu(const Logits& logits, const Logits* d_logits, const RowBatch& batch, RowStatistics* statistics,
                           RowUpstream (*upstream)(const void*, std::int64_t, const RowStatistics&), const void* context,
                           bool has_entropy_gradient, std::int64_t num_threads);

enum class InstructionSet { portable, avx2, avx512 };

// Those that this machine can run, the best last.
std::vector<InstructionSet> instruction_sets();
// Which is used from now on, by the whole process; the best one if this is never called.
void set_instruction_set(InstructionSet set);
InstructionSet instruction_set();
const Kernels& kernels();

}  // namespace gtpo
