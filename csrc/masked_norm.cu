// masked_norm on CUDA: L2 or largest-magnitude norm over a list of tensors; and what the L2 norm of
// an optimizer's gradients means for a step.
//
// Maths       L2: sqrt(sum over tensors, elements of x^2); inf: largest |x|, NaN above all
// Storage     x: float32, bfloat16 or float16, contiguous, any alignment; partials, out: float32
// Arithmetic  squares and the 8192 of a chunk in float32 (32 per thread, then a tree), the chunk
//             sums and the root in float64. |x| > 1.8e19 overflows to inf, as in torch.
// Geometry    one block of 256 threads per chunk, each writing one slot of partials; the table of
//             tensors travels by value in the kernel's parameters, 448 tensors a launch, so that
//             nothing is copied to the device and a captured graph keeps its own table. One block
//             of 1024 threads then sums the slots: two kernels up to 448 tensors. A bucket has the
//             table of its chunks on the device already and needs its gradients' addresses only.
// Determinism no atomics. A thread owns the same elements whether they arrive in a 16-byte load or
//             one by one, so the bits depend on values and sizes alone, never on addresses.
// Alone       nvcc -O3 -std=c++17 --fmad=false -arch=sm_90 -Xptxas -v -c masked_norm.cu
//             (sm_80, sm_100, sm_120 likewise; nothing may spill)
#include "launchers.h"

#include <algorithm>
#include <climits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace progtuning {
namespace {

constexpr int kThreads = 256;
constexpr int kFinalThreads = 1024;
constexpr int kWarp = 32;

// 8976 bytes of kernel parameters: over 4 KiB needs toolkit 12.1 and driver 530; limit 32764.
constexpr int kTableTensors = 448;

struct NormTable {
  const void* tensors[kTableTensors];
  int64_t sizes[kTableTensors];
  int first_block[kTableTensors];  // of the launch; strictly increasing, empty tensors are left out
  int count;
};

template <typename T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

// How elements add up. Total: the type in which the chunks do.
struct L2 {
  using Total = double;
  static __device__ __forceinline__ float add(float sum, float x) { return fmaf(x, x, sum); }
  template <typename Float>
  static __device__ __forceinline__ Float merge(Float a, Float b) {
    return a + b;
  }
  static __device__ __forceinline__ float norm(double total) {
    return static_cast<float>(sqrt(total));
  }
};

// Magnitudes are compared as bits: they order alike, and NaN, which fmaxf would drop, is on top.
struct Largest {
  using Total = float;
  static __device__ __forceinline__ float add(float largest, float x) {
    return merge(largest, __int_as_float(__float_as_int(x) & 0x7fffffff));
  }
  static __device__ __forceinline__ float merge(float a, float b) {
    return __int_as_float(max(__float_as_int(a), __float_as_int(b)));
  }
  static __device__ __forceinline__ float norm(float total) { return total; }
};

// Adds vector v to a thread's lanes.
template <typename Kind, bool kAligned, typename T>
__device__ __forceinline__ void add_vector(const T* x, int v, float (&lanes)[Vector<T>::kSize]) {
  constexpr int kSize = Vector<T>::kSize;
  Vector<T> vector;
  if constexpr (kAligned) {
    vector = reinterpret_cast<const Vector<T>*>(x)[v];
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) vector.values[i] = x[v * kSize + i];
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i) lanes[i] = Kind::add(lanes[i], widen(vector.values[i]));
}

// Adds a thread's share of n elements, at most a chunk: vector v belongs to thread v % kThreads,
// the n % kSize elements after the last vector to the first threads.
template <typename Kind, bool kAligned, typename T>
__device__ __forceinline__ void add_share(const T* x, int n, float (&lanes)[Vector<T>::kSize]) {
  constexpr int kSize = Vector<T>::kSize;
  constexpr int kRounds = static_cast<int>(kNormChunk) / (kThreads * kSize);
  static_assert(kNormChunk % (kThreads * kSize) == 0, "a full chunk is a whole number of rounds");
  const int thread = static_cast<int>(threadIdx.x);
  if (n == kNormChunk) {
    // A constant number of rounds puts five 16-byte loads in flight before the first use (sm_90).
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      add_vector<Kind, kAligned>(x, round * kThreads + thread, lanes);
    }
  } else {
    const int vectors = n / kSize;
    for (int v = thread; v < vectors; v += kThreads) add_vector<Kind, kAligned>(x, v, lanes);
    const int rest = vectors * kSize + thread;
    if (rest < n) lanes[0] = Kind::add(lanes[0], widen(x[rest]));
  }
}

