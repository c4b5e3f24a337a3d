// 16 float32 of AVX-512, or their bits: what masked_update_avx512.cpp is written with. The
// compilers' own vectors bring arithmetic, comparison and conversion; loads and stores of narrow
// elements go by four vectors.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace progtuning {

#define PROGTUNING_LANE_OP inline __attribute__((always_inline))

constexpr int kLanes = 16;
constexpr int kGroup = 4 * kLanes;  // elements

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

PROGTUNING_LANE_OP Words bits_of(Floats x) { return (Words)x; }
PROGTUNING_LANE_OP Floats float_of(Words bits) { return (Floats)bits; }
PROGTUNING_LANE_OP Ints truncated(Floats x) { return __builtin_convertvector(x, Ints); }
PROGTUNING_LANE_OP Floats widened(Ints x) { return __builtin_convertvector(x, Floats); }

PROGTUNING_LANE_OP Ints signed_of(Words x) { return (Ints)x; }

// As update_rules.h has it for numbers. Where a block's largest magnitude is finite, the others
// times its inverse are at most 1 + 2^-22, whose root has the bits of that of 1.
PROGTUNING_LANE_OP Floats at_most_one(Floats x) { return x; }

PROGTUNING_LANE_OP void load(const float* x, Floats (&out)[4]) { std::memcpy(out, x, sizeof out); }
PROGTUNING_LANE_OP void store(const Floats (&x)[4], float* out) { std::memcpy(out, x, sizeof x); }

PROGTUNING_LANE_OP Floats root(Floats x) { return (Floats)_mm512_sqrt_ps((__m512)x); }
PROGTUNING_LANE_OP Words larger(Words a, Words b) {
  return (Words)_mm512_max_epu32((__m512i)a, (__m512i)b);
}
PROGTUNING_LANE_OP uint32_t largest(Words x) { return _mm512_reduce_max_epu32((__m512i)x); }

PROGTUNING_LANE_OP void load(const uint16_t* x, Words (&out)[4]) {
  for (int i = 0; i < 4; ++i) {
    out[i] = (Words)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(x + 16 * i)));
  }
}
PROGTUNING_LANE_OP void load(const int8_t* x, Ints (&out)[4]) {
  for (int i = 0; i < 4; ++i) {
    out[i] = (Ints)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(x + 16 * i)));
  }
}
PROGTUNING_LANE_OP void load(const uint8_t* x, Ints (&out)[4]) {
  for (int i = 0; i < 4; ++i) {
    out[i] = (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(x + 16 * i)));
  }
}

// 16 bits to the upper half of each lane.
PROGTUNING_LANE_OP void load_upper(const uint16_t* x, Words (&out)[4]) {
  const __m512i low = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0,
                                       6, 0, 5, 0, 4, 0, 3, 0, 2, 0, 1, 0, 0, 0);
  const __m512i high = _mm512_or_si512(low, _mm512_set1_epi16(16));
  for (int i = 0; i < 2; ++i) {
    const __m512i both = _mm512_loadu_si512(x + 32 * i);
    out[2 * i] = (Words)_mm512_maskz_permutexvar_epi16(0xAAAAAAAAu, low, both);
    out[2 * i + 1] = (Words)_mm512_maskz_permutexvar_epi16(0xAAAAAAAAu, high, both);
  }
}

// The upper halves of 32 lanes, in their order.
PROGTUNING_LANE_OP __m512i upper_halves(Words a, Words b) {
  const __m512i odd =
      _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27,
                       25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  return _mm512_permutex2var_epi16((__m512i)a, odd, (__m512i)b);
}
PROGTUNING_LANE_OP void store_upper(const Words (&x)[4], uint16_t* out) {
  for (int i = 0; i < 2; ++i) {
    _mm512_storeu_si512(out + 32 * i, upper_halves(x[2 * i], x[2 * i + 1]));
  }
}
// Byte 2 of each lane.
PROGTUNING_LANE_OP void store_third(const Words (&x)[4], void* out) {
  for (int i = 0; i < 2; ++i) {
    _mm256_storeu_si256((__m256i*)out + i,
                        _mm512_cvtepi16_epi8(upper_halves(x[2 * i], x[2 * i + 1])));
  }
}
PROGTUNING_LANE_OP void store_first(const Ints (&x)[4], void* out) {
  for (int i = 0; i < 4; ++i) {
    _mm_storeu_si128((__m128i*)out + i, _mm512_cvtepi32_epi8((__m512i)x[i]));
  }
}
PROGTUNING_LANE_OP void store_second(const Words (&x)[4], void* out) {
  for (int i = 0; i < 4; ++i) {
    _mm_storeu_si128((__m128i*)out + i, _mm512_cvtepi32_epi8((__m512i)(x[i] >> 8)));
  }
}

}  // namespace progtuning
