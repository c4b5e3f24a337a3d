// masked_norm on CUDA, and what the norm of an optimizer's gradients means for a step; see
// README.md.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <climits>

#include "launchers.h"

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

// Adds the squares of vector v to a thread's lanes.
template <bool kAligned, typename T>
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
  for (int i = 0; i < kSize; ++i) {
    const float value = widen(vector.values[i]);
    lanes[i] = fmaf(value, value, lanes[i]);
  }
}

// Adds a thread's share of n elements, at most a chunk: vector v belongs to thread v % kThreads,
// the n % kSize elements after the last vector to the first threads.
template <bool kAligned, typename T>
__device__ __forceinline__ void add_share(const T* x, int n, float (&lanes)[Vector<T>::kSize]) {
  constexpr int kSize = Vector<T>::kSize;
  constexpr int kRounds = static_cast<int>(kNormChunk) / (kThreads * kSize);
  // Two or four 16-byte loads are under way before the first use: with more, the kernels need over
  // 32 registers, and an SM runs 6 blocks instead of 8.
  constexpr int kUnroll = kAligned ? 16 / kSize : 1;
  static_assert(kNormChunk % (kThreads * kSize) == 0, "a full chunk is a whole number of rounds");
  const int thread = static_cast<int>(threadIdx.x);
  if (n == kNormChunk) {
#pragma unroll kUnroll
    for (int round = 0; round < kRounds; ++round) {
      add_vector<kAligned>(x, round * kThreads + thread, lanes);
    }
  } else {
    const int vectors = n / kSize;
#pragma unroll kUnroll
    for (int v = thread; v < vectors; v += kThreads) add_vector<kAligned>(x, v, lanes);
    const int rest = vectors * kSize + thread;
    if (rest < n) lanes[0] = fmaf(widen(x[rest]), widen(x[rest]), lanes[0]);
  }
}

// Sum over the block, in a fixed tree; valid in thread 0. One call per kernel.
template <int kBlockThreads, typename Float>
__device__ __forceinline__ Float block_sum(Float sum) {
  constexpr int kWarps = kBlockThreads / kWarp;
  __shared__ Float warp_sums[kWarps];
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    sum += __shfl_down_sync(0xffffffffu, sum, offset);
  }
  const int lane = threadIdx.x % kWarp;
  if (lane == 0) warp_sums[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x >= kWarp) return sum;
  sum = lane < kWarps ? warp_sums[lane] : Float(0);
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    sum += __shfl_down_sync(0xffffffffu, sum, offset);
  }
  return sum;
}

// Sum over n elements, at most a chunk; valid in thread 0.
template <typename T>
__device__ __forceinline__ float chunk_sum(const T* x, int n) {
  constexpr int kSize = Vector<T>::kSize;
  float lanes[kSize] = {};
  // A chunk starts at a multiple of 16 bytes, so this asks about the tensor, not about the chunk.
  if (reinterpret_cast<uintptr_t>(x) % 16 == 0) {
    add_share<true>(x, n, lanes);
  } else {
    add_share<false>(x, n, lanes);
  }
#pragma unroll
  for (int width = kSize / 2; width > 0; width /= 2) {
#pragma unroll
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return block_sum<kThreads>(lanes[0]);
}

template <typename T>
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

  const float sum = chunk_sum(x, n);
  if (threadIdx.x == 0) partials[block] = sum;
}

// Valid in thread 0 of the one block.
__device__ __forceinline__ float norm_of(const float* partials, int64_t count) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kFinalThreads) {
    sum += static_cast<double>(partials[i]);
  }
  return static_cast<float>(sqrt(block_sum<kFinalThreads>(sum)));
}

__global__ void __launch_bounds__(kFinalThreads)
    norm_final_kernel(const float* partials, int64_t count, float* out) {
  const float norm = norm_of(partials, count);
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
    sum = chunk_sum(static_cast<const T*>(grad) + start, n);
  }
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kFinalThreads)
    norm_decision_kernel(const float* partials, int64_t count, const float* grad_scale,
                         const float* found_inf, float max_norm, bool skip_nonfinite,
                         float* control) {
  const float scaled_norm = norm_of(partials, count);
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

template <typename T>
cudaError_t launch_partials(const void* const* tensors, const int64_t* sizes, int64_t num_tensors,
                            float* partials, cudaStream_t stream) {
  NormTable table{};
  int64_t blocks = 0;
  const auto launch = [&]() -> cudaError_t {
    if (table.count == 0) return cudaSuccess;
    const dim3 grid(static_cast<unsigned int>(blocks));
    norm_partials_kernel<T><<<grid, kThreads, 0, stream>>>(table, partials);
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

// launch(T{}) with the type of a dtype.
template <typename Launch>
cudaError_t for_dtype(DType dtype, const Launch& launch) {
  switch (dtype) {
    case DType::kFloat32:
      return launch(float());
    case DType::kBFloat16:
      return launch(__nv_bfloat16());
    case DType::kFloat16:
      return launch(__half());
    default:
      return cudaErrorInvalidValue;
  }
}

template <typename T, int kTensors>
cudaError_t launch_bucket(const UpdateBucket& bucket, float* partials, cudaStream_t stream) {
  Gradients<kTensors> grads{};
  std::copy_n(bucket.grads, bucket.num_tensors, grads.tensors);
  const dim3 grid(static_cast<unsigned int>(bucket.num_chunks));
  const auto kernel = bucket_partials_kernel<T, kTensors>;
  kernel<<<grid, kThreads, 0, stream>>>(bucket.table, bucket.chunks, partials, grads);
  return cudaGetLastError();
}

}  // namespace

int masked_norm_cuda(const void* const* tensors, const int64_t* sizes, int64_t num_tensors,
                     DType dtype, float* partials, float* out, void* stream_handle) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  const cudaError_t status = for_dtype(dtype, [&](auto element) {
    return launch_partials<decltype(element)>(tensors, sizes, num_tensors, partials, stream);
  });
  if (status != cudaSuccess) return status;
  const int64_t count = masked_norm_chunks(sizes, num_tensors);
  norm_final_kernel<<<1, kFinalThreads, 0, stream>>>(partials, count, out);
  return cudaGetLastError();
}

int bucket_norm_partials_cuda(const UpdateBucket& bucket, DType dtype, float* partials,
                              void* stream) {
  if (bucket.num_tensors > kUpdateTensors || bucket.num_chunks > INT_MAX ||
      bucket.chunk_elements != kNormChunk) {
    return cudaErrorInvalidValue;
  }
  if (bucket.num_chunks == 0) return cudaSuccess;
  return for_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const auto launch = bucket.num_tensors <= kFewUpdateTensors
                            ? launch_bucket<T, kFewUpdateTensors>
                            : launch_bucket<T, kUpdateTensors>;
    return launch(bucket, partials, static_cast<cudaStream_t>(stream));
  });
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
