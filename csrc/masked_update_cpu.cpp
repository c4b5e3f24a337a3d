// masked_update on the CPU: AdamW over a bucket in one parallel region; see README.md.
#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "formats.h"
#include "instruction_sets.h"
#include "launchers.h"
#include "update_chunk.h"

namespace progtuning {
namespace {

// 8192 float32 are 229 KB with their gradients and moments: a share of a second-level cache.
constexpr int64_t kUpdateChunk = 8192;
static_assert(kRun == kQuantBlock && kUpdateChunk % kRun == 0, "a chunk is a whole number of runs");

// Below this one thread needs about 10 us: too little to wake a team for.
constexpr int64_t kSerialElements = 16384;

template <typename Compute>
PROGTUNING_RULE const AdamW<Compute>& numbers(const Chunk& chunk) {
  if constexpr (sizeof(Compute) == sizeof(double)) {
    return chunk.at_double;
  } else {
    return chunk.at;
  }
}

PROGTUNING_RULE void draw(const Chunk& chunk, int64_t first, RandomStream stream,
                          uint16_t (&random)[kRun]) {
  draw_run(chunk.run(first, stream), random);
}

// Loops that convert stand apart from the loop that computes: mixed, the compilers vectorise them
// badly or not at all (4.0 against 0.9 ns per element with everything in bfloat16).
template <typename Format>
PROGTUNING_RULE typename Format::Compute* widened(typename Format::Stored* x, int n,
                                                  typename Format::Compute (&buffer)[kRun]) {
  if constexpr (std::is_same_v<typename Format::Stored, typename Format::Compute>) {
    return x;
  } else {
    for (int i = 0; i < n; ++i) buffer[i] = Format::widen(x[i]);
    return buffer;
  }
}

template <typename Format>
PROGTUNING_RULE void narrow(const typename Format::Compute* x, const uint16_t* random, int n,
                            typename Format::Stored* out) {
  if constexpr (!std::is_same_v<typename Format::Stored, typename Format::Compute>) {
    if constexpr (std::is_same_v<Format, StochasticBFloat16>) {
      for (int i = 0; i < n; ++i) out[i] = Format::narrow(x[i], random[i]);
    } else {
      for (int i = 0; i < n; ++i) out[i] = Format::narrow(x[i], 0);
    }
  }
}

// What is read and written of a run's parameters, in the type that computes.
template <typename Param, Master kMaster>
struct Params {
  using Compute = typename Param::Compute;
  using Stored = typename Param::Stored;

  PROGTUNING_RULE Params(const Chunk& chunk, int64_t first, int n)
      : stored(static_cast<Stored*>(chunk.tensor->param) + first) {
    if constexpr (kMaster == Master::kFloat32) {
      p = static_cast<float*>(chunk.tensor->master) + first;
    } else {
      p = widened<Param>(stored, n, p_buffer);
    }
    if constexpr (kMaster == Master::kResidual) {
      const int8_t* residual = residuals(chunk, first);
      for (int i = 0; i < n; ++i) p[i] = float_of(with_residual(bits_of(p[i]), +residual[i]));
    }
    g = widened<Param>(static_cast<Stored*>(chunk.grad) + first, n, g_buffer);
  }

  PROGTUNING_RULE void store(const Chunk& chunk, int64_t first, int n) {
    uint16_t random[kRun];
    if constexpr (kMaster == Master::kResidual) {
      draw(chunk, first, RandomStream::kMoments, random);
      int8_t* residual = residuals(chunk, first);
      for (int i = 0; i < n; ++i) {
        const uint32_t bits = rounded_to_24_bits<uint32_t>(bits_of(p[i]), random[i]);
        stored[i] = static_cast<Stored>(nearest_of_24_bits(bits) >> 16);
        residual[i] = static_cast<int8_t>(bits >> 8);
      }
      return;
    }
    if constexpr (std::is_same_v<Param, StochasticBFloat16>) {
      draw(chunk, first, RandomStream::kParam, random);
    }
    narrow<Param>(p, random, n, stored);
  }

  static PROGTUNING_RULE int8_t* residuals(const Chunk& chunk, int64_t first) {
    return static_cast<int8_t*>(chunk.tensor->master) + first;
  }

