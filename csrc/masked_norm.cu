// masked_norm on CUDA: L2 norm over a list of tensors.
//
// Maths       out = sqrt(sum over tensors, elements of x^2)
// Storage     x: float32, bfloat16 or float16, contiguous, any alignment; partials, out: float32
// Arithmetic  squares and the 8192 of a chunk in float32 (32 per thread, then a tree), the chunk
//             sums and the root in float64. |x| > 1.8e19 overflows to inf, as in torch.
// Geometry    one block of 256 threads per chunk, each writing one slot of partials; the table of
//             tensors travels by value in the kernel's parameters, 448 tensors a launch, so that
//             nothing is copied to the device and a captured graph keeps its own table. One block
//             of 1024 threads then sums the slots: two kernels up to 448 tensors.
// Determinism no atomics. A thread owns the same elements whether they arrive in a 16-byte load or
//             one by one, so the bits depend on values and sizes alone, never on addresses.
// Alone       nvcc -O3 -std=c++17 -arch=sm_90 -Xptxas -v -c masked_norm.cu -o masked_norm.o
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

// Adds the squares of a thread's share of n elements, at most a chunk: vector v belongs to thread
// v % kThreads, the n % kSize elements after the last vector to the first threads.
template <bool kAligned, typename T>
__device__ __forceinline__ void add_squares(const T* x, int n, float (&lanes)[Vector<T>::kSize]) {
  constexpr int kSize = Vector<T>::kSize;
  constexpr int kRounds = static_cast<int>(kNormChunk) / (kThreads * kSize);
  static_assert(kNormChunk % (kThreads * kSize) == 0, "a full chunk is a whole number of rounds");
  const int thread = static_cast<int>(threadIdx.x);
  if (n == kNormChunk) {
    // A constant number of rounds puts five 16-byte loads in flight before the first use (sm_90).
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      add_vector<kAligned>(x, round * kThreads + thread, lanes);
    }
  } else {
    const int vectors = n / kSize;
    for (int v = thread; v < vectors; v += kThreads) add_vector<kAligned>(x, v, lanes);
    const int rest = vectors * kSize + thread;
    if (rest < n) {
      const float value = widen(x[rest]);
      lanes[0] = fmaf(value, value, lanes[0]);
    }
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

template <typename T>
__global__ void __launch_bounds__(kThreads)
    norm_partials_kernel(const __grid_constant__ NormTable table, float* partials) {
  constexpr int kSize = Vector<T>::kSize;

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

  float lanes[kSize] = {};
  // start is a multiple of 16 bytes, so this asks about the tensor, not about the chunk.
  if (reinterpret_cast<uintptr_t>(x) % 16 == 0) {
    add_squares<true>(x, n, lanes);
  } else {
    add_squares<false>(x, n, lanes);
  }

#pragma unroll
  for (int width = kSize / 2; width > 0; width /= 2) {
#pragma unroll
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  const float sum = block_sum<kThreads>(lanes[0]);
  if (threadIdx.x == 0) partials[block] = sum;
}

__global__ void __launch_bounds__(kFinalThreads)
    norm_final_kernel(const float* partials, int64_t count, float* out) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kFinalThreads) sum += partials[i];
  sum = block_sum<kFinalThreads>(sum);
  if (threadIdx.x == 0) *out = static_cast<float>(sqrt(sum));
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

}  // namespace

int masked_norm_cuda(const void* const* tensors, const int64_t* sizes, int64_t num_tensors,
                     DType dtype, float* partials, float* out, void* stream_handle) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  cudaError_t status = cudaErrorInvalidValue;
  switch (dtype) {
    case DType::kFloat32:
      status = launch_partials<float>(tensors, sizes, num_tensors, partials, stream);
      break;
    case DType::kBFloat16:
      status = launch_partials<__nv_bfloat16>(tensors, sizes, num_tensors, partials, stream);
      break;
    case DType::kFloat16:
      status = launch_partials<__half>(tensors, sizes, num_tensors, partials, stream);
      break;
    case DType::kFloat64:
      break;
  }
  if (status != cudaSuccess) return status;
  const int64_t count = masked_norm_chunks(sizes, num_tensors);
  norm_final_kernel<<<1, kFinalThreads, 0, stream>>>(partials, count, out);
  return cudaGetLastError();
}

}  // namespace progtuning
