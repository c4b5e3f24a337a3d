// The only file of csrc that knows Python: checks what it gets, releases the GIL, turns a status
// into an exception. Shapes, dtypes and devices are checked by the ops in Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "launchers.h"

namespace py = pybind11;
using namespace progtuning;

// An address, which Python has as an integer (tensor.data_ptr(), a raw stream).
template <typename T>
struct At {
  T* address;
  operator T*() const { return address; }
};

namespace pybind11::detail {

template <typename T>
struct type_caster<At<T>> {
  PYBIND11_TYPE_CASTER(At<T>, const_name("int"));
  bool load(handle source, bool) {
    value.address = static_cast<T*>(PyLong_AsVoidPtr(source.ptr()));
    const bool failed = PyErr_Occurred() != nullptr;
    if (failed) PyErr_Clear();
    return !failed;
  }
};

template <typename Code>
struct code_caster {
  PYBIND11_TYPE_CASTER(Code, const_name("int"));
  bool load(handle source, bool) {
    const bool is_int = PyLong_Check(source.ptr());
    if (is_int) value = static_cast<Code>(source.cast<int>());
    return is_int;
  }
};
template <>
struct type_caster<DType> : code_caster<DType> {};
template <>
struct type_caster<Master> : code_caster<Master> {};

}  // namespace pybind11::detail

namespace {

using Tensors = std::vector<At<const void>>;
using Grads = std::vector<At<void>>;
using Sizes = std::vector<int64_t>;
// The members of UpdateHyper, UpdateVariant and UpdateStep, in their order.
using Hyper = std::tuple<double, double, double, double, double, At<const float>>;
using Variant = std::tuple<DType, DType, Master, bool>;
using Step = std::tuple<At<const float>, At<const float>, uint64_t, bool>;

template <typename Struct, typename... T>
Struct made(const std::tuple<T...>& members) {
  return std::apply([](auto... member) { return Struct{member...}; }, members);
}

std::vector<UpdateHyper> made(const std::vector<Hyper>& groups) {
  std::vector<UpdateHyper> result;
  for (const Hyper& group : groups) result.push_back(made<UpdateHyper>(group));
  return result;
}

// Vectors of addresses as the launchers take them.
template <typename T>
T* const* raw(const std::vector<At<T>>& addresses) {
  static_assert(sizeof(At<T>) == sizeof(T*));
  return reinterpret_cast<T* const*>(addresses.data());
}

void require(bool good, const char* why) {
  if (!good) throw std::invalid_argument(why);
}

std::string number(DType dtype) { return std::to_string(static_cast<int>(dtype)); }

void check_list(const Tensors& tensors, const Sizes& sizes, const float* out) {
  if (tensors.size() != sizes.size()) {
    throw std::invalid_argument("masked_norm: " + std::to_string(tensors.size()) + " tensors but " +
                                std::to_string(sizes.size()) + " sizes");
  }
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (sizes[i] < 0 || (sizes[i] > 0 && tensors[i] == nullptr)) {
      throw std::invalid_argument("masked_norm: tensor " + std::to_string(i) +
                                  " has a negative size or no storage");
    }
  }
  require(out != nullptr, "masked_norm: the output has no storage");
}

void norm_cpu(const Tensors& tensors, const Sizes& sizes, DType dtype, At<float> out, int threads) {
  check_list(tensors, sizes, out);
  require(threads > 0, "masked_norm: num_threads must be positive");
  if (!masked_norm_cpu(raw(tensors), sizes.data(), sizes.size(), dtype, out, threads)) {
    throw std::invalid_argument("masked_norm: no CPU kernel for dtype code " + number(dtype));
  }
}

void update_cpu(At<const UpdateRecord> table, const Grads& grads, const std::vector<Hyper>& groups,
                const Variant& members, const Step& step, int threads) {
  require(threads > 0, "masked_update: num_threads must be positive");
  require(table != nullptr || grads.empty(), "masked_update: no table");
  for (size_t i = 0; i < grads.size(); ++i) {
    if (table[i].group >= groups.size()) {
      throw std::invalid_argument("masked_update: tensor " + std::to_string(i) +
                                  " is of a group that is not there");
    }
  }
  const auto variant = made<UpdateVariant>(members);
  if (!masked_update_cpu(table, grads.size(), raw(grads), made(groups).data(), variant,
                         made<UpdateStep>(step), threads)) {
    throw std::invalid_argument("masked_update: no kernel for parameters of dtype code " +
                                number(variant.param) + " with moments of code " +
                                number(variant.moments) +
                                (variant.master == Master::kNone ? "" : " and a master"));
  }
}

void dropout(At<const void> x, uint64_t seed, uint32_t limit, int64_t n, DType dtype, At<void> out,
             int threads) {
  require(threads > 0, "dropout: num_threads must be positive");
  require(limit > 0 && limit <= 0xffff, "dropout: no limit of 16 bits");
  require(n == 0 || (n > 0 && x != nullptr && out != nullptr),
          "dropout: a negative size or no storage");
  if (!dropout_cpu(x, seed, limit, n, dtype, out, threads)) {
    throw std::invalid_argument("dropout: no CPU kernel for dtype code " + number(dtype));
  }
}

#ifdef PROGTUNING_CUDA
void check_cuda(const char* op, int status) {
  if (status != 0) throw std::runtime_error(std::string(op) + ": " + cuda_error_string(status));
}

int64_t norm_chunks(const Sizes& sizes) { return masked_norm_chunks(sizes.data(), sizes.size()); }

