// 16 random bits for each of 256 consecutive elements, on the CPU: Philox as update_rules.h has it.
//
// Where compilers vectorise its 32 x 32 -> 64 bit products, they make full 64-bit multiplications
// of them, at twice the time (0.36 against 0.17 ns per element). The two wide instruction sets are
// therefore written out: eight or four counters in 64-bit lanes, whose low halves are multiplied.
#pragma once

#include "instruction_sets.h"
#include "update_rules.h"

#ifdef PROGTUNING_VERSIONS
#include <immintrin.h>
#endif

namespace progtuning {
namespace {

constexpr int kRun = 256;

// What a run's counters have in common; the run begins at element 8 * eighth, a multiple of kRun.
struct RandomRun {
  uint64_t seed;
  uint64_t eighth;
  RandomStream stream;
  uint32_t tensor;
  uint32_t step;
};

inline void draw_run_plain(const RandomRun& run, uint16_t* random) {
  const PhiloxKeys keys = philox_keys(run.seed);
  for (int i = 0; i < kRun / 8; ++i) {
    const RandomWords drawn = philox(keys, run.eighth + i, run.stream, run.tensor, run.step);
    for (int word = 0; word < 4; ++word) {
      random[8 * i + 2 * word] = static_cast<uint16_t>(drawn.word[word]);
      random[8 * i + 2 * word + 1] = static_cast<uint16_t>(drawn.word[word] >> 16);
    }
  }
}

#ifdef PROGTUNING_VERSIONS

__attribute__((target("avx2"))) inline void draw_run_avx2(const RandomRun& run, uint16_t* random) {
  const __m256i m0 = _mm256_set1_epi64x(0xD2511F53), m1 = _mm256_set1_epi64x(0xCD9E8D57);
  __m256i k0[kPhiloxRounds], k1[kPhiloxRounds];
  for (int round = 0; round < kPhiloxRounds; ++round) {
    k0[round] = _mm256_set1_epi64x(static_cast<uint32_t>(run.seed) + round * 0x9E3779B9u);
    k1[round] = _mm256_set1_epi64x(static_cast<uint32_t>(run.seed >> 32) + round * 0xBB67AE85u);
  }
  const uint64_t c1_bits = (run.eighth >> 32) | (static_cast<uint64_t>(run.stream) << 24);
  for (int group = 0; group < kRun / 32; ++group) {
    // in the order in which the two unpacks below leave consecutive counters
    __m256i c0 = _mm256_add_epi64(_mm256_set1_epi64x((run.eighth & 0xffffffffu) + 4 * group),
                                  _mm256_setr_epi64x(0, 2, 1, 3));
    __m256i c1 = _mm256_set1_epi64x(c1_bits);
    __m256i c2 = _mm256_set1_epi64x(run.tensor), c3 = _mm256_set1_epi64x(run.step);
#pragma GCC unroll 7
    for (int round = 0; round < kPhiloxRounds; ++round) {
      const __m256i a = _mm256_mul_epu32(c0, m0), b = _mm256_mul_epu32(c2, m1);
      c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(b, 32), c1), k0[round]);
      c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(a, 32), c3), k1[round]);
      c1 = b;
      c3 = a;
    }
    const __m256i low = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xAA);
    const __m256i high = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xAA);
    auto* out = reinterpret_cast<__m256i*>(random + 32 * group);
    _mm256_storeu_si256(out, _mm256_unpacklo_epi64(low, high));
    _mm256_storeu_si256(out + 1, _mm256_unpackhi_epi64(low, high));
  }
}

__attribute__((target("avx512f"))) inline void draw_run_avx512(const RandomRun& run,
                                                               uint16_t* random) {
  const __m512i m0 = _mm512_set1_epi64(0xD2511F53), m1 = _mm512_set1_epi64(0xCD9E8D57);
  __m512i k0[kPhiloxRounds], k1[kPhiloxRounds];
  for (int round = 0; round < kPhiloxRounds; ++round) {
    k0[round] = _mm512_set1_epi64(static_cast<uint32_t>(run.seed) + round * 0x9E3779B9u);
    k1[round] = _mm512_set1_epi64(static_cast<uint32_t>(run.seed >> 32) + round * 0xBB67AE85u);
  }
  const uint64_t c1_bits = (run.eighth >> 32) | (static_cast<uint64_t>(run.stream) << 24);
  constexpr int kXor = 0x96;  // a ^ b ^ c
  for (int group = 0; group < kRun / 64; ++group) {
    __m512i c0 = _mm512_add_epi64(_mm512_set1_epi64((run.eighth & 0xffffffffu) + 8 * group),
                                  _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7));
    __m512i c1 = _mm512_set1_epi64(c1_bits);
    __m512i c2 = _mm512_set1_epi64(run.tensor), c3 = _mm512_set1_epi64(run.step);
#pragma GCC unroll 7
    for (int round = 0; round < kPhiloxRounds; ++round) {
      const __m512i a = _mm512_mul_epu32(c0, m0), b = _mm512_mul_epu32(c2, m1);
      c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(b, 32), c1, k0[round], kXor);
      c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(a, 32), c3, k1[round], kXor);
      c1 = b;
      c3 = a;
    }
    const __m512i low = _mm512_mask_blend_epi32(0xAAAA, c0, _mm512_slli_epi64(c1, 32));
    const __m512i high = _mm512_mask_blend_epi32(0xAAAA, c2, _mm512_slli_epi64(c3, 32));
    _mm512_storeu_si512(random + 64 * group, _mm512_unpacklo_epi64(low, high));
    _mm512_storeu_si512(random + 64 * group + 32, _mm512_unpackhi_epi64(low, high));
  }
}

#endif

inline void draw_run(const RandomRun& run, uint16_t* random) {
#ifdef PROGTUNING_VERSIONS
  static const auto best = __builtin_cpu_supports("avx512f") ? draw_run_avx512
                           : __builtin_cpu_supports("avx2")  ? draw_run_avx2
                                                             : draw_run_plain;
  best(run, random);
#else
  draw_run_plain(run, random);
#endif
}

}  // namespace
}  // namespace progtuning
