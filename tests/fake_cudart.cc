// A stand-in for the CUDA runtime and for the kernels of a model: device memory is host memory, and
// what is enqueued runs at once, or is recorded where a graph is captured. With it the executor of
// the CUDA targets (session, graphs, upload, exports) runs, checks and all, on a machine without a
// device.
//
// The model: `embed` writes each token's id where its page of the KV cache says; a head reads the
// ids of a sequence back through the block table, and its logits point at a token made of them all.
#define HOST_MULTIPROCESSORS 4
#include "host_cudart.h"

#include <functional>
#include <new>
#include <vector>

#include "args.h"
#include "hb_cuda.h"
#include "sample.h"

struct CUgraph_st {
  std::vector<std::function<void()>> nodes;
};
struct CUgraphExec_st {
  std::vector<std::function<void()>> nodes;
};

namespace {

CUgraph_st* capturing = nullptr;

void enqueue(std::function<void()> work) {
  if (capturing != nullptr)
    capturing->nodes.push_back(std::move(work));
  else
    work();
}

}  // namespace

extern "C" {

cudaError_t cudaHostAlloc(void** data, size_t bytes, unsigned) { return cudaMalloc(data, bytes); }
cudaError_t cudaFreeHost(void* data) { return free(data), cudaSuccess; }
cudaError_t cudaHostGetDevicePointer(void** at, void* data, unsigned) {
  return *at = data, cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  return memcpy(to, from, bytes), cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t* event) {
  return *event = fake<CUevent_st>(1), cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return cudaEventCreate(event); }
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) {
  return *ms = 0.25f, cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
  return capturing = new CUgraph_st, cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  *graph = capturing;
  capturing = nullptr;
  return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  for (size_t i = 0; nodes != nullptr && i < *count; i++) nodes[i] = fake<CUgraphNode_st>(1);
  return *count = graph->nodes.size(), cudaSuccess;
}
cudaError_t cudaGraphNodeGetType(cudaGraphNode_t, cudaGraphNodeType* type) {
  return *type = cudaGraphNodeTypeKernel, cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  return *exec = new CUgraphExec_st{graph->nodes}, cudaSuccess;
}
cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t) {
  for (const auto& node : exec->nodes) node();
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete graph, cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) { return delete exec, cudaSuccess; }

}  // extern "C"

namespace hb {
namespace {

int32_t* cell(const Step& step, int32_t slot, int32_t position) {
  const int32_t page = step.in.block_table[slot * step.max_pages + position / kPageTokens];
  uint8_t* at = step.state + plan.state_bytes_per_page * page;
  return reinterpret_cast<int32_t*>(at) + position % kPageTokens;
}

int head(const Step& step) {
  enqueue([step] {
    for (int32_t row = 0; row < *step.in.rows_wanted; row++) {
      const int32_t token = step.in.rows[row], last = step.in.positions[token];
      int64_t sum = last + 1;
      for (int32_t i = 0; i <= last; i++) sum += 7 * *cell(step, step.in.slots[token], i);
      float* logits = step.logits + static_cast<int64_t>(row) * plan.vocab;
      for (int32_t i = 0; i < plan.vocab; i++) logits[i] = 0;
      logits[sum % (plan.vocab - 8)] = 5;
    }
  });
  return cudaSuccess;
}

int nothing() {
  enqueue([] {});
  return cudaSuccess;
}

}  // namespace

int embed_bf16(const Step& step, const void*, Stream) {
  enqueue([step] {
    for (int32_t i = 0; i < *step.in.tokens; i++)
      *cell(step, step.in.slots[i], step.in.positions[i]) = step.in.ids[i];
  });
  return cudaSuccess;
}

int dense_gemv_bf16(const Step& step, const void*, Stream) { return head(step); }
int dense_gemm_bf16(const Step& step, const void*, Stream) { return head(step); }
int nvfp4_gemv(const Step&, const void*, Stream) { return nothing(); }
int nvfp4_gemm(const Step&, const void*, Stream) { return nothing(); }
int rope_append(const Step&, const void*, Stream) { return nothing(); }
int attention_decode(const Step&, const void*, Stream) { return nothing(); }
int attention_prefill(const Step&, const void*, Stream) { return nothing(); }
int take_rows(const Step&, const void*, Stream) { return nothing(); }

// Greedy; a slot's temperature is added to the token, so that a test sees whose it was.
int sample(const Step& step, const void* args, Stream) {
  enqueue([step, a = *static_cast<const SampleArgs*>(args)] {
    int32_t* ring = a.ring + *a.step % a.ring_steps * a.ring_rows;
    for (int32_t row = 0; row < *step.in.rows_wanted; row++) {
      const float* logits = step.logits + static_cast<int64_t>(row) * plan.vocab;
      int32_t best = 0;
      for (int32_t i = 0; i < plan.vocab; i++)
        if (logits[i] > logits[best]) best = i;
      const int32_t token = step.in.rows[row];
      best += static_cast<int32_t>(a.sampling[step.in.slots[token]].temperature);
      step.in.ids[token] = best;
      step.in.positions[token]++;
      ring[row] = best;
    }
    if (*step.in.rows_wanted > 0) ++*a.step;
  });
  return cudaSuccess;
}

}  // namespace hb
