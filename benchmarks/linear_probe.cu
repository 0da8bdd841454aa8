// linear_probe.cu: the NVFP4 linears of an sm_90a library as plain C functions, and a kernel that
// only reads. cuda_linears.py builds it together with the templates and times it.
#include "args.h"
#include "hb_cuda.h"

namespace hb {
int nvfp4_gemv(const Step& step, const void* args, Stream stream);
int nvfp4_gemm(const Step& step, const void* args, Stream stream);
}  // namespace hb

namespace {

// Sums 16-byte words, so that no load can be left out; one block may stride over all of them.
__global__ void __launch_bounds__(512) read_kernel(const uint4* from, size_t words, uint32_t* out) {
  asm volatile("griddepcontrol.launch_dependents;");
  const size_t stride = size_t{gridDim.x} * blockDim.x;
  uint32_t sum = 0;
  size_t i = size_t{blockIdx.x} * blockDim.x + threadIdx.x;
  for (; i + 3 * stride < words; i += 4 * stride) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const uint4 v = __ldcs(from + i + j * stride);
      sum += v.x ^ v.y ^ v.z ^ v.w;
    }
  }
  for (; i < words; i += stride) sum += from[i].x;
  if (sum == 0x9E3779B9u) *out = sum;
}

hb::Ref at(const void* p) { return {hb::WEIGHTS, static_cast<int64_t>(reinterpret_cast<uintptr_t>(p))}; }

}  // namespace

#define HB_EXPORT extern "C" __attribute__((visibility("default")))

// out[m, n] (bf16, or f32 added to itself where `residual`) = P(x) W^T. Returns a cudaError_t.
HB_EXPORT int probe_linear(int gemm, const void* codes, const void* scales, const void* x,
                           const void* gamma, void* out, void* workspace,
                           int64_t workspace_bytes, int m, int n, int k, int prologue, int residual,
                           int sms, CUstream_st* stream) {
  hb::Step step = {};
  step.workspace = static_cast<uint8_t*>(workspace);
  step.workspace_bytes = workspace_bytes;
  step.bucket_tokens = m;
  step.sms = sms;
  hb::Nvfp4LinearArgs args = {};
  args.x = at(x), args.w = at(codes), args.scales = at(scales), args.out = at(out);
  if (gamma != nullptr) args.gamma = at(gamma);
  if (residual != 0) args.residual = at(out);
  args.n = n, args.k = k;
  args.prologue = prologue;
  args.eps = 1e-5f;
  args.out_type = residual != 0 ? hb::F32 : hb::BF16;
  args.x_stride = prologue == hb::PROLOGUE_SILU_MUL ? 2 * int64_t{k} : k;
  return gemm != 0 ? hb::nvfp4_gemm(step, &args, stream) : hb::nvfp4_gemv(step, &args, stream);
}

HB_EXPORT int probe_read(const void* from, size_t bytes, void* out, int blocks,
                         CUstream_st* stream) {
  read_kernel<<<blocks, 512, 0, stream>>>(static_cast<const uint4*>(from), bytes / 16,
                                          static_cast<uint32_t*>(out));
  return cudaGetLastError();
}
