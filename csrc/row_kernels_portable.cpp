#define GTPO_VECTOR_BYTES 16
#define GTPO_KERNELS kernels_portable
#include "row_kernels.inl"
