// What the statically linked CUDA runtime says of itself and of the machine; no kernels.
#include <cuda_runtime.h>

#include "launchers.h"

namespace progtuning {

const char* cuda_error_string(int status) {
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}

int cuda_device_count(int* count) {
  *count = 0;
  return cudaGetDeviceCount(count);
}

int cuda_versions(int* runtime, int* driver) {
  const cudaError_t status = cudaRuntimeGetVersion(runtime);
  return status != cudaSuccess ? status : cudaDriverGetVersion(driver);
}

}  // namespace progtuning