  Stored* stored;
  Compute* p;
  const Compute* g;
  Compute p_buffer[kRun], g_buffer[kRun];
};

// float32 parameters with bfloat16 moments are the exception: everything in one loop takes 0.62 ns
// per element there, in several 0.80.
PROGTUNING_RULE void mixed_run(const Chunk& chunk, int64_t first, int n) {
  float* __restrict p = static_cast<float*>(chunk.tensor->param) + first;
  const float* __restrict g = static_cast<const float*>(chunk.grad) + first;
  uint16_t* __restrict m = static_cast<uint16_t*>(chunk.tensor->exp_avg) + first;
  uint16_t* __restrict v = static_cast<uint16_t*>(chunk.tensor->exp_avg_sq) + first;
  const AdamW<float> at = chunk.at;
  uint16_t random[kRun];
  draw(chunk, first, RandomStream::kMoments, random);
  for (int i = 0; i < n; ++i) {
    float exp_avg = widen_bfloat16(m[i]), exp_avg_sq = widen_bfloat16(v[i]);
    adamw<float>(at, g[i], p[i], exp_avg, exp_avg_sq);
    m[i] = stochastic_bfloat16(exp_avg, random[i]);
    v[i] = stochastic_bfloat16(exp_avg_sq, swapped_bytes(random[i]));
  }
}

template <typename Param, typename Moment, Master kMaster>
PROGTUNING_RULE void plain_run(const Chunk& chunk, int64_t first, int n) {
  using Compute = typename Param::Compute;
  using Stored = typename Moment::Stored;
  if constexpr (std::is_same_v<Param, Float32> && std::is_same_v<Moment, StochasticBFloat16>) {
    mixed_run(chunk, first, n);
    return;
  }
  Stored* m_stored = static_cast<Stored*>(chunk.tensor->exp_avg) + first;
  Stored* v_stored = static_cast<Stored*>(chunk.tensor->exp_avg_sq) + first;
  Params<Param, kMaster> params(chunk, first, n);
  Compute m_buffer[kRun], v_buffer[kRun];
  Compute* __restrict p = params.p;
  const Compute* __restrict g = params.g;
  Compute* __restrict m = widened<Moment>(m_stored, n, m_buffer);
  Compute* __restrict v = widened<Moment>(v_stored, n, v_buffer);
  const AdamW<Compute> at = numbers<Compute>(chunk);
  for (int i = 0; i < n; ++i) adamw<Compute>(at, g[i], p[i], m[i], v[i]);
  params.store(chunk, first, n);
  if constexpr (std::is_same_v<Moment, StochasticBFloat16>) {
    uint16_t random[kRun];
    draw(chunk, first, RandomStream::kMoments, random);
    narrow<Moment>(m, random, n, m_stored);
    for (int i = 0; i < n; ++i) random[i] = static_cast<uint16_t>(swapped_bytes(random[i]));
    narrow<Moment>(v, random, n, v_stored);
  }
}

PROGTUNING_RULE uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

template <typename Param, Master kMaster>
PROGTUNING_RULE void eight_bit_run(const Chunk& chunk, int64_t first, int n) {
  const UpdateRecord& tensor = *chunk.tensor;
  int8_t* m_code = static_cast<int8_t*>(tensor.exp_avg) + first;
  uint8_t* v_code = static_cast<uint8_t*>(tensor.exp_avg_sq) + first;
  float& m_scale = tensor.exp_avg_scale[first / kQuantBlock];
  float& v_scale = tensor.exp_avg_sq_scale[first / kQuantBlock];
  Params<Param, kMaster> params(chunk, first, n);
  float* __restrict p = params.p;
  const float* __restrict g = params.g;
  const AdamW<float> at = chunk.at;
  const float m_before = m_scale, v_before = v_scale;
  float m[kRun], v[kRun];
  uint32_t largest_m = 0, largest_v = 0;  // as bits: magnitudes order alike, and NaN stays on top
  for (int i = 0; i < n; ++i) {
    m[i] = decode_exp_avg(static_cast<float>(m_code[i]), m_before);
    v[i] = decode_exp_avg_sq(static_cast<float>(v_code[i]), v_before);
    adamw<float>(at, g[i], p[i], m[i], v[i]);
    largest_m = larger(largest_m, bits_of(m[i]) & 0x7fffffffu);
    largest_v = larger(largest_v, bits_of(v[i]));  // with its sign a NaN is larger still
  }
  params.store(chunk, first, n);
  m_scale = float_of(largest_m);
  v_scale = float_of(largest_v & 0x7fffffffu);
  const float m_inverse = inverse_of_largest(m_scale), v_inverse = inverse_of_largest(v_scale);
  uint16_t random[kRun];
  draw(chunk, first, RandomStream::kMoments, random);
  for (int i = 0; i < n; ++i) m_code[i] = static_cast<int8_t>(encode_exp_avg(m[i], m_inverse));
  for (int i = 0; i < n; ++i) {
    v_code[i] = static_cast<uint8_t>(encode_exp_avg_sq(v[i], v_inverse, random[i]) >> 16);
  }
}

template <typename Param, typename Moment, Master kMaster>
PROGTUNING_RULE void update(const Chunk& chunk) {
  for (int64_t done = 0; done < chunk.n; done += kRun) {
    const int n = static_cast<int>(std::min<int64_t>(kRun, chunk.n - done));
    const int64_t first = chunk.start + done;
    if constexpr (std::is_same_v<Moment, EightBit>) {
      if (chunk.tensor->exp_avg_scale != nullptr) {
        eight_bit_run<Param, kMaster>(chunk, first, n);
      } else {
        plain_run<Param, Float32, kMaster>(chunk, first, n);
      }
    } else {
      plain_run<Param, Moment, kMaster>(chunk, first, n);
    }
  }
}

// A function each, because only functions can be cloned.
#define PROGTUNING_KERNEL(name, Param, Moment, kMaster) \
  PROGTUNING_CLONES void name(const Chunk& chunk) { update<Param, Moment, kMaster>(chunk); }

#define PROGTUNING_KERNELS(name, Param, kMaster)                         \
  PROGTUNING_KERNEL(name##_float32, Param, Float32, kMaster)             \
  PROGTUNING_KERNEL(name##_bfloat16, Param, StochasticBFloat16, kMaster) \
  PROGTUNING_KERNEL(name##_8bit, Param, EightBit, kMaster)               \
  UpdateKernel name(DType moments) {                                     \
    return moments == DType::kFloat32    ? name##_float32                \
           : moments == DType::kBFloat16 ? name##_bfloat16               \
           : moments == DType::kInt8     ? name##_8bit                   \
                                         : nullptr;                      \
  }

PROGTUNING_KERNEL(update_float64, Float64, Float64, Master::kNone)
PROGTUNING_KERNELS(update_float32, Float32, Master::kNone)
PROGTUNING_KERNELS(update_bfloat16, BFloat16, Master::kNone)
PROGTUNING_KERNELS(update_bfloat16_stochastic, StochasticBFloat16, Master::kNone)
PROGTUNING_KERNELS(update_bfloat16_master, BFloat16, Master::kFloat32)
PROGTUNING_KERNELS(update_bfloat16_residual, BFloat16, Master::kResidual)
PROGTUNING_KERNELS(update_float16_master, Float16, Master::kFloat32)

UpdateKernel find_kernel(const UpdateVariant& variant) {
  const DType moments = variant.moments;
  const bool plain = variant.master == Master::kNone;
  switch (variant.param) {
    case DType::kFloat64:
      return moments == DType::kFloat64 && plain ? update_float64 : nullptr;
    case DType::kFloat32:
      return plain ? update_float32(moments) : nullptr;
    case DType::kBFloat16:
      return variant.master == Master::kFloat32    ? update_bfloat16_master(moments)
             : variant.master == Master::kResidual ? update_bfloat16_residual(moments)
             : variant.stochastic_rounding         ? update_bfloat16_stochastic(moments)
                                                   : update_bfloat16(moments);
    case DType::kFloat16:
      return variant.master == Master::kFloat32 ? update_float16_master(moments) : nullptr;
    default:
      return nullptr;
  }
}

UpdateKernel find_whole_runs(const UpdateVariant& variant) {
#ifdef PROGTUNING_VERSIONS
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return whole_runs_avx512(variant);
  }
#endif
  return nullptr;
}

size_t element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

}  // namespace

bool masked_update_cpu(const UpdateRecord* table, int64_t num_tensors, void* const* grads,
                       const UpdateHyper* groups, const UpdateVariant& variant,
                       const UpdateStep& step, int num_threads) {
  const UpdateKernel kernel = find_kernel(variant), whole_runs = find_whole_runs(variant);
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
    if (!skip) {
      Chunk rest = chunk;
      // in a bucket with codes, a tensor without scales has none
      if (whole_runs != nullptr &&
          (variant.moments != DType::kInt8 || chunk.tensor->exp_avg_scale != nullptr)) {
        whole_runs(chunk);
        rest.start += chunk.n / kRun * kRun;
        rest.n %= kRun;
      }
      kernel(rest);
    }
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
