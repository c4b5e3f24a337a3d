// Stands in for the CUDA toolkit: what csrc/*.cu use of it, for a C++ compiler and the CPU.
//
// Emulated: grids of blocks, blocks of threads, shared memory, barriers of a block and of a warp,
// and the exchange of values within a warp. Blocks run one after another in a random order. Threads
// are suspended at barriers only, and between two barriers they take turns in a random order, so a
// missing barrier is nearly always a wrong result. A barrier that only some of its threads reach is
// an error (stricter than a GPU, where a thread that has ended counts as having arrived).
//
// Not emulated: the order in which other threads see writes (fences do nothing), blocks at the same
// time, lanes in lockstep, masks (every one counts as full), streams, and the limits of driver and
// device: registers, shared memory, sizes of grids and of parameters. No launch fails. Shared
// memory is static, so a block finds in it what the one before has left. What the kernels call
// under __CUDA_ARCH__ (conversions, wide products) is not compiled: the formulas of the host take
// its place.
//
// A launch, kernel<<<grid, block, 0, stream>>>(arguments), is not C++: test_cuda_emulated.py makes
// emulation::launch(grid, block, 0, stream, [&] { kernel(arguments); }) of it.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __builtin_assume(condition) static_cast<void>(0)

using std::isfinite;
using std::max;
using std::min;

struct dim3 {  // one dimension is all that the kernels use
  unsigned int x;
  dim3(unsigned int x) : x(x) {}
};
extern dim3 gridDim, blockDim, blockIdx, threadIdx;

struct alignas(8) uint2 {
  unsigned int x, y;
};
struct alignas(16) uint4 {
  unsigned int x, y, z, w;
};
inline uint2 make_uint2(unsigned int x, unsigned int y) { return {x, y}; }
inline uint4 make_uint4(unsigned int x, unsigned int y, unsigned int z, unsigned int w) {
  return {x, y, z, w};
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
inline const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaSuccess ? "no error" : "invalid argument";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = 0;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
// An H200's multiprocessors, with 6 blocks of every kernel on each.
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 132;
  return cudaSuccess;
}
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int,
                                                                 size_t) {
  *blocks = 6;
  return cudaSuccess;
}

namespace emulation {

constexpr unsigned int kWarp = 32;

// Runs all threads of all blocks to their end. kernel: the call of one thread.
// Throws std::logic_error where threads wait for each other at different barriers.
void launch(dim3 grid, dim3 block, size_t dynamic_shared_bytes, cudaStream_t stream,
            const std::function<void()>& kernel);

// The value of every lane of this thread's warp; a barrier before and after.
std::array<uint64_t, kWarp> lanes(uint64_t value);

}  // namespace emulation

void __syncthreads();
void __syncwarp();
inline void __threadfence() {}

inline bool __isGlobal(const void*) { return true; }

inline unsigned int atomicInc(unsigned int* address, unsigned int largest) {
  const unsigned int old = *address;
  *address = old >= largest ? 0 : old + 1;
  return old;
}

inline float __int_as_float(int bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline int __float_as_int(float x) {
  int bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline unsigned int __byte_perm(unsigned int x, unsigned int y, unsigned int selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  unsigned int result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned int place = selector >> 4 * i & 7;
    result |= static_cast<unsigned int>(bytes >> 8 * place & 0xff) << 8 * i;
  }
  return result;
}

template <typename T>
T __shfl_down_sync(unsigned int, T x, unsigned int offset) {
  uint64_t value = 0;
  std::memcpy(&value, &x, sizeof x);
  const auto values = emulation::lanes(value);
  const unsigned int lane = threadIdx.x % emulation::kWarp, from = lane + offset;
  std::memcpy(&x, &values[from < emulation::kWarp ? from : lane], sizeof x);
  return x;
}

inline unsigned int __reduce_max_sync(unsigned int, unsigned int x) {
  const auto values = emulation::lanes(x);
  return static_cast<unsigned int>(*std::max_element(values.begin(), values.end()));
}
