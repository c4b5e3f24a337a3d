// masked_norm on the CPU: the L2 norm over a list of tensors, in one parallel region; see
// README.md.
#include <algorithm>
#include <cmath>
#include <vector>

#include "formats.h"
#include "instruction_sets.h"
#include "launchers.h"

namespace progtuning {
namespace {

constexpr int kLanes = 32;

// Below this one thread needs 5 us for the whole list: too little to wake a team for.
constexpr int64_t kSerialElements = 32768;

template <typename Format>
PROGTUNING_RULE double chunk_total(const void* tensor, int64_t start, int64_t n) {
  const auto* x = static_cast<const typename Format::Stored*>(tensor) + start;
  const auto square = [x](int64_t i) { return double(Format::widen(x[i])) * Format::widen(x[i]); };
  double lanes[kLanes] = {};
  int64_t done = 0;
  for (; done + kLanes <= n; done += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += square(done + lane);
  }
  for (int lane = 0; done + lane < n; ++lane) lanes[lane] += square(done + lane);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}

// A function each, because only functions can be cloned.
using Kernel = double (*)(const void* tensor, int64_t start, int64_t n);
#define PROGTUNING_KERNEL(name, Format)                                         \
  PROGTUNING_CLONES double name(const void* tensor, int64_t start, int64_t n) { \
    return chunk_total<Format>(tensor, start, n);                               \
  }
PROGTUNING_KERNEL(sum_float32, Float32)
PROGTUNING_KERNEL(sum_float64, Float64)
PROGTUNING_KERNEL(sum_bfloat16, BFloat16)
PROGTUNING_KERNEL(sum_float16, Float16)

Kernel find_kernel(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return sum_float32;
    case DType::kBFloat16:
      return sum_bfloat16;
    case DType::kFloat16:
      return sum_float16;
    case DType::kFloat64:
      return sum_float64;
    default:
      return nullptr;
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
  const Kernel kernel = find_kernel(dtype);
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

  double total = 0;
  for (const double partial : partials) total += partial;
  *out = static_cast<float>(std::sqrt(total));
  return true;
}

}  // namespace progtuning
