// The per-element formulas of the optimizers, for host and device: the single C++ home of each.
// Plain +, *, / and sqrt, which IEEE 754 rounds correctly and nothing contracts, so that the CPU,
// every instruction set of it, and the GPU give the same bits (but for those of a NaN). Templates
// take numbers or, where lanes.h comes first, vectors of them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "launchers.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define PROGTUNING_RULE __host__ __device__ __forceinline__
#else
#define PROGTUNING_RULE inline __attribute__((always_inline))
#endif

namespace progtuning {

PROGTUNING_RULE uint32_t bits_of(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

PROGTUNING_RULE float float_of(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

PROGTUNING_RULE float root(float x) { return sqrtf(x); }
PROGTUNING_RULE double root(double x) { return sqrt(x); }
PROGTUNING_RULE int truncated(float x) { return static_cast<int>(x); }
PROGTUNING_RULE int signed_of(uint32_t x) { return static_cast<int>(x); }

// 1 - beta^step, from log(beta). `1 - powf(beta2, step)` is off by 1e-5 in the first hundred steps,
// where beta^step is nearly 1; the Taylor series of 1 - e^x, taken at x / 2^k > -1/2, is not: its
// first term left out is 1e-8 of the sum. Then y -> y * (2 - y) squares e^x, k times.
PROGTUNING_RULE float one_minus_power(float log_beta, float step) {
  float x = log_beta * step;
  if (x < -18.0f) return 1.0f;  // e^-18 is below half a unit in the last place of 1
  int doublings = 0;
  for (; x < -0.5f; ++doublings) x = x * 0.5f;
  float series = 1.0f / 40320;
  series = series * x + 1.0f / 5040;
  series = series * x + 1.0f / 720;
  series = series * x + 1.0f / 120;
  series = series * x + 1.0f / 24;
  series = series * x + 1.0f / 6;
  series = series * x + 0.5f;
  series = series * x + 1.0f;
  float y = -x * series;
  for (; doublings > 0; --doublings) y = y * (2.0f - y);
  return y;
}

PROGTUNING_RULE double one_minus_power(double log_beta, double step) {
  return -expm1(log_beta * step);
}

// Hyper-parameters of AdamW as they are kept between steps; 1 - beta and log(beta) are computed in
// float64 on the host, because 1 - 0.999f is off by 1.3e-5.
template <typename Float>
struct AdamWHyper {
  Float lr, weight_decay, eps;
  Float beta1, one_minus_beta1, log_beta1;
  Float beta2, one_minus_beta2, log_beta2;
};

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

// What the update of one tensor needs at one step.
template <typename Float>
struct AdamW {
  Float beta1, one_minus_beta1, beta2, one_minus_beta2, eps;
  Float decay;               // lr * weight_decay
  Float step_size;           // lr / (1 - beta1^step)
  Float inverse_root_bias2;  // 1 / sqrt(1 - beta2^step)
  Float grad_factor;         // unscaling and clipping in one
};

template <typename Float>
PROGTUNING_RULE AdamW<Float> adamw_at(const AdamWHyper<Float>& hyper, Float lr, Float step,
                                      Float grad_factor) {
  AdamW<Float> at;
  at.beta1 = hyper.beta1;
  at.one_minus_beta1 = hyper.one_minus_beta1;
  at.beta2 = hyper.beta2;
  at.one_minus_beta2 = hyper.one_minus_beta2;
  at.eps = hyper.eps;
  at.decay = lr * hyper.weight_decay;
  at.step_size = lr / one_minus_power(hyper.log_beta1, step);
  at.inverse_root_bias2 = Float(1) / root(one_minus_power(hyper.log_beta2, step));
  at.grad_factor = grad_factor;
  return at;
}

// Loshchilov and Hutter, arXiv 1711.05101, with decay and update in one subtraction: multiplying p
// by 1 - lr * weight_decay does nothing in float32 once that product is below 3e-8.
template <typename Number, typename Float>
PROGTUNING_RULE void adamw(const AdamW<Number>& at, Float grad, Float& p, Float& m, Float& v) {
  const Float g = grad * at.grad_factor;
  m = at.beta1 * m + at.one_minus_beta1 * g;
  v = at.beta2 * v + at.one_minus_beta2 * (g * g);
  const Float denominator = root(v) * at.inverse_root_bias2 + at.eps;
  p = p - (at.decay * p + at.step_size * (m / denominator));
}

// The same for moments in 8 bits, whose steps of 3 % leave no use for the last bits of root and
// quotient: on a GPU these are the approximate ones, 2^-22 off in the update of p. The bits of m, v
// and all codes are those of `adamw`.
PROGTUNING_RULE void adamw_of_codes(const AdamW<float>& at, float grad, float& p, float& m,
                                    float& v) {
#ifdef __CUDA_ARCH__
  const float g = grad * at.grad_factor;
  m = at.beta1 * m + at.one_minus_beta1 * g;
  v = at.beta2 * v + at.one_minus_beta2 * (g * g);
  float quick_root, quotient;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(quick_root) : "f"(v));
  const float denominator = quick_root * at.inverse_root_bias2 + at.eps;
  // __fdividef without its 5 instructions for results below 1.2e-38
  asm("div.approx.ftz.f32 %0, %1, %2;" : "=f"(quotient) : "f"(m), "f"(denominator));
  p = p - (at.decay * p + at.step_size * quotient);
#else
  adamw<float>(at, grad, p, m, v);
#endif
}

// bfloat16 travels as its 16 bits.
PROGTUNING_RULE float widen_bfloat16(uint16_t x) {
  return float_of(static_cast<uint32_t>(x) << 16);
}

// Bits of a float32 whose upper half is the bfloat16. NaN is left out of the rounding: 0x7fffffff +
// 1 would be -0.0. Infinities may take part, because at most 16 bits are added to the 16 that are
// dropped.
template <typename Bits>
PROGTUNING_RULE Bits rounded(Bits bits, Bits added) {
  return (bits & 0x7fffffffu) > 0x7f800000u ? (bits | 0x00400000u) : (bits + added);
}

template <typename Bits>
PROGTUNING_RULE Bits rounded_to_nearest(Bits bits) {
  const Bits added = 0x7fffu + ((bits >> 16) & 1u);
  return rounded(bits, added);
}

// To the nearest, ties to even. The hardware's conversions differ in the bits of a NaN only, and
// take a tenth of the instructions.
PROGTUNING_RULE uint16_t nearest_bfloat16(float x) {
#ifdef __CUDA_ARCH__
  return __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
  return static_cast<uint16_t>(rounded_to_nearest(bits_of(x)) >> 16);
#endif
}

// random: 16 random bits. Rounds away from zero with the probability that makes the mean exact.
PROGTUNING_RULE uint16_t stochastic_bfloat16(float x, uint32_t random) {
  return static_cast<uint16_t>(rounded(bits_of(x), random) >> 16);
}

// 24-bit weights: a float32 without its low 8 bits is a bfloat16 and, signed, the residual, its
// distance from it in units of 1/256 of a unit in the bfloat16's last place.
//
// Bits of the float32. A zero is one whatever its residual, which is another's if the weight was
// written from outside: bits below those of zero would be a NaN.
template <typename Bits, typename Int>
PROGTUNING_RULE Bits with_residual(Bits upper, Int residual) {
  return (upper & 0x7fffffffu) == 0u ? upper : upper + (Bits)(residual * 256);
}

// Rounds up with the probability that makes the mean exact: updates of less than 2^-16 of a weight
// are not lost. Takes what random numbers of 16 bits the moments take as they are and swapped; its
// 8 are independent of the leading ones of each. Residual: byte 1 of the result.
template <typename Bits>
PROGTUNING_RULE Bits rounded_to_24_bits(Bits bits, Bits random) {
  const Bits folded = (random ^ (random >> 8)) & 0xffu;
  return (bits & 0x7fffffffu) > 0x7f800000u ? ((bits & 0xffff0000u) | 0x00400000u)
                                            : (bits + folded);
}

// In the upper half of the result. The tie goes away from zero: a residual is -128 to 127.
template <typename Bits>
PROGTUNING_RULE Bits nearest_of_24_bits(Bits bits) {
  return bits + 0x8000u;
}

// IEEE half precision as its 16 bits, without the instructions that not every CPU has.
PROGTUNING_RULE float widen_float16(uint16_t x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x));
#else
  const uint32_t magnitude = static_cast<uint32_t>(x & 0x7fffu) << 13;
  const uint32_t special = (x & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000u) << 16;
  // 2^112 moves the exponent's bias from 15 to 127, subnormal numbers included
  return float_of((bits_of(float_of(magnitude) * 0x1p112f) | special) | sign);
#endif
}

