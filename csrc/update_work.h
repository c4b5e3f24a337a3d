// What one block of masked_update.cu works on: its launch, its chunk, its first and last steps.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "formats.h"
#include "launchers.h"
#include "update_rules.h"

namespace progtuning {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
static_assert(kChunkUnit % (kThreads * 4) == 0, "a chunk is a whole number of the block's rounds");
static_assert(kChunkUnit % kQuantBlock == 0, "a chunk shares no block of codes with another");

struct Group {
  AdamWHyper<float> hyper;
  const float* lr_tensor;
};

// A kernel's parameters. Over 4 KiB they need toolkit 12.1 and driver 530; the limit is 32764.
template <int kTensors>
struct Launch {
  const UpdateRecord* table;
  const UpdateChunk* chunks;
  unsigned int* ticket;
  const float* grad_factor;
  const float* found_inf;
  PhiloxKeys keys;
  unsigned int num_chunks;
  unsigned int chunk_elements;
  int num_tensors;
  bool zero_grads;
  Group groups[kUpdateGroups];
  void* grads[kTensors];
};
static_assert(sizeof(Launch<kFewUpdateTensors>) <= 4096, "costs a launch more than it must");
static_assert(sizeof(Launch<kUpdateTensors>) <= 32764, "no launch takes as much");

// A block's chunk of a tensor at one step: in shared memory, filled in by one thread for all.
struct Work {
  bool skip;
  bool last;  // the block with the last ticket
  unsigned int n;
  unsigned int vectors;  // n where every address is aligned, else 0
  uint32_t index;
  uint32_t step;
  AdamW<float> at;
  // Read anew for every use, which volatile enforces: in registers they would be 16. At 40 an SM
  // runs 6 blocks, at 44 it runs 5.
  volatile uint64_t eighth;  // index of the first element / 8
  void* volatile param;
  void* volatile grad;
  void* volatile exp_avg;
  void* volatile exp_avg_sq;
  void* volatile master;
  float* volatile exp_avg_scale;
  float* volatile exp_avg_sq_scale;
};

template <typename T>
__device__ __forceinline__ T* global(void* address) {
  __builtin_assume(__isGlobal(address));
  return static_cast<T*>(address);
}

__device__ __forceinline__ void* moved(void* address, int64_t bytes) {
  return static_cast<char*>(address) + bytes;
}

// By one thread: no other reads the tensor's record. Without a gradient n is 0.
template <typename Param, typename Moment, bool kMaster, int kTensors>
__device__ __forceinline__ void prepare(const Launch<kTensors>& launch, Work& work) {
  work.skip = launch.found_inf != nullptr && *launch.found_inf != 0;
  work.last = false;
  work.n = work.vectors = 0;
  work.exp_avg_scale = nullptr;
  // A launch without chunks has one block, for the steps of its empty tensors.
  if (blockIdx.x >= launch.num_chunks) return;
  const UpdateChunk place = launch.chunks[blockIdx.x];
  void* grad = launch.grads[place.tensor];
  if (grad == nullptr) return;

  const UpdateRecord& tensor = launch.table[place.tensor];
  const int64_t elements = launch.chunk_elements;
  const int64_t start = place.chunk * elements;
  work.n = static_cast<unsigned int>(min(elements, tensor.size - start));
  work.eighth = static_cast<uint64_t>(start) / 8;
  work.index = tensor.index;

  constexpr int64_t kParamBytes = sizeof(typename Param::Stored);
  int64_t moment_bytes = sizeof(float);
  auto askew =
      reinterpret_cast<uintptr_t>(tensor.exp_avg) | reinterpret_cast<uintptr_t>(tensor.exp_avg_sq);
  if constexpr (!std::is_same_v<Moment, EightBit>) {
    moment_bytes = sizeof(typename Moment::Stored);
  } else if (tensor.exp_avg_scale != nullptr) {
    moment_bytes = 1;
    askew *= 2;  // 8 codes are 8 bytes, not 16
    work.exp_avg_scale = tensor.exp_avg_scale + start / kQuantBlock;
    work.exp_avg_sq_scale = tensor.exp_avg_sq_scale + start / kQuantBlock;
  }
  work.param = moved(tensor.param, start * kParamBytes);
  work.grad = moved(grad, start * kParamBytes);
  work.exp_avg = moved(tensor.exp_avg, start * moment_bytes);
  work.exp_avg_sq = moved(tensor.exp_avg_sq, start * moment_bytes);
  askew |= reinterpret_cast<uintptr_t>(tensor.param) | reinterpret_cast<uintptr_t>(grad);
  if constexpr (kMaster) {
    work.master = moved(tensor.master, start * sizeof(float));
    askew |= reinterpret_cast<uintptr_t>(tensor.master);
  }
  // start is a multiple of 16 bytes in every array, so this asks about the tensor, not the chunk
  if (askew % 16 == 0) work.vectors = work.n;

  const Group& group = launch.groups[tensor.group];
  const float updates = *tensor.step;
  const float lr = group.lr_tensor == nullptr ? group.hyper.lr : *group.lr_tensor;
  const float grad_factor = launch.grad_factor == nullptr ? 1.0f : *launch.grad_factor;
  work.step = static_cast<uint32_t>(updates) + 1;
  work.at = adamw_at<float>(group.hyper, lr, updates + 1, grad_factor);
}

// By all threads, before and after the update: the ticket is taken once the block has read its
// tensor's step, and the block with the last one adds 1 to the steps, which no block reads any
// more. The ticket goes back to 0 by itself, for the next launch or replay.
template <int kTensors>
__device__ __forceinline__ void take_ticket(const Launch<kTensors>& launch, Work& work) {
  if (threadIdx.x != 0) return;
  __threadfence();
  work.last = atomicInc(launch.ticket, gridDim.x - 1) == gridDim.x - 1;
}

template <typename Stored>
__device__ __forceinline__ void zero(Stored* x, unsigned int n) {
  constexpr unsigned int kCount = 16 / sizeof(Stored);
  const unsigned int vectors = reinterpret_cast<uintptr_t>(x) % 16 == 0 ? n / kCount : 0;
  for (unsigned int i = threadIdx.x; i < vectors; i += kThreads) {
    reinterpret_cast<uint4*>(x)[i] = make_uint4(0, 0, 0, 0);
  }
  for (unsigned int i = vectors * kCount + threadIdx.x; i < n; i += kThreads) x[i] = Stored(0);
}

template <typename Stored, int kTensors>
__device__ __forceinline__ void finish(const Launch<kTensors>& launch, const Work& work) {
  if (launch.zero_grads) {
    __syncthreads();  // another thread than the one that updates an element may zero its gradient
    zero(global<Stored>(work.grad), work.n);
  }
  __syncthreads();
  if (work.last) {
    __threadfence();
    for (int i = static_cast<int>(threadIdx.x); i < launch.num_tensors; i += kThreads) {
      if (launch.grads[i] != nullptr) *launch.table[i].step += 1;
    }
  }
}

}  // namespace
}  // namespace progtuning
