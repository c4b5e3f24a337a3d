// The only file of csrc that knows Python: checks what it gets, releases the GIL, turns a status
// into an exception. Shapes, dtypes and devices are checked by the op files in Python.
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "launchers.h"

namespace py = pybind11;
using namespace progtuning;

namespace {

// Addresses arrive as integers (tensor.data_ptr(), a raw stream).
using Address = std::uintptr_t;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

struct TensorList {
  std::vector<const void*> tensors;
  const std::vector<int64_t>& sizes;
  int64_t count;
};

TensorList checked_list(const char* op, const std::vector<Address>& tensors,
                        const std::vector<int64_t>& sizes) {
  if (tensors.size() != sizes.size()) {
    throw std::invalid_argument(std::string(op) + ": " + std::to_string(tensors.size()) +
                                " tensors but " + std::to_string(sizes.size()) + " sizes");
  }
  TensorList list{{}, sizes, static_cast<int64_t>(sizes.size())};
  list.tensors.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (sizes[i] < 0 || (sizes[i] > 0 && tensors[i] == 0)) {
      throw std::invalid_argument(std::string(op) + ": tensor " + std::to_string(i) +
                                  " has a negative size or no storage");
    }
    list.tensors.push_back(pointer<const void>(tensors[i]));
  }
  return list;
}

void check_output(const char* op, Address out) {
  if (out == 0) throw std::invalid_argument(std::string(op) + ": the output has no storage");
}

void masked_norm_cpu_checked(const std::vector<Address>& tensors, const std::vector<int64_t>& sizes,
                             int dtype, int kind, Address out, int num_threads) {
  const TensorList list = checked_list("masked_norm", tensors, sizes);
  check_output("masked_norm", out);
  if (num_threads < 1) throw std::invalid_argument("masked_norm: num_threads must be positive");
  if (!masked_norm_cpu(list.tensors.data(), sizes.data(), list.count, static_cast<DType>(dtype),
                       static_cast<NormKind>(kind), pointer<float>(out), num_threads)) {
    throw std::invalid_argument("masked_norm: no CPU kernel for dtype code " +
                                std::to_string(dtype));
  }
}

void dropout_cpu_checked(Address x, uint64_t seed, uint32_t limit, int64_t n, int dtype,
                         Address out, int num_threads) {
  if (num_threads < 1) throw std::invalid_argument("dropout: num_threads must be positive");
  if (limit == 0 || limit > 0xffff) throw std::invalid_argument("dropout: no limit of 16 bits");
  if (n < 0 || (n > 0 && (x == 0 || out == 0))) {
    throw std::invalid_argument("dropout: a negative size or no storage");
  }
  if (!dropout_cpu(pointer<const void>(x), seed, limit, n, static_cast<DType>(dtype),
                   pointer<void>(out), num_threads)) {
    throw std::invalid_argument("dropout: no CPU kernel for dtype code " + std::to_string(dtype));
  }
}

// What masked_update gets from Python: addresses and numbers, groups of (lr, weight_decay, eps,
// beta1, beta2, address of lr).
using HyperTuple = std::tuple<double, double, double, double, double, Address>;

std::vector<UpdateHyper> hyper_groups(const std::vector<HyperTuple>& groups) {
  std::vector<UpdateHyper> result;
  for (const auto& [lr, weight_decay, eps, beta1, beta2, lr_tensor] : groups) {
    result.push_back({lr, weight_decay, eps, beta1, beta2, pointer<const float>(lr_tensor)});
  }
  return result;
}

UpdateVariant update_variant(int param, int moments, bool master, bool stochastic_rounding) {
  return {static_cast<DType>(param), static_cast<DType>(moments), master, stochastic_rounding};
}

[[noreturn]] void no_update_kernel(const UpdateVariant& variant) {
  throw std::invalid_argument("masked_update: no kernel for parameters of dtype code " +
                              std::to_string(static_cast<int>(variant.param)) +
                              " with moments of code " +
                              std::to_string(static_cast<int>(variant.moments)) +
                              (variant.master ? " and a master" : ""));
}

