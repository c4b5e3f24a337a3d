// dropout on the CPU: the random numbers that torch draws, faster, and their product with a tensor.
//
// Maths       bit_i = u_i < keep, out_i = x_i * (bit_i ? scale : 0): NaN and inf come through
// Random      torch::bernoulli_ takes one of two ways, which the caller finds out by trying:
//             kMt19937  one serial generator, two of its words w, w' for an element:
//                       u = ((w << 32 | w') mod 2^53) / 2^53
//             kMcg31    the processors of one maker: MKL's MCG31m1, begun at one word of that
//                       generator; M = 2^31 - 1, x_0 = word mod M or 1, x_i = a x_(i-1) mod M,
//                       u = x / M
//             The state that torch gives and takes is read and written where it lies; afterwards
//             it is the one that torch would have left.
// Time        torch needs 5.8 ns per element for the first: a call per word. Here a block of 624
//             words is made, tempered and compared in loops that vectorise. It stays serial, as
//             jumping ahead costs more than it saves; the second begins anywhere.
// Storage     bits: 1 per element, lowest first, the last byte filled with zeros
// Determinism the same bits for any number of threads and any instruction set
// Alone       g++ -O3 -std=c++17 -fopenmp -fno-math-errno -ffp-contract=off -c dropout_cpu.cpp
#include "launchers.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "formats.h"
#include "instruction_sets.h"

namespace progtuning {
namespace {

constexpr int64_t kPiece = 16384;  // elements that a thread takes at once, a multiple of 8

// eight bytes of 0 or 1 become eight bits, the first byte the lowest
PROGTUNING_RULE uint8_t packed(const uint8_t* flags) {
  uint64_t eight;
  std::memcpy(&eight, flags, 8);
  return static_cast<uint8_t>((eight * 0x0102040810204080u) >> 56);
}

// at::CPUGeneratorImpl's state up to what follows the engine; the words are 32-bit numbers
struct TorchState {
  uint64_t seed;
  int32_t left;  // 1 + words that are still to be had
  int32_t seeded;
  uint64_t next;
  uint64_t words[kMtWords];
};

PROGTUNING_RULE uint32_t twisted(uint32_t high, uint32_t low, uint32_t far) {
  const uint32_t y = (high & 0x80000000u) | (low & 0x7fffffffu);
  return far ^ (y >> 1) ^ ((low & 1u) * 0x9908b0dfu);
}

PROGTUNING_RULE uint32_t tempered(uint32_t y) {
  y ^= y >> 11;
  y ^= (y << 7) & 0x9d2c5680u;
  y ^= (y << 15) & 0xefc60000u;
  return y ^ (y >> 18);
}

// The next 624 words (Matsumoto and Nishimura, ACM TOMACS 8 (1998) 3-30). Every word needs one 397
// places on, so runs of 227 depend on nothing in them.
PROGTUNING_CLONES void next_words(uint32_t* words) {
  constexpr int kFar = 397, kNear = kMtWords - kFar;
#pragma GCC ivdep
  for (int i = 0; i < kNear; ++i) words[i] = twisted(words[i], words[i + 1], words[i + kFar]);
#pragma GCC ivdep
  for (int i = kNear; i < 2 * kNear; ++i) {
    words[i] = twisted(words[i], words[i + 1], words[i - kNear]);
  }
#pragma GCC ivdep
  for (int i = 2 * kNear; i < kMtWords - 1; ++i) {
    words[i] = twisted(words[i], words[i + 1], words[i - kNear]);
  }
  words[kMtWords - 1] = twisted(words[kMtWords - 1], words[0], words[kFar - 1]);
}

PROGTUNING_CLONES void temper(const uint32_t* words, int count, uint32_t* out) {
  for (int i = 0; i < count; ++i) out[i] = tempered(words[i]);
}

struct Mt19937 {
  uint32_t words[kMtWords];
  int left, next;

  explicit Mt19937(const TorchState& torch) : left(torch.left), next(static_cast<int>(torch.next)) {
    for (int i = 0; i < kMtWords; ++i) words[i] = static_cast<uint32_t>(torch.words[i]);
  }

