// What the tests' stand-ins for the CUDA runtime share: one device whose memory is the host's, and
// where all is done at once. Included by one unit of a library; HOST_MULTIPROCESSORS is of the device.
#pragma once
#include <cuda_runtime_api.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

namespace {

template <class T>
T* fake(uintptr_t number) {
  return reinterpret_cast<T*>(number);
}

}  // namespace

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t) { return "cudaErrorOfATest"; }
const char* cudaGetErrorString(cudaError_t) { return "an error of a test"; }

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* facts, int) {
  memset(facts, 0, sizeof *facts);
  strcpy(facts->name, "Host");
  facts->major = 9;
  facts->multiProcessorCount = HOST_MULTIPROCESSORS;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = HOST_MULTIPROCESSORS, cudaSuccess;
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
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  return memmove(to, from, bytes), cudaSuccess;
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_step, const void* from, size_t from_step,
                              size_t bytes, size_t rows, cudaMemcpyKind, cudaStream_t) {
  for (size_t row = 0; row < rows; row++)
    memmove(static_cast<char*>(to) + row * to_step,
            static_cast<const char*>(from) + row * from_step, bytes);
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  return *stream = fake<CUstream_st>(1), cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

}  // extern "C"
