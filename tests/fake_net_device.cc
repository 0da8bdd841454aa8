// A stand-in for the CUDA runtime, as far as the library of an ONNX graph calls it: device memory is
// host memory of its own, and what is enqueued runs at once. The kernels of the graph are the host's
// templates under the names of the device's; `linear` and its kernels are plain loops here. With it
// everything but the kernels of CUDA targets runs on a machine without a device.
#define HOST_MULTIPROCESSORS 4
#include "host_cudart.h"
#include <math.h>

#include "device_linear.h"
#include "net.h"

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
