// What the loops of masked_update on the CPU work on, and the vectors of AVX-512.
#pragma once

#include <cstdint>

#include "launchers.h"
#include "random_run.h"
#include "update_rules.h"

namespace progtuning {

// A chunk of one tensor, n elements from element `start`, a multiple of a run.
struct Chunk {
  const UpdateRecord* tensor;
  void* grad;
  int64_t start;
  int64_t n;
  const UpdateStep* step;
  AdamW<float> at;
  AdamW<double> at_double;

  RandomRun run(int64_t first, RandomStream stream) const {
    const uint32_t updates = static_cast<uint32_t>(*tensor->step) + 1;
    return {step->seed, static_cast<uint64_t>(first) / 8, stream, tensor->index, updates};
  }
};

using UpdateKernel = void (*)(const Chunk&);

// Updates the whole runs of a chunk, all but its last n % 256 elements; null: not written for this
// variant.
UpdateKernel whole_runs_avx512(const UpdateVariant& variant);

}  // namespace progtuning
