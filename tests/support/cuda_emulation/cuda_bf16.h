// Stands in for the header of the CUDA toolkit; see cuda_runtime.h.
#pragma once

#include "update_rules.h"

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) { return progtuning::widen_bfloat16(x.bits); }