PROGTUNING_RULE uint16_t nearest_float16(float x) {
#ifdef __CUDA_ARCH__
  return __half_as_ushort(__float2half_rn(x));
#else
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffffu;
  const uint32_t sign = (bits >> 16) & 0x8000u;
  // below 2^-14: adding 1/2 leaves the multiple of 2^-24 in the low bits, rounded by the adder
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  if (magnitude >= 0x477ff000u) half = 0x7c00u;  // 65520 and above round to infinity
  if (magnitude > 0x7f800000u) half = 0x7e00u;
  return static_cast<uint16_t>(half | sign);
#endif
}

// Philox4x32 with 7 rounds (Salmon et al., SC 2011): 128 random bits for 8 consecutive elements.
// The counter is (element / 8, stream, tensor, step); element i of the eight takes half i % 2 of
// word i / 2, low half first.
enum class RandomStream : uint32_t { kParam = 0, kMoments = 1, kDropout = 2 };

// bfloat16 moments share a number: m takes its 16 bits as they are, v with the two bytes swapped.
template <typename Bits>
PROGTUNING_RULE Bits swapped_bytes(Bits random) {
  return ((random & 0xffu) << 8) | (random >> 8);
}

// 32 x 32 -> 64 bits. The compilers take a full 64-bit product for it, on GPUs too.
PROGTUNING_RULE uint64_t wide_product(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return static_cast<uint64_t>(a) * b;
#endif
}

