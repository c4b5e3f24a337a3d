// masked_update for processors with AVX-512: runs of 256 elements whose moments are stored in 16 or
// 8 bits, in the same steps as the loops of masked_update_cpu.cpp, which compilers do not keep in
// registers; README.md counts the instructions.
#include "instruction_sets.h"

#ifdef PROGTUNING_VERSIONS

// before the pragma: what these define may be shared with files for all processors
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#include "lanes.h"
// after the vectors that its templates take
#include "formats.h"
#include "update_chunk.h"

namespace progtuning {
namespace {

template <typename T>
PROGTUNING_RULE T* at_element(void* x, int64_t first) {
  return static_cast<T*>(x) + first;
}

template <typename Param>
PROGTUNING_RULE void load_stored(void* x, int64_t first, Floats (&out)[4]) {
  if constexpr (std::is_same_v<Param, Float32>) {
    load(at_element<const float>(x, first), out);
  } else {
    Words upper[4];
    load_upper(at_element<const uint16_t>(x, first), upper);
    for (int k = 0; k < 4; ++k) out[k] = float_of(upper[k]);
  }
}

template <typename Param, Master kMaster>
PROGTUNING_RULE void load_params(const UpdateRecord& tensor, int64_t first, Floats (&p)[4]) {
  if constexpr (kMaster == Master::kFloat32) {
    load(at_element<const float>(tensor.master, first), p);
  } else if constexpr (kMaster == Master::kResidual) {
    Ints residual[4];
    load(at_element<const int8_t>(tensor.master, first), residual);
    load_stored<Param>(tensor.param, first, p);
    for (int k = 0; k < 4; ++k) p[k] = float_of(with_residual(bits_of(p[k]), residual[k]));
  } else {
    load_stored<Param>(tensor.param, first, p);
  }
}

PROGTUNING_RULE void store_stochastic(const Floats (&x)[4], const Words (&random)[4], void* out,
                                      int64_t first) {
  Words upper[4];
  for (int k = 0; k < 4; ++k) upper[k] = rounded(bits_of(x[k]), random[k]);
  store_upper(upper, at_element<uint16_t>(out, first));
}

// random: of the parameters where they are rounded stochastically, of the moments beside residuals.
template <typename Param, Master kMaster>
PROGTUNING_RULE void store_params(const UpdateRecord& tensor, int64_t first, const Floats (&p)[4],
                                  const uint16_t* random) {
  if constexpr (std::is_same_v<Param, Float32>) {
    store(p, at_element<float>(tensor.param, first));
  } else if constexpr (std::is_same_v<Param, StochasticBFloat16>) {
    Words drawn[4];
    load(random, drawn);
    store_stochastic(p, drawn, tensor.param, first);
  } else {
    Words bits[4], upper[4];
    for (int k = 0; k < 4; ++k) bits[k] = bits_of(p[k]);
    if constexpr (kMaster == Master::kResidual) {
      Words drawn[4];
      load(random, drawn);
      for (int k = 0; k < 4; ++k) {
        bits[k] = rounded_to_24_bits(bits[k], drawn[k]);
        upper[k] = nearest_of_24_bits(bits[k]);
      }
      store_second(bits, at_element<int8_t>(tensor.master, first));
    } else {
      for (int k = 0; k < 4; ++k) upper[k] = rounded_to_nearest(bits[k]);
    }
    store_upper(upper, at_element<uint16_t>(tensor.param, first));
    if constexpr (kMaster == Master::kFloat32) {
      store(p, at_element<float>(tensor.master, first));
    }
  }
}

// The largest magnitudes of a run, and the moments that wait for them before they become codes.
struct Largest {
  Words m{}, v{};

