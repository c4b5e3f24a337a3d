// Every native op, as plain declarations: no Python, no torch, no CUDA header.
//
// Conventions. Tensors are addresses with their number of elements (int64). An op writes only into
// memory that its caller allocated. CPU launchers take the number of threads; CUDA launchers take
// their stream last, without a default, launch on the calling thread's current device, never wait
// for the device, and return a cudaError_t as int (0 is success).
#pragma once

#include <cstdint>

namespace progtuning {

// Codes shared with progtuning_kernels/_backend.py, which reads them from the module.
enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

// Elements summed on their own before the partial sums are added: the unit of work on both devices,
// and, because it depends on nothing but the sizes, what makes the result independent of the number
// of threads. 8192 gives 7 M elements (one BERT block) 865 thread blocks for an H200's 132 SMs.
constexpr int64_t kNormChunk = 8192;

// Number of chunks of a list of tensors: the floats that masked_norm_cuda needs as scratch.
int64_t masked_norm_chunks(const int64_t* sizes, int64_t num_tensors);

// out[0] = L2 norm over all elements of all tensors. float32, bfloat16, float64.
// Returns false for any other dtype, having done nothing.
bool masked_norm_cpu(const void* const* tensors, const int64_t* sizes, int64_t num_tensors,
                     DType dtype, float* out, int num_threads);

// The same on the current CUDA device. float32, bfloat16, float16.
// partials: masked_norm_chunks(sizes) floats of scratch, overwritten.
int masked_norm_cuda(const void* const* tensors, const int64_t* sizes, int64_t num_tensors,
                     DType dtype, float* partials, float* out, void* stream);

// What the linked CUDA runtime says of itself and of the machine.
const char* cuda_error_string(int status);
int cuda_device_count(int* count);
int cuda_versions(int* runtime, int* driver);

}  // namespace progtuning