struct RandomWords {
  uint32_t word[4];
};

constexpr int kPhiloxRounds = 7;

// Of every round; the host computes them once for a launch.
struct PhiloxKeys {
  uint32_t first[kPhiloxRounds], second[kPhiloxRounds];
};

PROGTUNING_RULE PhiloxKeys philox_keys(uint64_t seed) {
  PhiloxKeys keys;
  for (uint32_t round = 0; round < kPhiloxRounds; ++round) {
    keys.first[round] = static_cast<uint32_t>(seed) + round * 0x9E3779B9u;
    keys.second[round] = static_cast<uint32_t>(seed >> 32) + round * 0xBB67AE85u;
  }
  return keys;
}

PROGTUNING_RULE RandomWords philox(const PhiloxKeys& keys, uint64_t eighth, RandomStream stream,
                                   uint32_t tensor, uint32_t step) {
  uint32_t c0 = static_cast<uint32_t>(eighth);
  uint32_t c1 = static_cast<uint32_t>(eighth >> 32) | (static_cast<uint32_t>(stream) << 24);
  uint32_t c2 = tensor, c3 = step;
#ifdef __CUDACC__
#pragma unroll
#else
#pragma GCC unroll 7
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t a = wide_product(c0, 0xD2511F53u);
    const uint64_t b = wide_product(c2, 0xCD9E8D57u);
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ keys.first[round];
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ keys.second[round];
    c1 = static_cast<uint32_t>(b);
    c3 = static_cast<uint32_t>(a);
  }
  return {{c0, c1, c2, c3}};
}

// Moments in 8 bits: blocks of 256 elements share one float32, the largest magnitude in the block.
//     m = sign(q) * largest * (q / 127)^4        v = largest * (q / 255)^8, rounded stochastically
// with powers that are read off the bits of a float; why: ops/masked_update/README.md.
constexpr int kQuantBlock = 256;
// Below this a block's reciprocal overflows; its codes are then the smallest.
constexpr float kSmallestLargest = 1.17549435e-38f;
constexpr uint32_t kOneBits = 0x3f800000u;
constexpr uint32_t kBits127 = 0x42fe0000u;
constexpr uint32_t kBits255 = 0x437f0000u;
constexpr uint32_t kTimes65536 = 16u << 23;  // what a product with 2^16 adds to the bits

PROGTUNING_RULE float inverse_of_largest(float largest) {
  return largest >= kSmallestLargest ? 1.0f / largest : 0.0f;
}

// Bits of the 2^kShift-th power of a ratio: of what has `bits` to what has `unit`.
template <int kShift, typename Bits>
PROGTUNING_RULE Bits power_of_ratio(Bits bits, uint32_t unit) {
  return (bits << kShift) + (kOneBits - (unit << kShift));
}

// x of 0 and more; above 1, and NaN, it counts as 1. Compilers find the vectors of the CPU in the
// bits, and in the function one instruction of the GPU.
PROGTUNING_RULE float at_most_one(float x) {
#ifdef __CUDA_ARCH__
  return fminf(x, 1.0f);
#else
  return float_of(bits_of(x) < kOneBits ? bits_of(x) : kOneBits);
#endif
}

// The inverse: what has the ratio `root of x` to what has `unit`.
// kOneBits is a multiple of 2^kShift, so the difference may be taken after the shift.
template <int kShift, typename Float>
PROGTUNING_RULE Float root_times(Float x, uint32_t unit) {
  return float_of((bits_of(at_most_one(x)) >> kShift) + (unit - (kOneBits >> kShift)));
}

template <typename Float>
PROGTUNING_RULE Float decode_exp_avg(Float code, float largest) {
  const auto bits = bits_of(code);  // the shift drops the sign
  const auto power = code == 0.0f ? 0u : power_of_ratio<2>(bits, kBits127);
  return float_of(power | (bits & 0x80000000u)) * largest;
}

template <typename Float>
PROGTUNING_RULE Float decode_exp_avg_sq(Float code, float largest) {
  return float_of(power_of_ratio<3>(bits_of(code), kBits255)) * largest;
}

template <typename Float>
PROGTUNING_RULE auto encode_exp_avg(Float m, float inverse) {
  const Float magnitude = float_of(bits_of(m) & 0x7fffffffu) * inverse;
  const Float code = root_times<2>(magnitude, kBits127) + 0.5f;
  return truncated(float_of(bits_of(code) | (bits_of(m) & 0x80000000u)));
}

// The code and 16 bits behind its point, into which random, 16 random bits, was added.
template <typename Float, typename Bits>
PROGTUNING_RULE auto encode_exp_avg_sq(Float v, float inverse, Bits random) {
  const auto fixed = truncated(root_times<3>(Float(v * inverse), kBits255 + kTimes65536));
  const auto sum = fixed + signed_of(random);
  return sum < 1 << 16 ? 1 << 16 : sum;
}

}  // namespace progtuning
