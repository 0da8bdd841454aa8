// Calls the W4A4 kernels of sm_120, built with HB_TWIN, on data from the host: what
// tests/test_sm120_twin.py compares with the interpreter, byte for byte and sum for sum.
#include <cuda_runtime.h>

#include <vector>

#include "nvfp4_w4a4.h"

namespace {

using namespace hb;

// Device memory of the calls of one function: freed with it, 256 bytes of 0xEE behind each piece,
// which must be there afterwards.
class Memory {
 public:
  ~Memory() {
    for (void* p : pieces_) cudaFree(p);
  }
  template <class T>
  T* make(int64_t bytes, const void* from = nullptr) {
    void* p = nullptr;
    cudaMalloc(&p, bytes + 256);
    cudaMemset(p, 0xEE, bytes + 256);
    if (from) cudaMemcpy(p, from, bytes, cudaMemcpyHostToDevice);
    pieces_.push_back(p);
    sizes_.push_back(bytes);
    return static_cast<T*>(p);
  }
  bool whole() const {
    for (size_t i = 0; i < pieces_.size(); i++) {
      uint8_t guard[256];
      cudaMemcpy(guard, static_cast<uint8_t*>(pieces_[i]) + sizes_[i], 256, cudaMemcpyDeviceToHost);
      for (uint8_t byte : guard)
        if (byte != 0xEE) return false;
    }
    return true;
  }

 private:
  std::vector<void*> pieces_;
  std::vector<int64_t> sizes_;
};

int finish(const Memory& memory, int status) {
  const cudaError_t late = cudaDeviceSynchronize();
  if (status != cudaSuccess || late != cudaSuccess) return status ? status : late;
  return memory.whole() ? 0 : -1;
}

}  // namespace

extern "C" {

// x f32 or bf16 [m, width]; codes [m, code_row_k(k)/2] and scales SfAtom come back.
int twin_quantize(const void* x, int x_type, const float* gamma, float input_scale, int m, int k,
                  int prologue, float eps, int padded_rows, uint8_t* codes, uint8_t* scales) {
  Memory memory;
  const int64_t width = prologue == PROLOGUE_SILU_MUL ? 2 * k : k;
  const int64_t x_bytes = m * width * (x_type == F32 ? 4 : 2);
  const int64_t code_bytes = int64_t{m} * code_row_k(k) / 2, scale_bytes = sfatom_bytes(m, k);
  Quantize job = {};
  job.x = memory.make<void>(x_bytes, x);
  job.gamma = gamma ? memory.make<float>(k * 4, gamma) : nullptr;
  job.input_scale = memory.make<float>(4, &input_scale);
  job.codes = memory.make<uint8_t>(code_bytes);
  job.scales = memory.make<uint8_t>(scale_bytes);
  job.x_stride = width;
  job.m = m, job.k = k, job.padded_rows = padded_rows;
  job.x_type = x_type, job.prologue = prologue, job.eps = eps;
  const int status = finish(memory, quantize_rows(job, nullptr));
  cudaMemcpy(codes, job.codes, code_bytes, cudaMemcpyDeviceToHost);
  cudaMemcpy(scales, job.scales, scale_bytes, cudaMemcpyDeviceToHost);
  return status;
}

// kind 0: multiply_smallm, which may split K into as much as `room` bytes; 1, 2: what stands in for
// CUTLASS, bf16 and f32. k counts the padded codes; residual only with f32.
int twin_multiply(int kind, const uint8_t* x_codes, const uint8_t* x_scales, const uint8_t* w_codes,
                  const uint8_t* w_scales, const float* row_scale, float input_scale,
                  const float* bias, const float* residual, int out_type, int m, int n, int k,
                  int64_t room, int sms, void* out) {
  Memory memory;
  const int64_t out_bytes = int64_t{m} * n * (out_type == F32 ? 4 : 2);
  W4A4Gemm g = {};
  g.x = {memory.make<uint8_t>(int64_t{m} * k / 2, x_codes),
         memory.make<uint8_t>(sfatom_bytes(m, k), x_scales)};
  g.w = {memory.make<uint8_t>(int64_t{n} * k / 2, w_codes),
         memory.make<uint8_t>(sfatom_bytes(n, k), w_scales)};
  g.row_scale = memory.make<float>(n * 4, row_scale);
  g.input_scale = memory.make<float>(4, &input_scale);
  g.bias = bias ? memory.make<float>(n * 4, bias) : nullptr;
  g.residual = residual ? memory.make<float>(int64_t{m} * n * 4, residual) : nullptr;
  g.out = memory.make<void>(out_bytes);
  g.out_type = out_type;
  g.m = m, g.n = n, g.k = k;
  SplitScratch scratch = {memory.make<uint32_t>(kCounterBytes), memory.make<float>(room), room};
  cudaMemset(scratch.counters, 0, kCounterBytes);
  const int enqueued = kind == 0   ? multiply_smallm(g, scratch, sms, nullptr)
                       : kind == 1 ? multiply_cutlass_k128_bf16(g, sms, nullptr)
                                   : multiply_cutlass_k128_f32(g, sms, nullptr);
  int status = finish(memory, enqueued);
  cudaMemcpy(out, g.out, out_bytes, cudaMemcpyDeviceToHost);
  std::vector<uint32_t> counters(kCounterBytes / 4);
  cudaMemcpy(counters.data(), scratch.counters, kCounterBytes, cudaMemcpyDeviceToHost);
  for (uint32_t count : counters)
    if (count != 0) status = -2;
  return status;
}

}  // extern "C"
