// Every native op, as plain declarations: no Python, no torch, no CUDA header.
//
// Conventions. Tensors are addresses with their number of elements (int64). An op writes only into
// memory that its caller allocated. CPU launchers take the number of threads; CUDA launchers take
// their stream last, without a default, launch on the calling thread's current device, never wait
// for the device, and return a cudaError_t as int (0 is success).
#pragma once

#include <cstdint>

namespace progtuning {

// Codes shared with progtuning_kernels/backend.py, which reads them from the module.
enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3, kInt8 = 4 };

// Elements that are summed before the partial sums are added: the unit of work on both devices. 7 M
// elements (one BERT block) are 874 units; an H200 works on 1,056 at once.
constexpr int64_t kNormChunk = 8192;

// Number of chunks of a list of tensors: the floats that masked_norm_cuda needs as scratch.
int64_t masked_norm_chunks(const int64_t* sizes, int64_t num_tensors);

// out[0] = L2 norm over all elements of all tensors, NaN and inf included. float32, bfloat16,
// float16, float64.
// Returns false for any other dtype, having done nothing.
bool masked_norm_cpu(const void* const* tensors, const int64_t* sizes, int64_t num_tensors,
                     DType dtype, float* out, int num_threads);

// The same on the current CUDA device. float32, bfloat16, float16.
// partials: masked_norm_chunks(sizes) floats of scratch, overwritten.
int masked_norm_cuda(const void* const* tensors, const int64_t* sizes, int64_t num_tensors,
                     DType dtype, float* partials, float* out, void* stream);

// What is updated in the parameter's place, rounded to it afterwards: a float32 copy, or the
// bfloat16 parameter and 8 more bits (update_rules.h).
enum class Master : int { kNone = 0, kFloat32 = 1, kResidual = 2 };

// One active tensor of a bucket, as it lies in the bucket's table: 9 words of 8 bytes, which
// progtuning_kernels/ops/masked_update/bucket.py fills. The table is in the memory of the device
// and holds for a whole stage; only the gradients' addresses come anew with every step.
struct UpdateRecord {
  void* param;
  void* exp_avg;
  void* exp_avg_sq;
  void* master;             // float32, or int8 residuals; null: none
  float* exp_avg_scale;     // one per 256 elements where moments are 8-bit codes; null: they are
  float* exp_avg_sq_scale;  // float32 in this tensor
  float* step;              // updates it has had
  int64_t size;
  uint32_t index;  // of the tensor in the optimizer: part of the random numbers' counter
  uint32_t group;  // of the hyper-parameters
};

// What a bucket's tensors have in common. kInt8: block-wise 8-bit codes.
struct UpdateVariant {
  DType param;
  DType moments;
  Master master;
  bool stochastic_rounding;  // of bfloat16 parameters; bfloat16 and 8-bit moments always are
};

// Hyper-parameters of a group in float64, as Python has them.
struct UpdateHyper {
  double lr, weight_decay, eps, beta1, beta2;
  const float* lr_tensor;  // read on the device in lr's place; null: none
};

// What a step brings.
struct UpdateStep {
  const float* grad_factor;  // gradients are multiplied by it; null: 1
  const float* found_inf;    // not 0: nothing is updated; null: 0
  uint64_t seed;
  bool zero_grads;  // gradients are zero afterwards, in a skipped step too
};

// AdamW on every tensor of the table whose gradient is not null, and *step + 1 for each of them.
// float32, bfloat16 (also with residuals), float64 (moments float64), float16 (with a float32
// master); grads as param.
// Returns false for any other variant, having done nothing.
bool masked_update_cpu(const UpdateRecord* table, int64_t num_tensors, void* const* grads,
                       const UpdateHyper* groups, const UpdateVariant& variant,
                       const UpdateStep& step, int num_threads);

// A thread block's share of a bucket on CUDA: the chunk of a tensor that has this number. How many
// elements a chunk has, `UpdateBucket` says.
struct alignas(8) UpdateChunk {
  int32_t tensor;
  int32_t chunk;
};

// Gradients' addresses travel by value in a launch's parameters, of which 32764 bytes fit; 448 of
// them stay below 4 KiB and have kernels of their own.
constexpr int kFewUpdateTensors = 448;
constexpr int kUpdateTensors = 4032;
constexpr int kUpdateGroups = 8;

// What every size of a chunk is a multiple of: 4 elements for each of a block's 256 threads.
constexpr int64_t kChunkUnit = 1024;

// A bucket on the current CUDA device, where table, chunks and ticket lie; grads is read at the
// call.
struct UpdateBucket {
  const UpdateRecord* table;
  const UpdateChunk* chunks;  // all of the bucket's
  int64_t num_chunks;
  int64_t chunk_elements;  // a multiple of kChunkUnit; kNormChunk for bucket_norm_partials_cuda
  unsigned int* ticket;    // 0, and 0 again after a launch; bucket_norm_partials_cuda needs none
  void* const* grads;
  int64_t num_tensors;  // at most kUpdateTensors
};

// masked_update_cpu on the current CUDA device, where what `step` points to lies; at most
// kUpdateGroups groups, read here and now. float32, bfloat16, float16 (with master); no residuals.
int masked_update_cuda(const UpdateBucket& bucket, const UpdateHyper* groups, int64_t num_groups,
                       const UpdateVariant& variant, const UpdateStep& step, void* stream);

// *slots = thread blocks of masked_update_cuda that the current CUDA device runs at once.
int masked_update_slots_cuda(const UpdateVariant& variant, int64_t num_tensors, int* slots);

// partials[i] = sum of squares of the gradients in chunk i of a bucket, 0 where there is no
// gradient, with the bits of masked_norm_cuda. float32, bfloat16 or float16; several buckets write
// theirs one behind the other.
int bucket_norm_partials_cuda(const UpdateBucket& bucket, DType dtype, float* partials,
                              void* stream);

// What the partial sums of all buckets mean for a step. grad_scale: gradients are that much too
// large; null: 1. found_inf: not 0 skips the step; null: 0. max_norm: 0 or less does not clip.
//     control[0] = norm = sqrt(sum of partials) / grad_scale
//     control[1] = min(1, max_norm / (norm + 1e-6)) / grad_scale, NaN where norm is
//     control[2] = 1 to skip the step: found_inf, or a norm that is not finite if skip_nonfinite
//     control[3] += control[2]
int norm_decision_cuda(const float* partials, int64_t count, const float* grad_scale,
                       const float* found_inf, float max_norm, bool skip_nonfinite, float* control,
                       void* stream);

// out = x * (u < limit ? 2^16 / limit : 0), rounded to nearest; u: 16 bits per element, a function
// of seed and index. 0 < limit < 2^16. float32, bfloat16, float16; out may be x.
// Returns false for any other dtype, having done nothing.
bool dropout_cpu(const void* x, uint64_t seed, uint32_t limit, int64_t n, DType dtype, void* out,
                 int num_threads);

// What the linked CUDA runtime says of itself and of the machine.
const char* cuda_error_string(int status);
int cuda_device_count(int* count);
int cuda_versions(int* runtime, int* driver);

}  // namespace progtuning
