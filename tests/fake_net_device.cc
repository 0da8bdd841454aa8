// A stand-in for the CUDA runtime, as far as the library of an ONNX graph calls it: device memory is
// host memory of its own, and what is enqueued runs at once. The kernels of the graph are the host's
// templates under the names of the device's; `linear` and its kernels are plain loops here. With it
// everything but the kernels of CUDA targets runs on a machine without a device.
#include <cuda_runtime_api.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "device_linear.h"
#include "net.h"

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t) { return "cudaErrorOfATest"; }
const char* cudaGetErrorString(cudaError_t) { return "an error of a test"; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = 4, cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* facts, int) {
  memset(facts, 0, sizeof *facts);
  strcpy(facts->name, "Host");
  facts->major = 9;
  facts->multiProcessorCount = 4;
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  return *free = *total = size_t{4} << 30, cudaSuccess;
}
cudaError_t cudaMalloc(void** data, size_t bytes) {
  *data = aligned_alloc(256, (bytes + 255) / 256 * 256);
  memset(*data, 0xA5, bytes);
  return cudaSuccess;
}
cudaError_t cudaFree(void* data) { return free(data), cudaSuccess; }
cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  return memset(data, value, bytes), cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  return memcpy(to, from, bytes), cudaSuccess;
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_step, const void* from, size_t from_step,
                              size_t bytes, size_t rows, cudaMemcpyKind, cudaStream_t) {
  for (size_t row = 0; row < rows; row++)
    memcpy(static_cast<char*>(to) + row * to_step, static_cast<const char*>(from) + row * from_step,
           bytes);
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  return *stream = reinterpret_cast<cudaStream_t>(1), cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

}  // extern "C"

namespace hb {

int plain_linear_f32(const Step&, const void*, CUstream_st*) { return cudaErrorNotSupported; }

namespace net::cuda {

bool linear(Call& call) {
  const auto& facts = *static_cast<const LinearFacts*>(call.facts());
  const Tensor &x = *call.in(0), &w = *call.in(1);
  const Tensor* bias = facts.bias < 0 ? nullptr : call.in(facts.bias);
  const Tensor* residual = facts.residual < 0 ? nullptr : call.in(facts.residual);
  Shape shape = x.shape;
  shape[shape.rank - 1] = facts.n;
  float* out = call.output<float>(0, F32, shape);
  for (int64_t i = 0; out != nullptr && i < shape.count(); i++) {
    const int64_t row = i / facts.n, column = i % facts.n;
    float sum = bias == nullptr ? 0 : bias->as<float>()[column];
    for (int64_t k = 0; k < facts.k; k++)
      sum += x.as<float>()[row * facts.k + k] * w.as<float>()[column * facts.k + k];
    if (facts.gelu) sum = sum / 2 * (1 + erff(sum * 0.70710678f));
    out[i] = residual == nullptr ? sum : sum + residual->as<float>()[i];
  }
  return out != nullptr;
}

}  // namespace net::cuda
}  // namespace hb