// Sum over the block, in a fixed tree; valid in thread 0. One call per kernel.
template <typename Kind, int kBlockThreads, typename Float>
__device__ __forceinline__ Float block_sum(Float sum) {
  constexpr int kWarps = kBlockThreads / kWarp;
  __shared__ Float warp_sums[kWarps];
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    sum = Kind::merge(sum, __shfl_down_sync(0xffffffffu, sum, offset));
  }
  const int lane = threadIdx.x % kWarp;
  if (lane == 0) warp_sums[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x >= kWarp) return sum;
  sum = lane < kWarps ? warp_sums[lane] : Float(0);
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    sum = Kind::merge(sum, __shfl_down_sync(0xffffffffu, sum, offset));
  }
  return sum;
}

// Sum over n elements, at most a chunk; valid in thread 0.
template <typename Kind, typename T>
__device__ __forceinline__ float chunk_sum(const T* x, int n) {
  constexpr int kSize = Vector<T>::kSize;
  float lanes[kSize] = {};
  // A chunk starts at a multiple of 16 bytes, so this asks about the tensor, not about the chunk.
  if (reinterpret_cast<uintptr_t>(x) % 16 == 0) {
    add_share<Kind, true>(x, n, lanes);
  } else {
    add_share<Kind, false>(x, n, lanes);
  }
#pragma unroll
  for (int width = kSize / 2; width > 0; width /= 2) {
#pragma unroll
    for (int i = 0; i < width; ++i) lanes[i] = Kind::merge(lanes[i], lanes[i + width]);
  }
  return block_sum<Kind, kThreads>(lanes[0]);
}

template <typename Kind, typename T>
__global__ void __launch_bounds__(kThreads)
    norm_partials_kernel(const __grid_constant__ NormTable table, float* partials) {
  // The last tensor whose first block is not past this one: at most 9 steps, uniform in the block.
  const int block = static_cast<int>(blockIdx.x);
  int tensor = 0;
  for (int end = table.count; end - tensor > 1;) {
    const int middle = (tensor + end) / 2;
    if (table.first_block[middle] <= block) {
      tensor = middle;
    } else {
      end = middle;
    }
  }
  const int64_t start = static_cast<int64_t>(block - table.first_block[tensor]) * kNormChunk;
  const int n = static_cast<int>(min(kNormChunk, table.sizes[tensor] - start));
  const T* x = static_cast<const T*>(table.tensors[tensor]) + start;

  const float sum = chunk_sum<Kind>(x, n);
  if (threadIdx.x == 0) partials[block] = sum;
}

// Valid in thread 0 of the one block.
template <typename Kind>
__device__ __forceinline__ float norm_of(const float* partials, int64_t count) {
  typename Kind::Total sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kFinalThreads) {
    sum = Kind::merge(sum, static_cast<typename Kind::Total>(partials[i]));
  }
  return Kind::norm(block_sum<Kind, kFinalThreads>(sum));
}

template <typename Kind>
__global__ void __launch_bounds__(kFinalThreads)
    norm_final_kernel(const float* partials, int64_t count, float* out) {
  const float norm = norm_of<Kind>(partials, count);
  if (threadIdx.x == 0) *out = norm;
}

template <int kTensors>
struct Gradients {
  const void* tensors[kTensors];
};

template <typename T, int kTensors>
__global__ void __launch_bounds__(kThreads)
    bucket_partials_kernel(const UpdateRecord* table, const UpdateChunk* chunks, float* partials,
                           const __grid_constant__ Gradients<kTensors> grads) {
  const UpdateChunk place = chunks[blockIdx.x];
  const void* grad = grads.tensors[place.tensor];
  float sum = 0;
  if (grad != nullptr) {  // the same for the whole block
    const int64_t start = static_cast<int64_t>(place.chunk) * kNormChunk;
    const int n = static_cast<int>(min(kNormChunk, table[place.tensor].size - start));
    sum = chunk_sum<L2>(static_cast<const T*>(grad) + start, n);
  }
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kFinalThreads)
    norm_decision_kernel(const float* partials, int64_t count, const float* grad_scale,
                         const float* found_inf, float max_norm, bool skip_nonfinite,
                         float* control) {
  const float scaled_norm = norm_of<L2>(partials, count);
  if (threadIdx.x != 0) return;
  const float scale = grad_scale == nullptr ? 1.0f : *grad_scale;
  const float norm = scaled_norm / scale;
  float clip = 1.0f;
  if (max_norm > 0) {
    clip = max_norm / (norm + 1e-6f);
    if (clip > 1.0f) clip = 1.0f;  // not fminf, which would make a NaN 1
  }
  const bool skip =
      (found_inf != nullptr && *found_inf != 0) || (skip_nonfinite && !isfinite(norm));
  control[0] = norm;
  control[1] = clip / scale;
  control[2] = skip ? 1.0f : 0.0f;
  control[3] += control[2];
}