void masked_update_cpu_checked(Address table, const std::vector<Address>& grads,
                               const std::vector<HyperTuple>& groups, int param, int moments,
                               bool master, bool stochastic_rounding, Address grad_factor,
                               Address found_inf, uint64_t seed, bool zero_grads,
                               int num_threads) {
  const auto* records = pointer<const UpdateRecord>(table);
  const auto count = static_cast<int64_t>(grads.size());
  if (num_threads < 1) throw std::invalid_argument("masked_update: num_threads must be positive");
  if (records == nullptr && count > 0) throw std::invalid_argument("masked_update: no table");
  for (int64_t i = 0; i < count; ++i) {
    if (records[i].group >= groups.size()) {
      throw std::invalid_argument("masked_update: tensor " + std::to_string(i) +
                                  " is of a group that is not there");
    }
  }
  const UpdateVariant variant = update_variant(param, moments, master, stochastic_rounding);
  const UpdateStep step{pointer<const float>(grad_factor), pointer<const float>(found_inf), seed,
                        zero_grads};
  if (!masked_update_cpu(records, count, reinterpret_cast<void* const*>(grads.data()),
                         hyper_groups(groups).data(), variant, step, num_threads)) {
    no_update_kernel(variant);
  }
}

#ifdef PROGTUNING_CUDA
void check_cuda(const char* op, int status) {
  if (status != 0) throw std::runtime_error(std::string(op) + ": " + cuda_error_string(status));
}

void masked_norm_cuda_checked(const std::vector<Address>& tensors,
                              const std::vector<int64_t>& sizes, int dtype, int kind,
                              Address partials, int64_t partials_size, Address out,
                              Address stream) {
  const TensorList list = checked_list("masked_norm", tensors, sizes);
  check_output("masked_norm", out);
  const int64_t needed = masked_norm_chunks(sizes.data(), list.count);
  if (partials_size < needed || (needed > 0 && partials == 0)) {
    throw std::invalid_argument("masked_norm: scratch of " + std::to_string(partials_size) +
                                " floats, " + std::to_string(needed) + " needed");
  }
  if (kind != static_cast<int>(NormKind::kL2) && kind != static_cast<int>(NormKind::kInf)) {
    throw std::invalid_argument("masked_norm: no norm of kind " + std::to_string(kind));
  }
  check_cuda("masked_norm", masked_norm_cuda(list.tensors.data(), sizes.data(), list.count,
                                             static_cast<DType>(dtype), static_cast<NormKind>(kind),
                                             pointer<float>(partials), pointer<float>(out),
                                             pointer<void>(stream)));
}

// What every launch over a bucket is given: the bucket's tables and the gradients' addresses.
void check_bucket(const std::string& op, Address table, Address chunks, int64_t num_chunks,
                  const std::vector<Address>& grads) {
  if (grads.size() > static_cast<size_t>(kUpdateTensors)) {
    throw std::invalid_argument(op + ": " + std::to_string(grads.size()) +
                                " tensors, a launch takes " + std::to_string(kUpdateTensors));
  }
  if (num_chunks < 0 || (num_chunks > 0 && (chunks == 0 || grads.empty()))) {
    throw std::invalid_argument(op + ": a negative number of chunks, or chunks of nothing");
  }
  if (!grads.empty() && table == 0) throw std::invalid_argument(op + ": no table");
}

void masked_update_cuda_checked(Address table, Address chunks, int64_t num_chunks, Address ticket,
                                const std::vector<Address>& grads,
                                const std::vector<HyperTuple>& groups, int param, int moments,
                                bool master, bool stochastic_rounding, Address grad_factor,
                                Address found_inf, uint64_t seed, bool zero_grads, Address stream) {
  check_bucket("masked_update", table, chunks, num_chunks, grads);
  if (ticket == 0) throw std::invalid_argument("masked_update: no ticket");
  if (groups.size() > static_cast<size_t>(kUpdateGroups)) {
    throw std::invalid_argument("masked_update: " + std::to_string(groups.size()) +
                                " groups, a launch takes " + std::to_string(kUpdateGroups));
  }
  const UpdateVariant variant = update_variant(param, moments, master, stochastic_rounding);
  const UpdateStep step{pointer<const float>(grad_factor), pointer<const float>(found_inf), seed,
                        zero_grads};
  check_cuda("masked_update",
             masked_update_cuda(
                 pointer<const UpdateRecord>(table), pointer<const UpdateChunk>(chunks), num_chunks,
                 pointer<unsigned int>(ticket), reinterpret_cast<void* const*>(grads.data()),
                 static_cast<int64_t>(grads.size()), hyper_groups(groups).data(),
                 static_cast<int64_t>(groups.size()), variant, step, pointer<void>(stream)));
}

