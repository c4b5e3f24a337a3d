// masked_norm on the CPU: norm over a list of tensors, in one parallel region.
//
// Maths       out = sqrt(sum over tensors, elements of x^2), or the largest |x|
// Storage     x: float32, bfloat16, float16 or float64, contiguous, any alignment; out: float32
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
#include <vector>

#include "formats.h"
#include "instruction_sets.h"

namespace progtuning {
namespace {

constexpr int kLanes = 32;

// Below this one thread needs 5 us for the whole list: too little to wake a team for.
constexpr int64_t kSerialElements = 32768;

// How two partial results of a kind become one; NaN wins over everything.
struct Sum {
  static PROGTUNING_RULE double of(double x) { return x * x; }
  static PROGTUNING_RULE double join(double a, double b) { return a + b; }
  static double norm(double total) { return std::sqrt(total); }
};
struct Largest {
  static PROGTUNING_RULE double of(double x) { return std::fabs(x); }
  static PROGTUNING_RULE double join(double a, double b) { return b > a || b != b ? b : a; }
  static double norm(double total) { return total; }
};

template <typename Format, typename Kind>
PROGTUNING_RULE double chunk_total(const void* tensor, int64_t start, int64_t n) {
  const auto* x = static_cast<const typename Format::Stored*>(tensor) + start;
  double lanes[kLanes] = {};
  int64_t done = 0;
  for (; done + kLanes <= n; done += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      lanes[lane] = Kind::join(lanes[lane], Kind::of(Format::widen(x[done + lane])));
    }
  }
  for (int lane = 0; done + lane < n; ++lane) {
    lanes[lane] = Kind::join(lanes[lane], Kind::of(Format::widen(x[done + lane])));
  }
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) {
      lanes[lane] = Kind::join(lanes[lane], lanes[lane + width]);
    }
  }
  return lanes[0];
}

// A function each, because only functions can be cloned.
using Kernel = double (*)(const void* tensor, int64_t start, int64_t n);
#define PROGTUNING_KERNEL(name, Format, Kind)                                       \
  PROGTUNING_CLONES double name(const void* tensor, int64_t start, int64_t n) {     \
    return chunk_total<Format, Kind>(tensor, start, n);                             \
  }
PROGTUNING_KERNEL(sum_float32, Float32, Sum)
PROGTUNING_KERNEL(sum_float64, Float64, Sum)
PROGTUNING_KERNEL(sum_bfloat16, BFloat16, Sum)
PROGTUNING_KERNEL(sum_float16, Float16, Sum)
PROGTUNING_KERNEL(largest_float32, Float32, Largest)
PROGTUNING_KERNEL(largest_float64, Float64, Largest)
PROGTUNING_KERNEL(largest_bfloat16, BFloat16, Largest)
PROGTUNING_KERNEL(largest_float16, Float16, Largest)

Kernel find_kernel(DType dtype, NormKind kind) {
  const bool sum = kind == NormKind::kL2;
  switch (dtype) {
    case DType::kFloat32:
      return sum ? sum_float32 : largest_float32;
    case DType::kBFloat16:
      return sum ? sum_bfloat16 : largest_bfloat16;
    case DType::kFloat16:
      return sum ? sum_float16 : largest_float16;
    case DType::kFloat64:
      return sum ? sum_float64 : largest_float64;
    default:
      return nullptr;
  }
}

template <typename Kind>
float joined(const std::vector<double>& partials) {
  double total = 0;
  for (const double partial : partials) total = Kind::join(total, partial);
  return static_cast<float>(Kind::norm(total));
}

}  // namespace

int64_t masked_norm_chunks(const int64_t* sizes, int64_t num_tensors) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < num_tensors; ++i) chunks += (sizes[i] + kNormChunk - 1) / kNormChunk;
  return chunks;
}

bool masked_norm_cpu(const void* const* tensors, const int64_t* sizes, int64_t num_tensors,
                     DType dtype, NormKind kind, float* out, int num_threads) {
  const Kernel kernel = find_kernel(dtype, kind);
  if (kernel == nullptr) return false;

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
    partials[chunk] = kernel(tensors[tensor], start, n);
  }

  *out = kind == NormKind::kL2 ? joined<Sum>(partials) : joined<Largest>(partials);
  return true;
}

}  // namespace progtuning