template <typename Kind, typename T>
cudaError_t launch_partials(const void* const* tensors, const int64_t* sizes, int64_t num_tensors,
                            float* partials, cudaStream_t stream) {
  NormTable table{};
  int64_t blocks = 0;
  const auto launch = [&]() -> cudaError_t {
    if (table.count == 0) return cudaSuccess;
    const dim3 grid(static_cast<unsigned int>(blocks));
    norm_partials_kernel<Kind, T><<<grid, kThreads, 0, stream>>>(table, partials);
    partials += blocks;
    table.count = 0;
    blocks = 0;
    return cudaGetLastError();
  };
  for (int64_t i = 0; i < num_tensors; ++i) {
    const int64_t chunks = masked_norm_chunks(&sizes[i], 1);
    if (chunks == 0) continue;
    if (chunks > INT_MAX) return cudaErrorInvalidValue;
    if (table.count == kTableTensors || blocks + chunks > INT_MAX) {
      const cudaError_t status = launch();
      if (status != cudaSuccess) return status;
    }
    table.tensors[table.count] = tensors[i];
    table.sizes[table.count] = sizes[i];
    table.first_block[table.count] = static_cast<int>(blocks);
    ++table.count;
    blocks += chunks;
  }
  return launch();
}

template <typename Kind>
cudaError_t launch_norm(const void* const* tensors, const int64_t* sizes, int64_t num_tensors,
                        DType dtype, float* partials, float* out, cudaStream_t stream) {
  cudaError_t status = cudaErrorInvalidValue;
  switch (dtype) {
    case DType::kFloat32:
      status = launch_partials<Kind, float>(tensors, sizes, num_tensors, partials, stream);
      break;
    case DType::kBFloat16:
      status = launch_partials<Kind, __nv_bfloat16>(tensors, sizes, num_tensors, partials, stream);
      break;
    case DType::kFloat16:
      status = launch_partials<Kind, __half>(tensors, sizes, num_tensors, partials, stream);
      break;
    default:
      break;
  }
  if (status != cudaSuccess) return status;
  const int64_t count = masked_norm_chunks(sizes, num_tensors);
  norm_final_kernel<Kind><<<1, kFinalThreads, 0, stream>>>(partials, count, out);
  return cudaGetLastError();
}

template <typename T, int kTensors>
cudaError_t launch_bucket(const UpdateRecord* table, const UpdateChunk* chunks, int64_t num_chunks,
                          void* const* grads, int64_t num_tensors, float* partials,
                          cudaStream_t stream) {
  Gradients<kTensors> by_value{};
  std::copy_n(grads, num_tensors, by_value.tensors);
  const dim3 grid(static_cast<unsigned int>(num_chunks));
  bucket_partials_kernel<T><<<grid, kThreads, 0, stream>>>(table, chunks, partials, by_value);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_bucket(const UpdateRecord* table, const UpdateChunk* chunks, int64_t num_chunks,
                          void* const* grads, int64_t num_tensors, float* partials,
                          cudaStream_t stream) {
  const auto launch = num_tensors <= kFewUpdateTensors ? launch_bucket<T, kFewUpdateTensors>
                                                       : launch_bucket<T, kUpdateTensors>;
  return launch(table, chunks, num_chunks, grads, num_tensors, partials, stream);
}

}  // namespace

int masked_norm_cuda(const void* const* tensors, const int64_t* sizes, int64_t num_tensors,
                     DType dtype, NormKind kind, float* partials, float* out, void* stream) {
  const auto launch = kind == NormKind::kInf ? launch_norm<Largest> : launch_norm<L2>;
  return launch(tensors, sizes, num_tensors, dtype, partials, out,
                static_cast<cudaStream_t>(stream));
}

int bucket_norm_partials_cuda(const UpdateRecord* table, const UpdateChunk* chunks,
                              int64_t num_chunks, void* const* grads, int64_t num_tensors,
                              DType dtype, float* partials, void* stream_handle) {
  if (num_tensors > kUpdateTensors || num_chunks > INT_MAX) return cudaErrorInvalidValue;
  if (num_chunks == 0) return cudaSuccess;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  switch (dtype) {
    case DType::kFloat32:
      return launch_bucket<float>(table, chunks, num_chunks, grads, num_tensors, partials, stream);
    case DType::kBFloat16:
      return launch_bucket<__nv_bfloat16>(table, chunks, num_chunks, grads, num_tensors, partials,
                                          stream);
    case DType::kFloat16:
      return launch_bucket<__half>(table, chunks, num_chunks, grads, num_tensors, partials, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

int norm_decision_cuda(const float* partials, int64_t count, const float* grad_scale,
                       const float* found_inf, float max_norm, bool skip_nonfinite, float* control,
                       void* stream_handle) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  norm_decision_kernel<<<1, kFinalThreads, 0, stream>>>(partials, count, grad_scale, found_inf,
                                                        max_norm, skip_nonfinite, control);
  return cudaGetLastError();
}

}  // namespace progtuning