  // Makes new words where the old ones are used up.
  void refill() {
    if (left > 1) return;
    next_words(words);
    left = kMtWords + 1;
    next = 0;
  }

  void store(TorchState* torch) const {
    torch->left = left;
    torch->next = next;
    for (int i = 0; i < kMtWords; ++i) torch->words[i] = words[i];
  }
};

// flags[i] = whether the number of words 2 i and 2 i + 1 is below the limit. 64-bit indices: Python
// compiles with -fwrapv, under which 2 * i of an int is not vectorised (0.6 ns a number, not 0.1).
PROGTUNING_CLONES void compare(const uint32_t* words, int64_t pairs, int64_t limit,
                               uint8_t* flags) {
  for (int64_t i = 0; i < pairs; ++i) {
    uint64_t pair;
    std::memcpy(&pair, words + 2 * i, 8);
    const uint64_t number = (pair << 32 | pair >> 32) & ((1ull << 53) - 1);
    flags[i] = static_cast<int64_t>(number) < limit;
  }
}

void draw_mt19937(TorchState* torch, int64_t n, double keep, uint8_t* bits) {
  Mt19937 engine(*torch);
  const auto limit = static_cast<int64_t>(std::ceil(keep * 0x1p53));
  uint32_t words[1 + kMtWords];  // one may be left over from the block before
  uint8_t flags[8 + kMtWords / 2 + 8] = {};
  int carried_words = 0, carried_flags = 0;
  for (int64_t done = 0; done < n;) {
    engine.refill();
    const int64_t wanted = 2 * (n - done) - carried_words;
    const int taken = static_cast<int>(std::min<int64_t>(wanted, engine.left - 1));
    temper(engine.words + engine.next, taken, words + carried_words);
    engine.left -= taken;
    engine.next += taken;
    const int pairs = (carried_words + taken) / 2;
    compare(words, pairs, limit, flags + carried_flags);
    done += pairs;
    if ((carried_words = (carried_words + taken) % 2) != 0) words[0] = words[2 * pairs];
    const int count = carried_flags + pairs;
    for (int i = 0; i + 8 <= count; i += 8) *bits++ = packed(flags + i);
    carried_flags = count % 8;
    std::memmove(flags, flags + count - carried_flags, 8);
  }
  if (carried_flags > 0) {
    std::memset(flags + carried_flags, 0, 8);
    *bits = packed(flags);
  }
  engine.store(torch);
}

constexpr uint32_t kMcgModulus = 0x7fffffffu;
constexpr uint32_t kMcgFactor = 1132489760u;
constexpr int kMcgLanes = 16;

PROGTUNING_RULE uint32_t mcg_product(uint32_t a, uint32_t b) {
  const uint64_t product = static_cast<uint64_t>(a) * b;
  const auto sum = static_cast<uint32_t>((product & kMcgModulus) + (product >> 31));
  return sum >= kMcgModulus ? sum - kMcgModulus : sum;
}

uint32_t mcg_power(uint64_t exponent) {
  uint32_t result = 1;
  for (uint32_t square = kMcgFactor; exponent > 0; exponent >>= 1) {
    if (exponent & 1) result = mcg_product(result, square);
    square = mcg_product(square, square);
  }
  return result;
}

// count numbers from x on; flags is filled up to a multiple of kMcgLanes
PROGTUNING_CLONES void compare_mcg31(uint32_t x, uint32_t step, int64_t count, uint32_t limit,
                                     uint8_t* flags) {
  uint32_t lanes[kMcgLanes];
  for (int lane = 0; lane < kMcgLanes; ++lane, x = mcg_product(x, kMcgFactor)) lanes[lane] = x;
  for (int64_t i = 0; i < count; i += kMcgLanes) {
    for (int lane = 0; lane < kMcgLanes; ++lane) flags[i + lane] = lanes[lane] < limit;
    for (int lane = 0; lane < kMcgLanes; ++lane) lanes[lane] = mcg_product(lanes[lane], step);
  }
}

void draw_mcg31(TorchState* torch, int64_t n, double keep, uint8_t* bits, int num_threads) {
  Mt19937 engine(*torch);
  engine.refill();
  const uint32_t word = tempered(engine.words[engine.next++]);
  --engine.left;
  engine.store(torch);
  const uint32_t first = std::max(word % kMcgModulus, 1u), step = mcg_power(kMcgLanes);
  const auto limit = static_cast<uint32_t>(std::ceil(keep * kMcgModulus));
  const int64_t pieces = (n + kPiece - 1) / kPiece;
#pragma omp parallel for num_threads(num_threads) schedule(static)
  for (int64_t piece = 0; piece < pieces; ++piece) {
    uint8_t flags[kPiece];
    const int64_t start = piece * kPiece, count = std::min(kPiece, n - start);
    compare_mcg31(mcg_product(first, mcg_power(start)), step, count, limit, flags);
    if (count % 8 != 0) std::memset(flags + count, 0, 8 - count % 8);
    for (int64_t i = 0; i < count; i += 8) bits[(start + i) / 8] = packed(flags + i);
  }
}

// The eight bits of a byte as numbers.
struct Ones {
  float of[256][8];
  Ones() {
    for (int byte = 0; byte < 256; ++byte) {
      for (int i = 0; i < 8; ++i) of[byte][i] = static_cast<float>(byte >> i & 1);
    }
  }
};
const Ones kOnes;

template <typename Format>
PROGTUNING_RULE void products(const void* input, const uint8_t* bits, float scale, int64_t start,
                              int64_t n, void* output) {
  const auto* x = static_cast<const typename Format::Stored*>(input) + start;
  auto* out = static_cast<typename Format::Stored*>(output) + start;
  bits += start / 8;
  // in two loops, the second of which vectorises: in one it did not, at three times the time
  constexpr int64_t kBatch = 256;
  float noise[kBatch];
  for (int64_t begin = 0; begin < n; begin += kBatch) {
    const int64_t count = std::min(kBatch, n - begin);
    for (int64_t i = 0; i < count; i += 8) std::memcpy(noise + i, kOnes.of[*bits++], 32);
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) {
      out[begin + i] = Format::narrow(Format::widen(x[begin + i]) * (noise[i] * scale), 0);
    }
  }
}

// A function each, because only functions can be cloned.
using Products = void (*)(const void*, const uint8_t*, float, int64_t, int64_t, void*);
#define PROGTUNING_PRODUCTS(name, Format)                                                       \
  PROGTUNING_CLONES void name(const void* x, const uint8_t* bits, float scale, int64_t start,   \
                              int64_t n, void* out) {                                           \
    products<Format>(x, bits, scale, start, n, out);                                            \
  }
PROGTUNING_PRODUCTS(products_float32, Float32)
PROGTUNING_PRODUCTS(products_bfloat16, BFloat16)
PROGTUNING_PRODUCTS(products_float16, Float16)

Products find_products(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return products_float32;
    case DType::kBFloat16:
      return products_bfloat16;
    case DType::kFloat16:
      return products_float16;
    default:
      return nullptr;
  }
}

}  // namespace

bool bernoulli_bits_cpu(void* generator, RandomSource source, int64_t n, double keep, uint8_t* bits,
                        int num_threads) {
  auto* torch = static_cast<TorchState*>(generator);
  if (torch->left < 1 || torch->left > kMtWords || torch->next > kMtWords) return false;
  if (source == RandomSource::kMt19937) {
    draw_mt19937(torch, n, keep, bits);
  } else {
    draw_mcg31(torch, n, keep, bits, num_threads);
  }
  return true;
}

bool masked_product_cpu(const void* x, const uint8_t* bits, float scale, int64_t n, DType dtype,
                        void* out, int num_threads) {
  const Products run = find_products(dtype);
  if (run == nullptr) return false;
  const int64_t pieces = (n + kPiece - 1) / kPiece;
#pragma omp parallel for num_threads(num_threads) schedule(static)
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t start = piece * kPiece;
    run(x, bits, scale, start, std::min(kPiece, n - start), out);
  }
  return true;
}

}  // namespace progtuning
