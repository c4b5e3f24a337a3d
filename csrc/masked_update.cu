// masked_update on CUDA: AdamW over all tensors of a bucket, in one launch.
//
// Maths       update_rules.h
// Storage     p, g: float32, bfloat16, or float16 (with a float32 master); m, v: float32, bfloat16
//             or 8-bit codes; contiguous or in one order of dimensions, any alignment
// Arithmetic  float32, nothing contracted (--fmad=false): the bits of masked_update_cpu.cpp, but for
//             p beside 8-bit moments, which takes an approximate root and quotient
// Geometry    one block of 256 threads per chunk of 8192 elements; 7 M elements (one BERT block)
//             are 865 blocks for an H200's 132 SMs. A lane owns 4 consecutive elements at a time,
//             16 bytes of float32, or 8 where something is stored in 16 or 8 bits: then a warp owns
//             one block of 8-bit codes. Every load of a run is under way before the first use. The
//             gradients' addresses travel by value in the kernel's parameters, so that nothing is
//             copied to the device and a captured graph keeps its own.
// Steps       every block reads its tensor's step and then takes a ticket; the block with the last
//             one adds 1 to the steps, which nobody reads any more.
// Determinism every element is its own, its random numbers come from its index: vectors and single
//             elements, any alignment and any order of the blocks give the same bits.
// Alone       nvcc -O3 -std=c++17 --fmad=false -arch=sm_90 -Xptxas -v -c masked_update.cu
//             (sm_80, sm_100, sm_120 likewise; nothing may spill)
#include "launchers.h"

#include <algorithm>
#include <climits>
#include <type_traits>

#include <cuda_runtime.h>

#include "formats.h"
#include "update_rules.h"

namespace progtuning {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kCudaChunk = 8192;
static_assert(kCudaChunk == 8192, "UPDATE_CHUNK in progtuning_kernels/ops/bucket.py");
static_assert(kCudaChunk % kQuantBlock == 0, "a chunk shares no block of codes with another");

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
  uint64_t seed;
  unsigned int num_chunks;
  int num_tensors;
  bool zero_grads;
  Group groups[kUpdateGroups];
  void* grads[kTensors];
};
static_assert(sizeof(Launch<kFewUpdateTensors>) <= 4096, "costs a launch more than it must");
static_assert(sizeof(Launch<kUpdateTensors>) <= 32764, "no launch takes as much");

// kCount consecutive elements in a thread's registers, packed as they lie in memory.
template <typename T, int kCount>
struct Packed {
  static constexpr int kWords = kCount * sizeof(T) / 4;
  static constexpr int kPerWord = 4 / sizeof(T);
  static_assert(kWords == 2 || kWords % 4 == 0, "8 bytes, or 16-byte vectors");

  uint32_t words[kWords];

  __device__ __forceinline__ T get(int i) const {
    const uint32_t bits = words[i / kPerWord] >> (i % kPerWord * 8 * sizeof(T));
    if constexpr (std::is_same_v<T, float>) {
      return float_of(bits);
    } else {
      return static_cast<T>(bits);
    }
  }

  // In ascending order of i: the first element of a word also clears the rest of it.
  __device__ __forceinline__ void set(int i, T x) {
    uint32_t bits;
    if constexpr (std::is_same_v<T, float>) {
      bits = bits_of(x);
    } else {
      bits = static_cast<std::make_unsigned_t<T>>(x);
    }
    uint32_t& word = words[i / kPerWord];
    word = i % kPerWord == 0 ? bits : word | bits << (i % kPerWord * 8 * sizeof(T));
  }

  __device__ __forceinline__ void load(const T* from) {
    if constexpr (kWords == 2) {
      const uint2 vector = *reinterpret_cast<const uint2*>(from);
      words[0] = vector.x;
      words[1] = vector.y;
    } else {
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        const uint4 vector = reinterpret_cast<const uint4*>(from)[i / 4];
        words[i] = vector.x;
        words[i + 1] = vector.y;
        words[i + 2] = vector.z;
        words[i + 3] = vector.w;
      }
    }
  }

  __device__ __forceinline__ void store(T* to) const {
    if constexpr (kWords == 2) {
      *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
    } else {
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        reinterpret_cast<uint4*>(to)[i / 4] =
            make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
      }
    }
  }
};

// A block's chunk of a tensor at one step: in shared memory, filled in by one thread for all.
struct Work {
  bool skip;
  bool last;  // the block with the last ticket
  unsigned int n;
  unsigned int vectors;  // n where every address is aligned, else 0
  uint32_t index;
  uint32_t step;
  AdamW<float> at;
  // Read anew for every use, which volatile enforces: in registers they would be 16. With float32
  // everywhere the kernel then needs 40 and runs 6 blocks on an SM; without volatile 44, and 5.
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

__device__ __forceinline__ unsigned int warp() { return threadIdx.x / kWarp; }
__device__ __forceinline__ unsigned int lane() { return threadIdx.x % kWarp; }

// A warp's run of consecutive elements, kCount for every lane, of which the chunk has the first
// `count`. Where vectors are not possible, at its end and in tensors that lie askew, elements go
// one by one through the warp's own shared memory, in the order of the lanes.
template <int kCount>
struct Run {
  static constexpr unsigned int kElements = kWarp * kCount;