void norm_cuda(const Tensors& tensors, const Sizes& sizes, DType dtype, At<float> partials,
               int64_t partials_size, At<float> out, At<void> stream) {
  check_list(tensors, sizes, out);
  const int64_t needed = norm_chunks(sizes);
  if (partials_size < needed || (needed > 0 && partials == nullptr)) {
    throw std::invalid_argument("masked_norm: scratch of " + std::to_string(partials_size) +
                                " floats, " + std::to_string(needed) + " needed");
  }
  check_cuda("masked_norm", masked_norm_cuda(raw(tensors), sizes.data(), sizes.size(), dtype,
                                             partials, out, stream));
}

// What every launch over a bucket is given: its tables, and the gradients' addresses.
using BucketTables =
    std::tuple<At<const UpdateRecord>, At<const UpdateChunk>, int64_t, int64_t, At<unsigned int>>;

void check_count(int64_t count, int64_t most, const char* what) {
  if (count <= most) return;
  throw std::invalid_argument(std::to_string(count) + what + ", a launch takes " +
                              std::to_string(most));
}

UpdateBucket checked_bucket(const BucketTables& tables, const Grads& grads) {
  const auto& [table, chunks, num_chunks, chunk_elements, ticket] = tables;
  check_count(grads.size(), kUpdateTensors, " tensors");
  require(num_chunks == 0 || (num_chunks > 0 && chunks != nullptr && !grads.empty()),
          "a bucket with a negative number of chunks, or chunks of nothing");
  require(ticket != nullptr && (grads.empty() || table != nullptr), "a bucket without its tables");
  require(chunk_elements > 0 && chunk_elements % kChunkUnit == 0, "chunks of such a size");
  const int64_t num_tensors = grads.size();
  return {table, chunks, num_chunks, chunk_elements, ticket, raw(grads), num_tensors};
}

void update_cuda(const BucketTables& tables, const Grads& grads, const std::vector<Hyper>& groups,
                 const Variant& variant, const Step& step, At<void> stream) {
  check_count(groups.size(), kUpdateGroups, " groups");
  check_cuda("masked_update",
             masked_update_cuda(checked_bucket(tables, grads), made(groups).data(), groups.size(),
                                made<UpdateVariant>(variant), made<UpdateStep>(step), stream));
}

int update_slots(const Variant& variant, int64_t num_tensors) {
  int slots = 0;
  check_cuda("masked_update_slots",
             masked_update_slots_cuda(made<UpdateVariant>(variant), num_tensors, &slots));
  return slots;
}

void bucket_norm(const BucketTables& tables, const Grads& grads, DType dtype, At<float> partials,
                 At<void> stream) {
  const UpdateBucket bucket = checked_bucket(tables, grads);
  require(bucket.num_chunks == 0 || partials != nullptr, "bucket_norm: the output has no storage");
  check_cuda("bucket_norm", bucket_norm_partials_cuda(bucket, dtype, partials, stream));
}

void norm_decision(At<const float> partials, int64_t count, At<const float> grad_scale,
                   At<const float> found_inf, float max_norm, bool skip_nonfinite,
                   At<float> control, At<void> stream) {
  require(count == 0 || (count > 0 && partials != nullptr), "norm_decision: no partial sums");
  require(control != nullptr, "norm_decision: the output has no storage");
  check_cuda("norm_decision", norm_decision_cuda(partials, count, grad_scale, found_inf, max_norm,
                                                 skip_nonfinite, control, stream));
}
#endif

int device_count() {
  int count = 0;
#ifdef PROGTUNING_CUDA
  check_cuda("cuda_device_count", cuda_device_count(&count));
#endif
  return count;
}

// As CUDA writes them, 13000 for 13.0; the driver is 0 where none is installed.
std::pair<int, int> runtime_and_driver() {
  std::pair<int, int> versions{0, 0};
#ifdef PROGTUNING_CUDA
  check_cuda("cuda_versions", cuda_versions(&versions.first, &versions.second));
#endif
  return versions;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native ops of progtuning_kernels; called through progtuning_kernels.ops only.";
#ifdef PROGTUNING_CUDA
  m.attr("cuda_built") = true;
  m.attr("cuda_archs") = PROGTUNING_CUDA_ARCHS;
#else
  m.attr("cuda_built") = false;
  m.attr("cuda_archs") = "";
#endif
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
  m.attr("compiler") = __VERSION__;
  m.attr("update_record_bytes") = sizeof(UpdateRecord);
  const std::pair<const char*, DType> codes[] = {{"float32", DType::kFloat32},
                                                 {"bfloat16", DType::kBFloat16},
                                                 {"float16", DType::kFloat16},
                                                 {"float64", DType::kFloat64},
                                                 {"int8", DType::kInt8}};
  py::dict by_name;
  for (const auto& [name, code] : codes) by_name[name] = static_cast<int>(code);
  m.attr("dtype_codes") = by_name;

  m.def("cuda_device_count", &device_count, "Devices the linked CUDA runtime can use; raises why.");
  m.def("cuda_versions", &runtime_and_driver, "(runtime, driver), 0 where there is none.");
  const auto def = [&m](const char* name, auto* function) {
    m.def(name, function, py::call_guard<py::gil_scoped_release>());
  };
  def("masked_norm_cpu", &norm_cpu);
  def("masked_update_cpu", &update_cpu);
  def("dropout_cpu", &dropout);
#ifdef PROGTUNING_CUDA
  def("masked_norm_chunks", &norm_chunks);
  def("masked_norm_cuda", &norm_cuda);
  def("masked_update_cuda", &update_cuda);
  def("masked_update_slots_cuda", &update_slots);
  def("bucket_norm_partials_cuda", &bucket_norm);
  def("norm_decision_cuda", &norm_decision);
#endif
}
