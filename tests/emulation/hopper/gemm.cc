// nvfp4_gemm.cu of sm_90a for the host, with the choice of its tiles in the hands of a test.
#include "nvfp4_gemm.cu"

#define HB_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

hb::Ref at(const void* p) {
  return {p == nullptr ? hb::NONE : hb::WEIGHTS,
          static_cast<int64_t>(reinterpret_cast<uintptr_t>(p))};
}

}  // namespace

// {tokens, rows, whole, splits, units} of plan_gemm.
HB_EXPORT void planned(int m, int n, int k, int sms, int* found) {
  const hb::GemmPlan plan = hb::plan_gemm(m, n, k, sms);
  found[0] = plan.tokens, found[1] = plan.rows, found[2] = plan.whole;
  found[3] = plan.splits, found[4] = plan.units;
}

// Why the last launch failed.
HB_EXPORT const char* failure() {
  const char* why = emulation::machine().failure;
  return why == nullptr ? "" : why;
}

// out[m, n] = x W^T * row_scale + bias (+ residual), by tiles of tokens x rows, those of a partial
// wave shared by `splits` blocks. -1: that many may not share them.
HB_EXPORT int multiply(const void* codes, const void* scales, const void* x, void* out,
                       const float* row_scale, const float* bias, const float* residual, int m,
                       int n, int k, int stride, int f32, int tokens, int rows, int splits, int sms,
                       void* workspace, int64_t workspace_bytes) {
  using namespace hb;
  Step step = {};
  step.workspace = static_cast<uint8_t*>(workspace);
  step.workspace_bytes = workspace_bytes;
  step.bucket_tokens = m;
  step.sms = sms;
  Nvfp4LinearArgs args = {};
  args.x = at(x), args.w = at(codes), args.scales = at(scales), args.out = at(out);
  args.row_scale = at(row_scale), args.bias = at(bias), args.residual = at(residual);
  args.n = n, args.k = k, args.x_stride = stride;
  args.out_type = f32 != 0 ? F32 : BF16;
  const int tiles = static_cast<int>(kPair * ceil_div(m, tokens) * ceil_div(n, kPair * rows));
  const int whole = splits == 1 ? tiles : tiles / sms * sms, rest = tiles - whole;
  if (!may_split(tokens, rest, splits, sms)) return -1;
  return run_gemm(step, args, {tokens, rows, whole, splits, whole + rest * splits}, nullptr);
}
