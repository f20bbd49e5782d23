#define GTPO_VECTOR_BYTES 64
#define GTPO_KERNELS kernels_avx512
#include "row_kernels.inl"
