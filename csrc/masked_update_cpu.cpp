// masked_update on the CPU: AdamW over all tensors of a bucket, in one parallel region.
//
// Maths       update_rules.h
// Storage     p, g: float32, bfloat16, float16 (with a float32 master) or float64; m, v: float32,
//             bfloat16, 8-bit codes or float64; contiguous or in one order of dimensions, any
//             alignment
// Arithmetic  float32, float64 for float64
// Work split  fixed chunks of kUpdateChunk elements, numbered through all tensors, threads take
//             runs of them. Inside a chunk runs of 256 elements: one block of 8-bit codes, and
//             random numbers that stay in the first cache.
// Determinism every element is its own, the random numbers come from its index: the same bits for
//             any number of threads and any instruction set.
// Alone       g++ -O3 -std=c++17 -fopenmp -fno-math-errno -ffp-contract=off -c masked_update_cpu.cpp
#include "launchers.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "instruction_sets.h"
#include "update_rules.h"

namespace progtuning {
namespace {

// 8192 float32 are 229 KB with their gradients and moments: a share of a second-level cache.
constexpr int64_t kUpdateChunk = 8192;
constexpr int kRun = kQuantBlock;
static_assert(kUpdateChunk % kRun == 0, "a chunk is a whole number of runs");

// Below this one thread needs about 10 us: too little to wake a team for.
constexpr int64_t kSerialElements = 16384;

// How the parameter, or its gradient, is stored.
struct Float32 {
  using Stored = float;
  using Compute = float;
  static PROGTUNING_RULE float widen(float x) { return x; }
  static PROGTUNING_RULE float narrow(float x, uint32_t) { return x; }
};
struct Float64 {
  using Stored = double;
  using Compute = double;
  static PROGTUNING_RULE double widen(double x) { return x; }
  static PROGTUNING_RULE double narrow(double x, uint32_t) { return x; }
};
struct BFloat16 {
  using Stored = uint16_t;
  using Compute = float;
  static PROGTUNING_RULE float widen(uint16_t x) { return widen_bfloat16(x); }
  static PROGTUNING_RULE uint16_t narrow(float x, uint32_t) { return nearest_bfloat16(x); }
};
struct StochasticBFloat16 : BFloat16 {
  static PROGTUNING_RULE uint16_t narrow(float x, uint32_t random) {
    return stochastic_bfloat16(x, random);
  }
};
struct Float16 {
  using Stored = uint16_t;
  using Compute = float;
  static PROGTUNING_RULE float widen(uint16_t x) { return widen_float16(x); }
  static PROGTUNING_RULE uint16_t narrow(float x, uint32_t) { return nearest_float16(x); }
};

// A chunk of one tensor, n elements from element `start`.
struct Chunk {
  const UpdateRecord* tensor;
  void* grad;
  int64_t start;
  int64_t n;
  const UpdateStep* step;
  AdamW<float> at;
  AdamW<double> at_double;
};

template <typename Compute>
PROGTUNING_RULE const AdamW<Compute>& numbers(const Chunk& chunk) {
  if constexpr (sizeof(Compute) == sizeof(double)) {
    return chunk.at_double;
  } else {
    return chunk.at;
  }
}

// 16 random bits for each element of a run.
PROGTUNING_RULE void draw(const Chunk& chunk, int64_t element, RandomStream stream,
                          uint16_t (&random)[kRun]) {
  uint32_t words[kRun / 2];
  const uint32_t step = static_cast<uint32_t>(*chunk.tensor->step) + 1;
  const uint32_t tensor = chunk.tensor->index;
  const uint64_t seed = chunk.step->seed, eighth = static_cast<uint64_t>(element) / 8;
  for (int i = 0; i < kRun / 8; ++i) {
    const RandomWords drawn = philox(seed, eighth + i, stream, tensor, step);
    for (int word = 0; word < 4; ++word) words[4 * i + word] = drawn.word[word];
  }
  for (int i = 0; i < kRun / 2; ++i) {
    random[2 * i] = static_cast<uint16_t>(words[i]);
    random[2 * i + 1] = static_cast<uint16_t>(words[i] >> 16);
  }
}

template <typename Param, typename Moment, bool kMaster, bool kDrawParam>
PROGTUNING_RULE void plain_run(const Chunk& chunk, int64_t first, int n) {
  using Compute = typename Param::Compute;
  using Stored = typename Param::Stored;
  constexpr bool kDrawMoments = std::is_same_v<Moment, StochasticBFloat16>;
  const UpdateRecord& tensor = *chunk.tensor;
  Stored* __restrict p = static_cast<Stored*>(tensor.param) + first;
  const Stored* __restrict g = static_cast<const Stored*>(chunk.grad) + first;
  auto* __restrict m = static_cast<typename Moment::Stored*>(tensor.exp_avg) + first;
  auto* __restrict v = static_cast<typename Moment::Stored*>(tensor.exp_avg_sq) + first;
  float* __restrict master = kMaster ? tensor.master + first : nullptr;
  const AdamW<Compute> at = numbers<Compute>(chunk);

  uint16_t random_p[kRun], random_m[kRun], random_v[kRun];
  if constexpr (kDrawParam) draw(chunk, first, RandomStream::kParam, random_p);
  if constexpr (kDrawMoments) draw(chunk, first, RandomStream::kExpAvg, random_m);
  if constexpr (kDrawMoments) draw(chunk, first, RandomStream::kExpAvgSq, random_v);
  for (int i = 0; i < n; ++i) {
    Compute param, exp_avg = Moment::widen(m[i]), exp_avg_sq = Moment::widen(v[i]);
    if constexpr (kMaster) {
      param = master[i];
    } else {
      param = Param::widen(p[i]);
    }
    adamw<Compute>(at, Param::widen(g[i]), param, exp_avg, exp_avg_sq);
    if constexpr (kMaster) master[i] = param;
    p[i] = Param::narrow(param, kDrawParam ? random_p[i] : 0);
    m[i] = Moment::narrow(exp_avg, kDrawMoments ? random_m[i] : 0);
    v[i] = Moment::narrow(exp_avg_sq, kDrawMoments ? random_v[i] : 0);
  }
}

template <typename Param, bool kMaster, bool kDrawParam>
PROGTUNING_RULE void eight_bit_run(const Chunk& chunk, int64_t first, int n) {
  using Stored = typename Param::Stored;
  const UpdateRecord& tensor = *chunk.tensor;
  Stored* __restrict p = static_cast<Stored*>(tensor.param) + first;
  const Stored* __restrict g = static_cast<const Stored*>(chunk.grad) + first;
  int8_t* __restrict m_code = static_cast<int8_t*>(tensor.exp_avg) + first;
  uint8_t* __restrict v_code = static_cast<uint8_t*>(tensor.exp_avg_sq) + first;
  float* m_scale = tensor.exp_avg_scale + first / kQuantBlock;
  float* v_scale = tensor.exp_avg_sq_scale + first / kQuantBlock;
  float* __restrict master = kMaster ? tensor.master + first : nullptr;
  const AdamW<float> at = chunk.at;

  uint16_t random_p[kRun], random_v[kRun];
  if constexpr (kDrawParam) draw(chunk, first, RandomStream::kParam, random_p);
  draw(chunk, first, RandomStream::kExpAvgSq, random_v);
  float m[kRun], v[kRun];
  const float m_before = *m_scale, v_before = *v_scale;
  int32_t largest_m = 0, largest_v = 0;  // as bits: magnitudes order alike, and NaN stays on top
  for (int i = 0; i < n; ++i) {
    float param;
    float exp_avg = decode_exp_avg(m_code[i], m_before);
    float exp_avg_sq = decode_exp_avg_sq(v_code[i], v_before);
    if constexpr (kMaster) {
      param = master[i];
    } else {
      param = Param::widen(p[i]);
    }
    adamw<float>(at, Param::widen(g[i]), param, exp_avg, exp_avg_sq);
    if constexpr (kMaster) master[i] = param;
    p[i] = Param::narrow(param, kDrawParam ? random_p[i] : 0);
    m[i] = exp_avg;
    v[i] = exp_avg_sq;
    const int32_t m_bits = static_cast<int32_t>(bits_of(exp_avg) & 0x7fffffffu);
    const int32_t v_bits = static_cast<int32_t>(bits_of(exp_avg_sq) & 0x7fffffffu);
    largest_m = m_bits > largest_m ? m_bits : largest_m;
    largest_v = v_bits > largest_v ? v_bits : largest_v;
  }
  *m_scale = float_of(static_cast<uint32_t>(largest_m));
  *v_scale = float_of(static_cast<uint32_t>(largest_v));
  const float m_inverse = inverse_of_largest(*m_scale), v_inverse = inverse_of_largest(*v_scale);
  for (int i = 0; i < n; ++i) {
    m_code[i] = static_cast<int8_t>(encode_exp_avg(m[i], m_inverse));
    v_code[i] = static_cast<uint8_t>(encode_exp_avg_sq(v[i], v_inverse, random_v[i]));
  }
}

struct EightBit {};  // moments as codes, float32 in tensors without scales

template <typename Param, typename Moment, bool kMaster>
PROGTUNING_RULE void update(const Chunk& chunk) {
  constexpr bool kDrawParam = std::is_same_v<Param, StochasticBFloat16>;
  for (int64_t done = 0; done < chunk.n; done += kRun) {
    const int n = static_cast<int>(std::min<int64_t>(kRun, chunk.n - done));
    const int64_t first = chunk.start + done;
    if constexpr (std::is_same_v<Moment, EightBit>) {
      if (chunk.tensor->exp_avg_scale != nullptr) {
        eight_bit_run<Param, kMaster, kDrawParam>(chunk, first, n);
      } else {
        plain_run<Param, Float32, kMaster, kDrawParam>(chunk, first, n);
      }
    } else {
      plain_run<Param, Moment, kMaster, kDrawParam>(chunk, first, n);
    }
  }
}

using Kernel = void (*)(const Chunk&);

// A function each, because only functions can be cloned.
#define PROGTUNING_KERNEL(name, Param, Moment, kMaster) \
  PROGTUNING_CLONES void name(const Chunk& chunk) { update<Param, Moment, kMaster>(chunk); }

#define PROGTUNING_KERNELS(name, Param, kMaster)                              \
  PROGTUNING_KERNEL(name##_float32, Param, Float32, kMaster)                  \
  PROGTUNING_KERNEL(name##_bfloat16, Param, StochasticBFloat16, kMaster)      \
  PROGTUNING_KERNEL(name##_8bit, Param, EightBit, kMaster)                    \
  Kernel name(DType moments) {                                                \
    return moments == DType::kFloat32    ? name##_float32                     \
           : moments == DType::kBFloat16 ? name##_bfloat16                    \
           : moments == DType::kInt8     ? name##_8bit                        \
                                         : nullptr;                           \
  }

PROGTUNING_KERNEL(update_float64, Float64, Float64, false)
PROGTUNING_KERNELS(update_float32, Float32, false)
PROGTUNING_KERNELS(update_bfloat16, BFloat16, false)
PROGTUNING_KERNELS(update_bfloat16_stochastic, StochasticBFloat16, false)
PROGTUNING_KERNELS(update_bfloat16_master, BFloat16, true)
PROGTUNING_KERNELS(update_float16_master, Float16, true)

Kernel find_kernel(const UpdateVariant& variant) {
  switch (variant.param) {
    case DType::kFloat64:
      return variant.moments == DType::kFloat64 && !variant.master ? update_float64 : nullptr;
    case DType::kFloat32:
      return variant.master ? nullptr : update_float32(variant.moments);
    case DType::kBFloat16:
      if (variant.master) return update_bfloat16_master(variant.moments);
      return variant.stochastic_rounding ? update_bfloat16_stochastic(variant.moments)
                                         : update_bfloat16(variant.moments);
    case DType::kFloat16:
      return variant.master ? update_float16_master(variant.moments) : nullptr;
    default:
      return nullptr;
  }
}

size_t element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

template <typename Float>
AdamWHyper<Float> narrowed(const UpdateHyper& hyper) {
  return {static_cast<Float>(hyper.lr),
          static_cast<Float>(hyper.weight_decay),
          static_cast<Float>(hyper.eps),
          static_cast<Float>(hyper.beta1),
          static_cast<Float>(1 - hyper.beta1),
          static_cast<Float>(std::log(hyper.beta1)),
          static_cast<Float>(hyper.beta2),
          static_cast<Float>(1 - hyper.beta2),
          static_cast<Float>(std::log(hyper.beta2))};
}

}  // namespace

bool masked_update_cpu(const UpdateRecord* table, int64_t num_tensors, void* const* grads,
                       const UpdateHyper* groups, const UpdateVariant& variant,
                       const UpdateStep& step, int num_threads) {
  const Kernel kernel = find_kernel(variant);
  if (kernel == nullptr) return false;
  const bool skip = step.found_inf != nullptr && *step.found_inf != 0;
  if (skip && !step.zero_grads) return true;
  const float grad_factor = step.grad_factor == nullptr ? 1.0f : *step.grad_factor;

  std::vector<int64_t> first_chunk(num_tensors + 1, 0);
  std::vector<Chunk> tensors(num_tensors);
  int64_t elements = 0;
  for (int64_t i = 0; i < num_tensors; ++i) {
    const int64_t size = grads[i] == nullptr ? 0 : table[i].size;
    first_chunk[i + 1] = first_chunk[i] + (size + kUpdateChunk - 1) / kUpdateChunk;
    elements += size;
    if (size == 0) continue;
    const UpdateHyper& hyper = groups[table[i].group];
    const float t = *table[i].step + 1;
    Chunk& chunk = tensors[i];
    chunk = {&table[i], grads[i], 0, 0, &step, {}, {}};
    const AdamWHyper<float> single = narrowed<float>(hyper);
    chunk.at = adamw_at<float>(single, single.lr, t, grad_factor);
    chunk.at_double = adamw_at<double>(narrowed<double>(hyper), hyper.lr, t, grad_factor);
  }
  const int64_t chunks = first_chunk[num_tensors];
  if (elements < kSerialElements) num_threads = 1;

// guided: a thread that lost its core to another process does not keep the whole update waiting.
#pragma omp parallel for num_threads(num_threads) schedule(guided)
  for (int64_t i = 0; i < chunks; ++i) {
    const auto after = std::upper_bound(first_chunk.begin(), first_chunk.end(), i);
    const int64_t tensor = after - first_chunk.begin() - 1;
    Chunk chunk = tensors[tensor];
    chunk.start = (i - first_chunk[tensor]) * kUpdateChunk;
    chunk.n = std::min(kUpdateChunk, chunk.tensor->size - chunk.start);
    if (!skip) kernel(chunk);
    if (step.zero_grads) {
      const size_t bytes = element_size(variant.param);
      std::memset(static_cast<char*>(chunk.grad) + chunk.start * bytes, 0, chunk.n * bytes);
    }
  }

  for (int64_t i = 0; i < num_tensors && !skip; ++i) {
    if (grads[i] != nullptr) *table[i].step += 1;
  }
  return true;
}

}  // namespace progtuning
