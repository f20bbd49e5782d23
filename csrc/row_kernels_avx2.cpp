#define GTPO_VECTOR_BYTES 32
#define GTPO_KERNELS kernels_avx2
#include "row_kernels.inl"
