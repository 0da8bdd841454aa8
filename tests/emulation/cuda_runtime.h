// Stands in for <cuda_runtime.h> where a C++ compiler reads CUDA sources: kernels run on the host,
// block after block, each thread of a block on a stack of its own until the next barrier. A barrier
// that some threads of a block do not reach aborts.
//
// What the templates of net_cuda use is here, and no more; all with internal linkage: each unit has
// a machine of its own.
#pragma once
#include <cuda_runtime_api.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)

static dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {
namespace {

constexpr unsigned kMostThreads = 1024, kWarp = 32;
constexpr size_t kStack = size_t{64} << 10;

struct Machine {
  ucontext_t host, threads[kMostThreads];
  bool ended[kMostThreads];
  uint64_t given[kMostThreads];  // to the other lanes of a warp
  char* stacks = nullptr;
  unsigned current = 0;
  void (*body)(const void*) = nullptr;
  const void* arguments = nullptr;
};

Machine machine;

// Until all threads of the block are here.
inline void pause() {
  swapcontext(&machine.threads[machine.current], &machine.host);
}

inline void enter() {
  machine.body(machine.arguments);
  machine.ended[machine.current] = true;
  pause();
}

inline void run_block(unsigned count) {
  for (unsigned t = 0; t < count; t++) {
    machine.ended[t] = false;
    ucontext_t& context = machine.threads[t];
    getcontext(&context);
    context.uc_stack.ss_sp = machine.stacks + t * kStack;
    context.uc_stack.ss_size = kStack;
    context.uc_link = &machine.host;
    makecontext(&context, enter, 0);
  }
  for (unsigned ended = 0; ended < count;) {
    ended = 0;
    for (unsigned t = 0; t < count; t++) {
      machine.current = t;
      threadIdx = dim3(t % blockDim.x, t / blockDim.x, 0);
      swapcontext(&machine.host, &machine.threads[t]);
      ended += machine.ended[t];
    }
    if (ended != 0 && ended != count) abort();
  }
}

template <class F>
void run(dim3 blocks, dim3 threads, const F& f) {
  if (machine.stacks == nullptr)
    machine.stacks = static_cast<char*>(malloc(kMostThreads * kStack));
  machine.body = [](const void* at) { (*static_cast<const F*>(at))(); };
  machine.arguments = &f;
  gridDim = blocks;
  blockDim = threads;
  for (unsigned z = 0; z < blocks.z; z++)
    for (unsigned y = 0; y < blocks.y; y++)
      for (unsigned x = 0; x < blocks.x; x++) {
        blockIdx = dim3(x, y, z);
        run_block(threads.x * threads.y * threads.z);
      }
}

// What lane `from` of the block's threads gives.
template <class V>
V taken(V value, unsigned from) {
  memcpy(&machine.given[machine.current], &value, sizeof value);
  pause();
  V found;
  memcpy(&found, &machine.given[from], sizeof found);
  pause();
  return found;
}

}  // namespace
}  // namespace emulation

namespace {

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  emulation::run(config->gridDim, config->blockDim, [=] { kernel(arguments...); });
  return cudaSuccess;
}

inline void __syncthreads() { emulation::pause(); }

template <class V>
V __shfl_xor_sync(unsigned, V value, unsigned mask) {
  return emulation::taken(value, emulation::machine.current ^ mask);
}

template <class V>
V __shfl_up_sync(unsigned, V value, unsigned by) {
  const unsigned own = emulation::machine.current;
  return emulation::taken(value, own % emulation::kWarp >= by ? own - by : own);
}

inline unsigned __ballot_sync(unsigned, bool is) {
  const unsigned own = emulation::machine.current;
  const unsigned first = own / emulation::kWarp * emulation::kWarp;
  emulation::machine.given[own] = is;
  emulation::pause();
  unsigned found = 0;
  for (unsigned i = 0; i < emulation::kWarp; i++)
    found |= static_cast<unsigned>(emulation::machine.given[first + i]) << i;
  emulation::pause();
  return found;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(uint64_t{a} * b >> 32);
}

template <class V>
V atomicCAS(V* at, V expected, V value) {
  const V found = *at;
  if (found == expected) *at = value;
  return found;
}

template <class V>
V atomicMax(V* at, V value) {
  const V found = *at;
  if (value > found) *at = value;
  return found;
}

}  // namespace
