// masked_update on CUDA: AdamW over all tensors of a bucket, in one launch; see README.md.
#include <algorithm>
#include <climits>
#include <type_traits>

#include "update_runs.h"
#include "update_work.h"

namespace progtuning {
namespace {

// The plain case, float32 everywhere, which all others elaborate: a block has a chunk of a tensor,
// a thread 4 consecutive elements of it at a time, whose loads are all under way before the first
// use. What is not aligned, and the end of a tensor, goes one by one: the bits are the same.
template <int kTensors>
__global__ void __launch_bounds__(kThreads, 6)
    update_float32_kernel(const __grid_constant__ Launch<kTensors> launch) {
  __shared__ Work work;
  if (threadIdx.x == 0) prepare<Float32, Float32, false>(launch, work);
  __syncthreads();
  if (!work.skip) {
    take_ticket(launch, work);
    const unsigned int whole = work.vectors / 4 * 4;
#pragma unroll 1
    for (unsigned int i = threadIdx.x * 4; i < whole; i += kThreads * 4) {
      Packed<float, 4> p, g, m, v;
      p.load(global<float>(work.param) + i);
      g.load(global<float>(work.grad) + i);
      m.load(global<float>(work.exp_avg) + i);
      v.load(global<float>(work.exp_avg_sq) + i);
      float x[4], exp_avg[4], exp_avg_sq[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        x[k] = p.get(k), exp_avg[k] = m.get(k), exp_avg_sq[k] = v.get(k);
        adamw<float>(work.at, g.get(k), x[k], exp_avg[k], exp_avg_sq[k]);
        p.set(k, x[k]), m.set(k, exp_avg[k]), v.set(k, exp_avg_sq[k]);
      }
      p.store(global<float>(work.param) + i);
      m.store(global<float>(work.exp_avg) + i);
      v.store(global<float>(work.exp_avg_sq) + i);
    }
#pragma unroll 1
    for (unsigned int i = whole + threadIdx.x; i < work.n; i += kThreads) {
      adamw<float>(work.at, global<float>(work.grad)[i], global<float>(work.param)[i],
                   global<float>(work.exp_avg)[i], global<float>(work.exp_avg_sq)[i]);
    }
  }
  finish<float>(launch, work);
}

// Moments in a format of their own each element.
template <typename Param, typename Moment, bool kMaster>
__device__ __forceinline__ void update_plain(const Work& work, unsigned char* staging,
                                             const PhiloxKeys& keys) {
  using Stored = typename Moment::Stored;
  constexpr int kSmallest = static_cast<int>(sizeof(Stored) < sizeof(typename Param::Stored)
                                                 ? sizeof(Stored)
                                                 : sizeof(typename Param::Stored));
  constexpr int kCount = 16 / kSmallest;
#pragma unroll 1
  for (unsigned int first = warp() * kWarp * kCount; first < work.n; first += kThreads * kCount) {
    const Run<kCount> run(work, staging, first, Run<kCount>::of_vectors(work, first));
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
    params.store(work, run, keys);
    if constexpr (std::is_same_v<Moment, StochasticBFloat16>) {
      const Random random(work, run, keys, RandomStream::kMoments);
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
__device__ __forceinline__ void update_codes(const Work& work, const Run<8>& run,
                                             const PhiloxKeys& keys) {
  constexpr int kCount = 8;
  Params<Param, kMaster, kCount> params(work, run);
  Packed<int8_t, kCount> m, m_new;
  Packed<uint8_t, kCount> v, v_new;
  run.load(work.exp_avg, m);
  run.load(work.exp_avg_sq, v);
  const float m_scale = global<float>(work.exp_avg_scale)[run.first / kQuantBlock];
  const float v_scale = global<float>(work.exp_avg_sq_scale)[run.first / kQuantBlock];
  float exp_avg[kCount], exp_avg_sq[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    exp_avg[i] = decode_exp_avg(static_cast<float>(m.get(i)), m_scale);
    exp_avg_sq[i] = decode_exp_avg_sq(static_cast<float>(byte_of(v, i)), v_scale);
    params.template update<true>(i, work.at, exp_avg[i], exp_avg_sq[i]);
  }
  params.store(work, run, keys);
  if (!run.vectors) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (run.mine() + i >= work.n) exp_avg[i] = exp_avg_sq[i] = 0;
    }
  }
  // v is not negative, a NaN's sign goes at the end
  uint32_t largest_m = 0, largest_v = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    largest_m = max(largest_m, magnitude(exp_avg[i]));
    largest_v = max(largest_v, bits_of(exp_avg_sq[i]));
  }
  const float m_after = float_of(__reduce_max_sync(0xffffffffu, largest_m));
  const float v_after = float_of(__reduce_max_sync(0xffffffffu, largest_v) & 0x7fffffffu);
  const float m_inverse = inverse_of_largest(m_after), v_inverse = inverse_of_largest(v_after);
  const Random random(work, run, keys, RandomStream::kMoments);
  int m_code[kCount], v_code[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    m_code[i] = encode_exp_avg(exp_avg[i], m_inverse);
    v_code[i] = encode_exp_avg_sq(exp_avg_sq[i], v_inverse, random.get(i));
  }
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    m_new.words[i / 4] = bytes_of<0>(m_code[i], m_code[i + 1], m_code[i + 2], m_code[i + 3]);
    v_new.words[i / 4] = bytes_of<2>(v_code[i], v_code[i + 1], v_code[i + 2], v_code[i + 3]);
  }
  run.store(m_new, work.exp_avg);
  run.store(v_new, work.exp_avg_sq);
  if (lane() == 0) {
    global<float>(work.exp_avg_scale)[run.first / kQuantBlock] = m_after;
    global<float>(work.exp_avg_sq_scale)[run.first / kQuantBlock] = v_after;
  }
}

// The two kinds of runs have code of their own: in one, a branch at every access would cost a tenth
// of all instructions.
template <typename Param, bool kMaster>
__device__ __forceinline__ void update_eight_bit(const Work& work, unsigned char* staging,
                                                 const PhiloxKeys& keys) {
  using Codes = Run<8>;
  static_assert(Codes::kElements == kQuantBlock, "a warp owns a block of codes");
#pragma unroll 1
  for (unsigned int first = warp() * kQuantBlock; first < work.n; first += kThreads * 8) {
    if (Codes::of_vectors(work, first)) {
      update_codes<Param, kMaster>(work, Codes(work, staging, first, true), keys);
    } else {
      update_codes<Param, kMaster>(work, Codes(work, staging, first, false), keys);
    }
  }
}

template <typename Param, typename Moment, bool kMaster, int kTensors>
__global__ void __launch_bounds__(kThreads)
    masked_update_kernel(const __grid_constant__ Launch<kTensors> launch) {
  __shared__ Work work;
  __shared__ __align__(16) unsigned char staging[kThreads / kWarp][kWarp * 8 * sizeof(float)];
  if (threadIdx.x == 0) prepare<Param, Moment, kMaster>(launch, work);
  __syncthreads();
  if (!work.skip) {
    take_ticket(launch, work);
    unsigned char* mine = staging[warp()];
    if constexpr (!std::is_same_v<Moment, EightBit>) {
      update_plain<Param, Moment, kMaster>(work, mine, launch.keys);
    } else if (work.exp_avg_scale == nullptr) {
      update_plain<Param, Float32, kMaster>(work, mine, launch.keys);
    } else {
      update_eight_bit<Param, kMaster>(work, mine, launch.keys);
    }
  }
  finish<typename Param::Stored>(launch, work);
}

template <typename Param, typename Moment, bool kMaster, int kTensors>
constexpr auto kernel_of() {
  if constexpr (std::is_same_v<Param, Float32> && std::is_same_v<Moment, Float32>) {
    return update_float32_kernel<kTensors>;
  } else {
    return masked_update_kernel<Param, Moment, kMaster, kTensors>;
  }
}

// A variant of the kernel, and how it is launched.
struct Variant {
  const void* kernel;
  cudaError_t (*launch)(const UpdateBucket&, const UpdateHyper*, int64_t, const UpdateStep&,
                        cudaStream_t);
};

template <typename Param, typename Moment, bool kMaster, int kTensors>
cudaError_t launch(const UpdateBucket& bucket, const UpdateHyper* groups, int64_t num_groups,
                   const UpdateStep& step, cudaStream_t stream) {
  Launch<kTensors> launch{bucket.table,
                          bucket.chunks,
                          bucket.ticket,
                          step.grad_factor,
                          step.found_inf,
                          philox_keys(step.seed),
                          static_cast<unsigned int>(bucket.num_chunks),
                          static_cast<unsigned int>(bucket.chunk_elements),
                          static_cast<int>(bucket.num_tensors),
                          step.zero_grads,
                          {},
                          {}};
  for (int64_t i = 0; i < num_groups; ++i) {
    launch.groups[i] = {narrowed<float>(groups[i]), groups[i].lr_tensor};
  }
  std::copy_n(bucket.grads, bucket.num_tensors, launch.grads);
  const dim3 grid(std::max(1u, launch.num_chunks));
  const auto kernel = kernel_of<Param, Moment, kMaster, kTensors>();
  kernel<<<grid, kThreads, 0, stream>>>(launch);
  return cudaGetLastError();
}

template <typename Param, typename Moment, bool kMaster, int kTensors>
Variant variant_of() {
  const auto kernel = kernel_of<Param, Moment, kMaster, kTensors>();
  return {reinterpret_cast<const void*>(kernel), launch<Param, Moment, kMaster, kTensors>};
}

template <typename Param, typename Moment, bool kMaster>
Variant sized(bool few) {
  return few ? variant_of<Param, Moment, kMaster, kFewUpdateTensors>()
             : variant_of<Param, Moment, kMaster, kUpdateTensors>();
}

template <typename Param, bool kMaster>
Variant with_moments(DType moments, bool few) {
  return moments == DType::kFloat32    ? sized<Param, Float32, kMaster>(few)
         : moments == DType::kBFloat16 ? sized<Param, StochasticBFloat16, kMaster>(few)
         : moments == DType::kInt8     ? sized<Param, EightBit, kMaster>(few)
                                       : Variant{};
}

// Without a kernel where there is none.
Variant find(const UpdateVariant& variant, int64_t num_tensors) {
  const DType moments = variant.moments;
  const bool few = num_tensors <= kFewUpdateTensors;
  if (variant.master == Master::kResidual) return {};
  const bool master = variant.master == Master::kFloat32;
  if (variant.param == DType::kFloat32 && !master) {
    return with_moments<Float32, false>(moments, few);
  }
  if (variant.param == DType::kBFloat16) {
    return master                        ? with_moments<BFloat16, true>(moments, few)
           : variant.stochastic_rounding ? with_moments<StochasticBFloat16, false>(moments, few)
                                         : with_moments<BFloat16, false>(moments, few);
  }
  const bool half = variant.param == DType::kFloat16 && master;
  return half ? with_moments<Float16, true>(moments, few) : Variant{};
}

}  // namespace

int masked_update_cuda(const UpdateBucket& bucket, const UpdateHyper* groups, int64_t num_groups,
                       const UpdateVariant& variant, const UpdateStep& step, void* stream) {
  const Variant found = find(variant, bucket.num_tensors);
  if (found.kernel == nullptr || bucket.num_tensors > kUpdateTensors ||
      num_groups > kUpdateGroups || bucket.num_chunks > INT_MAX ||
      bucket.chunk_elements % kChunkUnit != 0 || bucket.chunk_elements > INT_MAX) {
    return cudaErrorInvalidValue;
  }
  return found.launch(bucket, groups, num_groups, step, static_cast<cudaStream_t>(stream));
}

int masked_update_slots_cuda(const UpdateVariant& variant, int64_t num_tensors, int* slots) {
  const Variant found = find(variant, num_tensors);
  if (found.kernel == nullptr) return cudaErrorInvalidValue;
  int device = 0, multiprocessors = 0, blocks = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, found.kernel, kThreads, 0);
  *slots = multiprocessors * blocks;
  return status;
}

}  // namespace progtuning