  unsigned int first;  // in the chunk
  unsigned int count;
  bool vectors;
  unsigned char* staging;  // 4 * kElements bytes

  __device__ __forceinline__ Run(const Work& work, unsigned char* staging, unsigned int first)
      : first(first),
        count(work.n - first),
        vectors(first + kElements <= work.vectors),
        staging(staging) {}

  __device__ __forceinline__ unsigned int mine() const { return first + lane() * kCount; }

  template <typename T>
  __device__ __forceinline__ void load(void* from, Packed<T, kCount>& packed) const {
    const T* x = global<T>(from);
    if (vectors) {
      packed.load(x + mine());
      return;
    }
    x += first;
    T* staged = reinterpret_cast<T*>(staging);
    __syncwarp();  // of the elements that were here before
    if (count >= kElements) {
#pragma unroll
      for (unsigned int i = 0; i < kElements; i += kWarp) staged[i + lane()] = x[i + lane()];
    } else {
#pragma unroll 1
      for (unsigned int i = lane(); i < count; i += kWarp) staged[i] = x[i];
    }
    __syncwarp();
    packed.load(staged + lane() * kCount);
  }

  template <typename T>
  __device__ __forceinline__ void store(const Packed<T, kCount>& packed, void* to) const {
    T* x = global<T>(to);
    if (vectors) {
      packed.store(x + mine());
      return;
    }
    x += first;
    T* staged = reinterpret_cast<T*>(staging);
    __syncwarp();
    packed.store(staged + lane() * kCount);
    __syncwarp();
    if (count >= kElements) {
#pragma unroll
      for (unsigned int i = 0; i < kElements; i += kWarp) x[i + lane()] = staged[i + lane()];
    } else {
#pragma unroll 1
      for (unsigned int i = lane(); i < count; i += kWarp) x[i] = staged[i];
    }
  }
};

// 16 random bits for each of a lane's 8 elements.
struct Random {
  RandomWords words;

  __device__ __forceinline__ Random(const Work& work, const Run<8>& run, uint64_t seed,
                                    RandomStream stream)
      : words(philox(seed, work.eighth + run.mine() / 8, stream, work.index, work.step)) {}

  __device__ __forceinline__ uint32_t get(int i) const {
    return (words.word[i / 2] >> (i % 2 * 16)) & 0xffffu;
  }
};

// Parameters, master and gradients of a run.
template <typename Param, bool kMaster, int kCount>
struct Params {
  using Stored = typename Param::Stored;
  using Source = std::conditional_t<kMaster, float, Stored>;  // what is updated

  Packed<Source, kCount> before;
  Packed<Stored, kCount> grads;
  float after[kCount];

  __device__ __forceinline__ Params(const Work& work, const Run<kCount>& run) {
    run.load(kMaster ? work.master : work.param, before);
    run.load(work.grad, grads);
  }

  template <bool kCodes>
  __device__ __forceinline__ void update(int i, const AdamW<float>& at, float& m, float& v) {
    if constexpr (kMaster) {
      after[i] = before.get(i);
    } else {
      after[i] = Param::widen(before.get(i));
    }
    const float grad = Param::widen(grads.get(i));
    if constexpr (kCodes) {
      adamw_of_codes(at, grad, after[i], m, v);
    } else {
      adamw<float>(at, grad, after[i], m, v);
    }
  }

  __device__ __forceinline__ void store(const Work& work, const Run<kCount>& run, uint64_t seed) {
    Packed<Stored, kCount> result;
    if constexpr (std::is_same_v<Param, StochasticBFloat16>) {
      const Random random(work, run, seed, RandomStream::kParam);
#pragma unroll
      for (int i = 0; i < kCount; ++i) result.set(i, Param::narrow(after[i], random.get(i)));
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) result.set(i, Param::narrow(after[i], 0));
    }
    run.store(result, work.param);
    if constexpr (kMaster) {
      Packed<float, kCount> master;
#pragma unroll
      for (int i = 0; i < kCount; ++i) master.set(i, after[i]);
      run.store(master, work.master);
    }
  }
};

