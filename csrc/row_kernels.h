// The inner loops of a softmax row, once for every instruction set: row_kernels.inl compiled with different flags.
// A row's sums are over y_v = (cap(l_v) - cap(max l)) / temperature, cap(l) = softcap * tanh(l / softcap) for finite l, or l
// where softcap is 0. The shift by the maximum comes before the division, so |l| = 1e4 costs no accuracy.
#pragma once

#include <cstdint>

namespace gtpo {

struct Bfloat16 {
    std::uint16_t bits;
};

// Below it a weight exp(y) is 0: 2.5e-38, far under the resolution of any sum that contains exp(0) = 1.
constexpr float min_log_weight = -86.6f;
// In place of y = -inf: its weight is 0 as well, but the product with it is 0, not NaN.
constexpr float log_zero = -1e5f;
// Vocabulary entries whose float32 sums are added in double; fixed, so the bits do not depend on the threads.  A block of a
// row stays in the L1 cache between its maximum and its sums; a block of columns is the work of one thread.
constexpr std::int64_t row_block_vocab = 4096;
constexpr std::int64_t column_block_vocab = 1024;
// Columns are processed in whole vectors of any instruction set.
constexpr std::int64_t column_multiple = 16;

struct RowScale {
    double temperature;
    double softcap;
};

// max: of the logits, before the cap.  sum: of exp(y).  weighted: of y exp(y).
struct RowSums {
    double max;
    double sum;
    double weighted;
};

// d_logits_v = exp(y_v) (constant + linear y_v) (1 - tanh(l_v / softcap)^2)
struct RowSlope {
    double max;
    double constant;
    double linear;
};

// The same for `width` rows whose logits are the columns of a matrix [vocab, width]: one entry a column.
// inverse_temperature is the sum of `high` and `low`; both are null where every temperature is 1.
template <class T>
struct ColumnScale {
    const T* inverse_temperature_high;
    const T* inverse_temperature_low;
    T softcap;
};

template <class Logit>
struct RowKernels {
    void (*sums)(const Logit* row, std::int64_t vocab, const RowScale& scale, RowSums& sums);
    // And the weights exp((l_v - m) / temperature), m the maximum up to the end of v's block of row_block_vocab entries,
    // which goes to block_max.  row and weights may be the same.  Without softcap; null where rounding them costs too much.
    void (*weights)(const Logit* row, Logit* weights, std::int64_t vocab, const RowScale& scale, RowSums& sums,
                    double* block_max);
    // weights_v *= factors of v's block; null as `weights` is
    void (*rescale)(Logit* weights, std::int64_t vocab, const double* factors);
    // row and d_row may be the same
    void (*gradient)(const Logit* row, Logit* d_row, std::int64_t vocab, const RowScale& scale, const RowSlope& slope);
};

template <class T>
struct ColumnKernels {
    // of `vocab` rows of the matrix, at most column_block_vocab
    void (*sums)(const T* logits, std::int64_t stride, std::int64_t vocab, std::int64_t width, const ColumnScale<T>& scale,
                 T* max, T* sum, T* weighted);
    void (*gradient)(T* logits, std::int64_t stride, std::int64_t vocab, std::int64_t width, const ColumnScale<T>& scale,
                     const T* max, const T* constant, const T* linear);
};

struct Kernels {
    RowKernels<float> rows_float32;
    RowKernels<Bfloat16> rows_bfloat16;
    RowKernels<double> rows_float64;
    ColumnKernels<float> columns_float32;
    ColumnKernels<double> columns_float64;
    // exp for x <= 0, and tanh; for tests of their error
    void (*exp)(const float* x, float* out, std::int64_t count);
    void (*tanh)(const float* x, float* out, std::int64_t count);
};

extern const Kernels kernels_portable;
#ifdef GTPO_X86
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

}  // namespace gtpo
