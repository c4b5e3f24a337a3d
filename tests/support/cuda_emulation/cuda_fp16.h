// Stands in for the header of the CUDA toolkit; see cuda_runtime.h.
#pragma once

#include "update_rules.h"

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) { return progtuning::widen_float16(x.bits); }