// Moments in a format of their own each element.
template <typename Param, typename Moment, bool kMaster>
__device__ __forceinline__ void update_plain(const Work& work, unsigned char* staging,
                                             uint64_t seed) {
  using Stored = typename Moment::Stored;
  constexpr int kSmallest = static_cast<int>(sizeof(Stored) < sizeof(typename Param::Stored)
                                                 ? sizeof(Stored)
                                                 : sizeof(typename Param::Stored));
  constexpr int kCount = 16 / kSmallest;
#pragma unroll 1
  for (unsigned int first = warp() * kWarp * kCount; first < work.n; first += kThreads * kCount) {
    const Run<kCount> run(work, staging, first);
    Params<Param, kMaster, kCount> params(work, run);
    Packed<Stored, kCount> m, v, m_new, v_new;
    run.load(work.exp_avg, m);
    run.load(work.exp_avg_sq, v);
    float exp_avg[kCount], exp_avg_sq[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      exp_avg[i] = Moment::widen(m.get(i));
      exp_avg_sq[i] = Moment::widen(v.get(i));
      params.template update<false>(i, work.at, exp_avg[i], exp_avg_sq[i]);
    }
    params.store(work, run, seed);
    if constexpr (std::is_same_v<Moment, StochasticBFloat16>) {
      const Random random(work, run, seed, RandomStream::kMoments);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        m_new.set(i, Moment::narrow(exp_avg[i], random.get(i)));
        v_new.set(i, Moment::narrow(exp_avg_sq[i], swapped_bytes(random.get(i))));
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        m_new.set(i, Moment::narrow(exp_avg[i], 0));
        v_new.set(i, Moment::narrow(exp_avg_sq[i], 0));
      }
    }
    run.store(m_new, work.exp_avg);
    run.store(v_new, work.exp_avg_sq);
  }
}

// Magnitudes as bits: they order alike, and NaN stays on top.
__device__ __forceinline__ uint32_t magnitude(float x) { return bits_of(x) & 0x7fffffffu; }

template <typename Param, bool kMaster>
__device__ __forceinline__ void update_eight_bit(const Work& work, unsigned char* staging,
                                                 uint64_t seed) {
  constexpr int kCount = 8;
  static_assert(kCount * kWarp == kQuantBlock, "a warp owns a block of codes");
#pragma unroll 1
  for (unsigned int first = warp() * kQuantBlock; first < work.n; first += kThreads * kCount) {
    const Run<kCount> run(work, staging, first);
    Params<Param, kMaster, kCount> params(work, run);
    Packed<int8_t, kCount> m, m_new;
    Packed<uint8_t, kCount> v, v_new;
    run.load(work.exp_avg, m);
    run.load(work.exp_avg_sq, v);
    const float m_scale = global<float>(work.exp_avg_scale)[first / kQuantBlock];
    const float v_scale = global<float>(work.exp_avg_sq_scale)[first / kQuantBlock];
    float exp_avg[kCount], exp_avg_sq[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      exp_avg[i] = decode_exp_avg(m.get(i), m_scale);
      exp_avg_sq[i] = decode_exp_avg_sq(v.get(i), v_scale);
      params.template update<true>(i, work.at, exp_avg[i], exp_avg_sq[i]);
    }
    params.store(work, run, seed);
    if (!run.vectors) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (run.mine() + i >= work.n) exp_avg[i] = exp_avg_sq[i] = 0;
      }
    }
    uint32_t largest_m = 0, largest_v = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      largest_m = max(largest_m, magnitude(exp_avg[i]));
      largest_v = max(largest_v, magnitude(exp_avg_sq[i]));
    }
    const float m_after = float_of(__reduce_max_sync(0xffffffffu, largest_m));
    const float v_after = float_of(__reduce_max_sync(0xffffffffu, largest_v));
    const float m_inverse = inverse_of_largest(m_after), v_inverse = inverse_of_largest(v_after);
    const Random random(work, run, seed, RandomStream::kMoments);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      m_new.set(i, static_cast<int8_t>(encode_exp_avg(exp_avg[i], m_inverse)));
      const int v_code = encode_exp_avg_sq(exp_avg_sq[i], v_inverse, random.get(i));
      v_new.set(i, static_cast<uint8_t>(v_code));
    }
    run.store(m_new, work.exp_avg);
    run.store(v_new, work.exp_avg_sq);
    if (lane() == 0) {
      global<float>(work.exp_avg_scale)[first / kQuantBlock] = m_after;
      global<float>(work.exp_avg_sq_scale)[first / kQuantBlock] = v_after;
    }
  }
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
  const int64_t start = static_cast<int64_t>(place.chunk) * kCudaChunk;
  work.n = static_cast<unsigned int>(min(static_cast<int64_t>(kCudaChunk), tensor.size - start));
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
    work.master = tensor.master + start;
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