  // As bits: magnitudes order alike, and NaN stays on top; with its sign a NaN is larger still.
  PROGTUNING_RULE void see(const Floats (&m_new)[4], const Floats (&v_new)[4]) {
    for (int k = 0; k < 4; ++k) {
      m = larger(m, bits_of(m_new[k]) & 0x7fffffffu);
      v = larger(v, bits_of(v_new[k]));
    }
  }
};

PROGTUNING_RULE void read_codes(const int8_t* m_code, const uint8_t* v_code, float m_scale,
                                float v_scale, Floats (&m)[4], Floats (&v)[4]) {
  Ints m_codes[4], v_codes[4];
  load(m_code, m_codes);
  load(v_code, v_codes);
  for (int k = 0; k < 4; ++k) m[k] = decode_exp_avg(widened(m_codes[k]), m_scale);
  for (int k = 0; k < 4; ++k) v[k] = decode_exp_avg_sq(widened(v_codes[k]), v_scale);
}

PROGTUNING_RULE void write_codes(const float* m, const float* v, float m_scale, float v_scale,
                                 const uint16_t* random, int8_t* m_code, uint8_t* v_code) {
  const float m_inverse = inverse_of_largest(m_scale), v_inverse = inverse_of_largest(v_scale);
  if (!(m_scale < INFINITY && v_scale < INFINITY)) {  // at_most_one of vectors needs less
    for (int i = 0; i < kRun; ++i) {
      m_code[i] = static_cast<int8_t>(encode_exp_avg(m[i], m_inverse));
      v_code[i] = static_cast<uint8_t>(encode_exp_avg_sq(v[i], v_inverse, random[i]) >> 16);
    }
    return;
  }
  for (int i = 0; i < kRun; i += kGroup) {
    Floats wide[4];
    Words drawn[4], fixed[4];
    Ints codes[4];
    load(m + i, wide);
    for (int k = 0; k < 4; ++k) codes[k] = encode_exp_avg(wide[k], m_inverse);
    store_first(codes, m_code + i);
    load(v + i, wide);
    load(random + i, drawn);
    for (int k = 0; k < 4; ++k) fixed[k] = (Words)encode_exp_avg_sq(wide[k], v_inverse, drawn[k]);
    store_third(fixed, v_code + i);
  }
}

template <typename Moment>
PROGTUNING_RULE void store_moments(const UpdateRecord& tensor, int64_t first, const Floats (&m)[4],
                                   const Floats (&v)[4], const uint16_t* random) {
  if constexpr (std::is_same_v<Moment, Float32>) {
    store(m, at_element<float>(tensor.exp_avg, first));
    store(v, at_element<float>(tensor.exp_avg_sq, first));
  } else {
    Words drawn[4];
    load(random, drawn);
    store_stochastic(m, drawn, tensor.exp_avg, first);
    for (int k = 0; k < 4; ++k) drawn[k] = swapped_bytes(drawn[k]);
    store_stochastic(v, drawn, tensor.exp_avg_sq, first);
  }
}

template <typename Param, typename Moment, Master kMaster>
PROGTUNING_RULE void update_whole_run(const Chunk& chunk, int64_t first) {
  constexpr bool kCodes = std::is_same_v<Moment, EightBit>;
  constexpr bool kStochastic = std::is_same_v<Param, StochasticBFloat16>;
  const UpdateRecord& tensor = *chunk.tensor;
  const AdamW<float> at = chunk.at;
  alignas(64) uint16_t random[kRun], of_params[kRun];
  // codes need it last, where drawing fills the wait for the largest and its inverse
  constexpr bool kDrawLast = kCodes && kMaster != Master::kResidual;
  if constexpr (!kDrawLast) draw_run_avx512(chunk.run(first, RandomStream::kMoments), random);
  if constexpr (kStochastic) draw_run_avx512(chunk.run(first, RandomStream::kParam), of_params);

  alignas(64) float m_wide[kRun], v_wide[kRun];
  Largest largest_of;
  float m_scale = 0, v_scale = 0;
  if constexpr (kCodes) {
    m_scale = tensor.exp_avg_scale[first / kQuantBlock];
    v_scale = tensor.exp_avg_sq_scale[first / kQuantBlock];
  }
  int8_t* m_code = at_element<int8_t>(tensor.exp_avg, first);
  uint8_t* v_code = at_element<uint8_t>(tensor.exp_avg_sq, first);
  for (int i = 0; i < kRun; i += kGroup) {
    Floats p[4], g[4], m[4], v[4];
    load_stored<Param>(chunk.grad, first + i, g);
    load_params<Param, kMaster>(tensor, first + i, p);
    if constexpr (kCodes) {
      read_codes(m_code + i, v_code + i, m_scale, v_scale, m, v);
    } else {
      load_stored<Moment>(tensor.exp_avg, first + i, m);
      load_stored<Moment>(tensor.exp_avg_sq, first + i, v);
    }
    for (int k = 0; k < 4; ++k) adamw(at, g[k], p[k], m[k], v[k]);
    if constexpr (kCodes) {
      largest_of.see(m, v);
      store(m, m_wide + i);
      store(v, v_wide + i);
    } else {
      store_moments<Moment>(tensor, first + i, m, v, random + i);
    }
    store_params<Param, kMaster>(tensor, first + i, p, (kStochastic ? of_params : random) + i);
  }
  if constexpr (kCodes) {
    m_scale = float_of(largest(largest_of.m));
    v_scale = float_of(largest(largest_of.v) & 0x7fffffffu);
    tensor.exp_avg_scale[first / kQuantBlock] = m_scale;
    tensor.exp_avg_sq_scale[first / kQuantBlock] = v_scale;
    if constexpr (kDrawLast) draw_run_avx512(chunk.run(first, RandomStream::kMoments), random);
    write_codes(m_wide, v_wide, m_scale, v_scale, random, m_code, v_code);
  }
}

template <typename Param, typename Moment, Master kMaster>
void update_whole_runs(const Chunk& chunk) {
  const int64_t end = chunk.start + chunk.n / kRun * kRun;
  for (int64_t first = chunk.start; first < end; first += kRun) {
    update_whole_run<Param, Moment, kMaster>(chunk, first);
  }
}

template <typename Param, Master kMaster>
UpdateKernel with_moments(DType moments) {
  if (moments == DType::kBFloat16) return update_whole_runs<Param, BFloat16, kMaster>;
  if (moments == DType::kInt8) return update_whole_runs<Param, EightBit, kMaster>;
  // float32 moments have nothing to round; with a residual the parameter has
  if constexpr (kMaster == Master::kResidual) {
    if (moments == DType::kFloat32) return update_whole_runs<Param, Float32, kMaster>;
  }
  return nullptr;
}

}  // namespace

UpdateKernel whole_runs_avx512(const UpdateVariant& variant) {
  if (variant.param == DType::kFloat32 && variant.master == Master::kNone) {
    return with_moments<Float32, Master::kNone>(variant.moments);
  }
  if (variant.param != DType::kBFloat16) return nullptr;
  switch (variant.master) {
    case Master::kFloat32:
      return with_moments<BFloat16, Master::kFloat32>(variant.moments);
    case Master::kResidual:
      return with_moments<BFloat16, Master::kResidual>(variant.moments);
    default:
      return variant.stochastic_rounding
                 ? with_moments<StochasticBFloat16, Master::kNone>(variant.moments)
                 : with_moments<BFloat16, Master::kNone>(variant.moments);
  }
}

}  // namespace progtuning

#endif