void bucket_norm_partials_cuda_checked(Address table, Address chunks, int64_t num_chunks,
                                       const std::vector<Address>& grads, int dtype,
                                       Address partials, Address stream) {
  check_bucket("bucket_norm", table, chunks, num_chunks, grads);
  if (num_chunks > 0) check_output("bucket_norm", partials);
  check_cuda("bucket_norm",
             bucket_norm_partials_cuda(
                 pointer<const UpdateRecord>(table), pointer<const UpdateChunk>(chunks), num_chunks,
                 reinterpret_cast<void* const*>(grads.data()), static_cast<int64_t>(grads.size()),
                 static_cast<DType>(dtype), pointer<float>(partials), pointer<void>(stream)));
}

void norm_decision_cuda_checked(Address partials, int64_t count, Address grad_scale,
                                Address found_inf, float max_norm, bool skip_nonfinite,
                                Address control, Address stream) {
  if (count < 0 || (count > 0 && partials == 0)) {
    throw std::invalid_argument("norm_decision: no partial sums");
  }
  check_output("norm_decision", control);
  check_cuda(
      "norm_decision",
      norm_decision_cuda(pointer<const float>(partials), count, pointer<const float>(grad_scale),
                         pointer<const float>(found_inf), max_norm, skip_nonfinite,
                         pointer<float>(control), pointer<void>(stream)));
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
  using release_gil = py::call_guard<py::gil_scoped_release>;

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

  py::dict codes;
  codes["float32"] = static_cast<int>(DType::kFloat32);
  codes["bfloat16"] = static_cast<int>(DType::kBFloat16);
  codes["float16"] = static_cast<int>(DType::kFloat16);
  codes["float64"] = static_cast<int>(DType::kFloat64);
  codes["int8"] = static_cast<int>(DType::kInt8);
  m.attr("dtype_codes") = codes;
  py::dict kinds;
  kinds["l2"] = static_cast<int>(NormKind::kL2);
  kinds["inf"] = static_cast<int>(NormKind::kInf);
  m.attr("norm_kinds") = kinds;

  m.def("cuda_device_count", &device_count, "Devices the linked CUDA runtime can use; raises why.");
  m.def("cuda_versions", &runtime_and_driver, "(runtime, driver), 0 where there is none.");

  m.def("masked_norm_cpu", &masked_norm_cpu_checked, py::arg("tensors"), py::arg("sizes"),
        py::arg("dtype"), py::arg("kind"), py::arg("out"), py::arg("num_threads"), release_gil());
  m.def("dropout_cpu", &dropout_cpu_checked, py::arg("x"), py::arg("seed"), py::arg("limit"),
        py::arg("n"), py::arg("dtype"), py::arg("out"), py::arg("num_threads"), release_gil());
  m.attr("update_record_bytes") = sizeof(UpdateRecord);
  m.def("masked_update_cpu", &masked_update_cpu_checked, py::arg("table"), py::arg("grads"),
        py::arg("groups"), py::arg("param"), py::arg("moments"), py::arg("master"),
        py::arg("stochastic_rounding"), py::arg("grad_factor"), py::arg("found_inf"),
        py::arg("seed"), py::arg("zero_grads"), py::arg("num_threads"), release_gil());
#ifdef PROGTUNING_CUDA
  m.def(
      "masked_norm_chunks",
      [](const std::vector<int64_t>& sizes) {
        return masked_norm_chunks(sizes.data(), static_cast<int64_t>(sizes.size()));
      },
      py::arg("sizes"), "Floats of scratch that masked_norm_cuda needs.");
  m.def("masked_norm_cuda", &masked_norm_cuda_checked, py::arg("tensors"), py::arg("sizes"),
        py::arg("dtype"), py::arg("kind"), py::arg("partials"), py::arg("partials_size"),
        py::arg("out"), py::arg("stream"), release_gil());
  m.def("masked_update_cuda", &masked_update_cuda_checked, py::arg("table"), py::arg("chunks"),
        py::arg("num_chunks"), py::arg("ticket"), py::arg("grads"), py::arg("groups"),
        py::arg("param"), py::arg("moments"), py::arg("master"), py::arg("stochastic_rounding"),
        py::arg("grad_factor"), py::arg("found_inf"), py::arg("seed"), py::arg("zero_grads"),
        py::arg("stream"), release_gil());
  m.def("bucket_norm_partials_cuda", &bucket_norm_partials_cuda_checked, py::arg("table"),
        py::arg("chunks"), py::arg("num_chunks"), py::arg("grads"), py::arg("dtype"),
        py::arg("partials"), py::arg("stream"), release_gil());
  m.def("norm_decision_cuda", &norm_decision_cuda_checked, py::arg("partials"), py::arg("count"),
        py::arg("grad_scale"), py::arg("found_inf"), py::arg("max_norm"), py::arg("skip_nonfinite"),
        py::arg("control"), py::arg("stream"), release_gil());
#endif
}
