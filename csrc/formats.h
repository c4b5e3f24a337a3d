// How parameters, gradients and moments are stored, and the way to the type that computes and back.
#pragma once

#include "update_rules.h"

namespace progtuning {
namespace {

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
struct EightBit {};  // moments as codes, float32 in tensors without scales

}  // namespace
}  // namespace progtuning