template <typename Param, typename Moment, bool kMaster, int kTensors>
__global__ void __launch_bounds__(kThreads)
    masked_update_kernel(const __grid_constant__ Launch<kTensors> launch) {
  __shared__ Work work;
  __shared__ __align__(16) unsigned char staging[kThreads / kWarp][kWarp * 8 * sizeof(float)];
  if (threadIdx.x == 0) prepare<Param, Moment, kMaster>(launch, work);
  __syncthreads();
  if (!work.skip) {
    if (threadIdx.x == 0) {
      // Between this block's read of the step and the last block's write of it. The ticket goes
      // back to 0 by itself, for the next launch or replay.
      __threadfence();
      work.last = atomicInc(launch.ticket, gridDim.x - 1) == gridDim.x - 1;
    }
    unsigned char* mine = staging[warp()];
    if constexpr (!std::is_same_v<Moment, EightBit>) {
      update_plain<Param, Moment, kMaster>(work, mine, launch.seed);
    } else if (work.exp_avg_scale == nullptr) {
      update_plain<Param, Float32, kMaster>(work, mine, launch.seed);
    } else {
      update_eight_bit<Param, kMaster>(work, mine, launch.seed);
    }
  }
  if (launch.zero_grads) {
    __syncthreads();  // whoever updates an element need not be the one who zeroes its gradient
    zero(global<typename Param::Stored>(work.grad), work.n);
  }
  __syncthreads();
  if (work.last) {
    __threadfence();
    for (int i = static_cast<int>(threadIdx.x); i < launch.num_tensors; i += kThreads) {
      if (launch.grads[i] != nullptr) *launch.table[i].step += 1;
    }
  }
}

// The arguments of masked_update_cuda.
struct Call {
  const UpdateRecord* table;
  const UpdateChunk* chunks;
  int64_t num_chunks;
  unsigned int* ticket;
  void* const* grads;
  int64_t num_tensors;
  const UpdateHyper* groups;
  int64_t num_groups;
  const UpdateStep& step;
  cudaStream_t stream;
};

template <typename Param, typename Moment, bool kMaster, int kTensors>
cudaError_t launch_sized(const Call& call) {
  Launch<kTensors> launch{call.table,
                          call.chunks,
                          call.ticket,
                          call.step.grad_factor,
                          call.step.found_inf,
                          call.step.seed,
                          static_cast<unsigned int>(call.num_chunks),
                          static_cast<int>(call.num_tensors),
                          call.step.zero_grads,
                          {},
                          {}};
  for (int64_t i = 0; i < call.num_groups; ++i) {
    launch.groups[i] = {narrowed<float>(call.groups[i]), call.groups[i].lr_tensor};
  }
  std::copy_n(call.grads, call.num_tensors, launch.grads);
  const dim3 grid(std::max(1u, launch.num_chunks));
  const cudaStream_t stream = call.stream;
  masked_update_kernel<Param, Moment, kMaster><<<grid, kThreads, 0, stream>>>(launch);
  return cudaGetLastError();
}

template <typename Param, typename Moment, bool kMaster>
cudaError_t launch(const Call& call) {
  return call.num_tensors <= kFewUpdateTensors
             ? launch_sized<Param, Moment, kMaster, kFewUpdateTensors>(call)
             : launch_sized<Param, Moment, kMaster, kUpdateTensors>(call);
}

template <typename Param, bool kMaster>
cudaError_t launch(DType moments, const Call& call) {
  switch (moments) {
    case DType::kFloat32:
      return launch<Param, Float32, kMaster>(call);
    case DType::kBFloat16:
      return launch<Param, StochasticBFloat16, kMaster>(call);
    case DType::kInt8:
      return launch<Param, EightBit, kMaster>(call);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t launch(const UpdateVariant& variant, const Call& call) {
  const DType moments = variant.moments;
  switch (variant.param) {
    case DType::kFloat32:
      return variant.master ? cudaErrorInvalidValue : launch<Float32, false>(moments, call);
    case DType::kBFloat16:
      if (variant.master) return launch<BFloat16, true>(moments, call);
      return variant.stochastic_rounding ? launch<StochasticBFloat16, false>(moments, call)
                                         : launch<BFloat16, false>(moments, call);
    case DType::kFloat16:
      return variant.master ? launch<Float16, true>(moments, call) : cudaErrorInvalidValue;
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

int masked_update_cuda(const UpdateRecord* table, const UpdateChunk* chunks, int64_t num_chunks,
                       unsigned int* ticket, void* const* grads, int64_t num_tensors,
                       const UpdateHyper* groups, int64_t num_groups, const UpdateVariant& variant,
                       const UpdateStep& step, void* stream) {
  if (num_tensors > kUpdateTensors || num_groups > kUpdateGroups || num_chunks > INT_MAX) {
    return cudaErrorInvalidValue;
  }
  return launch(variant, {table, chunks, num_chunks, ticket, grads, num_tensors, groups, num_groups,
                          step, static_cast<cudaStream_t>(stream)});
}

}  // namespace progtuning
