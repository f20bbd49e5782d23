// Types and errors that all CUDA launchers share.
#pragma once

namespace gtpo {

enum class DType { float32, float64, bfloat16, float16 };

const char* cuda_error_string(int status);

}  // namespace gtpo
