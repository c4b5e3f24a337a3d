// masked_update for processors with AVX2; update_whole_runs.h.
#include "instruction_sets.h"

#ifdef PROGTUNING_VERSIONS

// before the pragma: what these define may be shared with files for all processors
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#pragma GCC target("avx2")
#define PROGTUNING_LANES 8
#include "update_whole_runs.h"

namespace progtuning {

UpdateKernel whole_runs_avx2(const UpdateVariant& variant) { return find_whole_runs(variant); }

}  // namespace progtuning

#endif
