// How a warp of masked_update.cu reads and writes its run of a chunk, in any format and alignment.
#pragma once

#include <cstdint>
#include <type_traits>

#include "update_work.h"

namespace progtuning {
namespace {

__device__ __forceinline__ unsigned int warp() { return threadIdx.x / kWarp; }
__device__ __forceinline__ unsigned int lane() { return threadIdx.x % kWarp; }

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

  __device__ __forceinline__ Run(const Work& work, unsigned char* staging, unsigned int first,
                                 bool vectors)
      : first(first), count(work.n - first), vectors(vectors), staging(staging) {}

  static __device__ __forceinline__ bool of_vectors(const Work& work, unsigned int first) {
    return first + kElements <= work.vectors;
  }

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

// Byte i alone: shift and mask in one instruction.
template <int kCount>
__device__ __forceinline__ uint32_t byte_of(const Packed<uint8_t, kCount>& bytes, int i) {
  return __byte_perm(bytes.words[i / 4], 0, 0x4440u | static_cast<uint32_t>(i % 4));
}

// The four bytes that four integers have at this place.
template <int kPlace>
__device__ __forceinline__ uint32_t bytes_of(int a, int b, int c, int d) {
  constexpr uint32_t kTwo = kPlace | (4 + kPlace) << 4;
  return __byte_perm(__byte_perm(a, b, kTwo), __byte_perm(c, d, kTwo), 0x5410u);
}

// 16 random bits for each of a lane's 8 elements.
struct Random {
  RandomWords words;

  __device__ __forceinline__ Random(const Work& work, const Run<8>& run, const PhiloxKeys& keys,
                                    RandomStream stream)
      : words(philox(keys, work.eighth + run.mine() / 8, stream, work.index, work.step)) {}

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

  __device__ __forceinline__ void store(const Work& work, const Run<kCount>& run,
                                        const PhiloxKeys& keys) {
    Packed<Stored, kCount> result;
    if constexpr (std::is_same_v<Param, StochasticBFloat16>) {
      const Random random(work, run, keys, RandomStream::kParam);
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

}  // namespace
}  // namespace progtuning
