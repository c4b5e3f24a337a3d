// masked_norm on the CPU: L2 norm over a list of tensors, in one parallel region.
//
// Maths       out = sqrt(sum over tensors, elements of x^2)
// Storage     x: float32, bfloat16 or float64, contiguous, any alignment; out: float32
// Arithmetic  float64 throughout. The square of a float32 is exact in float64, and the loop waits
//             for memory either way (36 GB/s on one core from L2, 33 from DRAM), so this costs
//             nothing, cannot overflow where a float32 square does (|x| > 1.8e19), and gives the
//             correctly rounded norm in practice.
// Work split  fixed chunks of kNormChunk elements, numbered through all tensors; threads take runs
//             of chunks, so 199 small tensors cost one region, not 199.
// Fork        a forked child hangs in libgomp's regions unless num_threads is 1, as torch sets it
//             in its data-loader workers.
// Determinism kLanes interleaved sums per chunk, folded in a fixed order, then the chunk sums in
//             chunk order: the same bits for any number of threads and any instruction set.
// Alone       g++ -O3 -std=c++17 -fopenmp -fno-math-errno -ffp-contract=off -c masked_norm_cpu.cpp
#include "launchers.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "instruction_sets.h"

namespace progtuning {
namespace {

constexpr int kLanes = 32;

// Below this one thread needs 5 us for the whole list: too little to wake a team for.
constexpr int64_t kSerialElements = 32768;

inline double widen(float x) { return x; }
inline double widen(double x) { return x; }
inline double widen(uint16_t bfloat16) {
  const uint32_t bits = static_cast<uint32_t>(bfloat16) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

template <typename T>
[[gnu::always_inline]] inline double sum_squares(const T* x, int64_t n) {
  double lanes[kLanes] = {};
  int64_t done = 0;
  for (; done + kLanes <= n; done += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const double value = widen(x[done + lane]);
      lanes[lane] += value * value;
    }
  }
  for (int lane = 0; done + lane < n; ++lane) {
    const double value = widen(x[done + lane]);
    lanes[lane] += value * value;
  }
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}

PROGTUNING_CLONES double sum_squares_float32(const float* x, int64_t n) {
  return sum_squares(x, n);
}
PROGTUNING_CLONES double sum_squares_bfloat16(const uint16_t* x, int64_t n) {
  return sum_squares(x, n);
}
PROGTUNING_CLONES double sum_squares_float64(const double* x, int64_t n) {
  return sum_squares(x, n);
}

bool has_kernel(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kBFloat16 || dtype == DType::kFloat64;
}

double chunk_sum(const void* tensor, int64_t start, int64_t n, DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return sum_squares_float32(static_cast<const float*>(tensor) + start, n);
    case DType::kBFloat16:
      return sum_squares_bfloat16(static_cast<const uint16_t*>(tensor) + start, n);
    default:
      return sum_squares_float64(static_cast<const double*>(tensor) + start, n);
  }
}

}  // namespace

int64_t masked_norm_chunks(const int64_t* sizes, int64_t num_tensors) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < num_tensors; ++i) chunks += (sizes[i] + kNormChunk - 1) / kNormChunk;
  return chunks;
}

bool masked_norm_cpu(const void* const* tensors, const int64_t* sizes, int64_t num_tensors,
                     DType dtype, float* out, int num_threads) {
  if (!has_kernel(dtype)) return false;

  std::vector<int64_t> first_chunk(num_tensors + 1, 0);
  int64_t elements = 0;
  for (int64_t i = 0; i < num_tensors; ++i) {
    first_chunk[i + 1] = first_chunk[i] + masked_norm_chunks(&sizes[i], 1);
    elements += sizes[i];
  }
  const int64_t chunks = first_chunk[num_tensors];
  std::vector<double> partials(chunks);
  if (elements < kSerialElements) num_threads = 1;

// guided: a thread that lost its core to another process does not keep the whole norm waiting.
#pragma omp parallel for num_threads(num_threads) schedule(guided)
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const auto after = std::upper_bound(first_chunk.begin(), first_chunk.end(), chunk);
    const int64_t tensor = after - first_chunk.begin() - 1;
    const int64_t start = (chunk - first_chunk[tensor]) * kNormChunk;
    const int64_t n = std::min(kNormChunk, sizes[tensor] - start);
    partials[chunk] = chunk_sum(tensors[tensor], start, n, dtype);
  }

  double total = 0;
  for (const double partial : partials) total += partial;
  *out = static_cast<float>(std::sqrt(total));
  return true;
}

}  // namespace progtuning
