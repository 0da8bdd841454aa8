// Stands in for the templates' cuda_common.cuh where a C++ compiler reads nvfp4_gemm.cu: clusters
// run on the host, one behind the other, every thread on a stack of its own. A thread that waits
// gives way to the next; where all wait for each other, the launch fails and says why. Copies of the
// copy engine are carried out later than they are asked for, one a round.
#pragma once
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#include <vector_functions.h>

#include <algorithm>
#include <deque>
#include <functional>
#include <vector>

#undef __global__
#undef __device__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#undef __shared__
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static
#define HB_DEVICE inline

static dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr int kLanes = 32, kNamed = 16;
constexpr int kSpell = 48, kSlow = 4;  // rounds in which a block is slow, and by how much
constexpr size_t kStack = size_t{96} << 10;
constexpr uint32_t kArena = 256 << 10;  // shared memory of a block

struct Meeting {  // of threads that come to a barrier
  int here = 0;
  uint64_t held = 0;
};

struct Block {
  Meeting named[kNamed];
};

struct Thread {
  ucontext_t context;
  dim3 thread, block;
  int rank = 0;  // of the block in its cluster
  bool ended = false;
  uint64_t cluster_waits = 0;
  uint32_t fragment[2][4] = {};
  uint64_t multiplies = 0;
};

struct Machine {
  ucontext_t host;
  std::vector<Thread> threads;
  std::vector<Block> blocks;
  std::vector<uint64_t> arena;
  std::deque<std::function<void()>> copies;
  int current = 0;
  uint64_t events = 0;  // things that a waiting thread may have waited for
  uint64_t cluster_arrivals = 0, clusters_met = 0;
  bool running = false;  // a thread, not the host between two of them
  const char* failure = nullptr;
  std::function<void()> body;

  Thread& thread() { return threads[static_cast<size_t>(current)]; }
  Block& block() { return blocks[static_cast<size_t>(thread().rank)]; }
  uint8_t* shared() { return reinterpret_cast<uint8_t*>(arena.data()); }
  void enter() {
    threadIdx = thread().thread;
    blockIdx = thread().block;
  }
};

inline Machine& machine() {
  static Machine all;
  return all;
}

inline void pause() {
  Machine& m = machine();
  m.running = false;
  swapcontext(&m.thread().context, &m.host);
}

// Ends the launch; a thread does not come back.
inline void give_up(const char* why) {
  Machine& m = machine();
  if (m.failure == nullptr) m.failure = why;
  while (m.running) pause();
}

template <class Condition>
void wait_until(Condition condition) {
  while (!condition()) pause();
  machine().events++;
}

inline void run_thread() {
  machine().body();
  machine().thread().ended = true;
  machine().events++;
  pause();
}

// Until all threads of the cluster whose first block is `first` have ended.
inline void run_cluster(int first, int blocks, int threads) {
  Machine& m = machine();
  static std::vector<char> stacks;
  const int count = blocks * threads;
  stacks.resize(static_cast<size_t>(count) * kStack);
  m.threads.assign(static_cast<size_t>(count), Thread());
  m.blocks.assign(static_cast<size_t>(blocks), Block());
  m.arena.assign(static_cast<size_t>(blocks) * kArena / 8, 0xA5A5A5A5A5A5A5A5u);
  m.copies.clear();
  m.cluster_arrivals = m.clusters_met = 0;
  for (int i = 0; i < count; i++) {
    Thread& t = m.threads[static_cast<size_t>(i)];
    t.thread = dim3(static_cast<unsigned>(i % threads));
    t.block = dim3(static_cast<unsigned>(first + i / threads));
    t.rank = i / threads;
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = stacks.data() + static_cast<size_t>(i) * kStack;
    t.context.uc_stack.ss_size = kStack;
    t.context.uc_link = &m.host;
    makecontext(&t.context, run_thread, 0);
  }
  int quiet = 0;  // rounds
  for (int left = count, round = 0; left > 0; round++) {
    const uint64_t before = m.events;
    const int slow = round / kSpell % 2;  // one block falls behind, then the other
    left = 0;
    for (m.current = 0; m.current < count; m.current++) {
      if (m.thread().ended) continue;
      left++;
      if (m.thread().rank == slow && round % kSlow != 0) continue;
      m.enter();
      m.running = true;
      swapcontext(&m.host, &m.thread().context);
      if (m.failure != nullptr) return;
    }
    if (!m.copies.empty()) {
      m.copies.front()();
      m.copies.pop_front();
      m.events++;
    }
    quiet = m.events == before ? quiet + 1 : 0;
    if (left > 0 && quiet > kSlow) give_up("all threads wait for each other");
    if (m.failure != nullptr) return;
  }
  if (!m.copies.empty()) give_up("a block ended before its copies");
}

// A transaction barrier: bytes outstanding, arrivals outstanding, arrivals of a phase, phase.
struct Transactions {
  int32_t bytes;
  uint32_t pending : 15, arrivals : 16, phase : 1;
};

inline Transactions& transactions(uint32_t address) {
  return *reinterpret_cast<Transactions*>(machine().shared() + address);
}

inline void settle(uint32_t address, int arrivals, int bytes) {
  Transactions& b = transactions(address);
  if (b.pending < static_cast<unsigned>(arrivals)) {
    return give_up("more arrivals than a phase takes");
  }
  b.pending = b.pending - static_cast<unsigned>(arrivals);
  b.bytes += bytes;
  if (b.pending == 0 && b.bytes == 0) {
    b.phase ^= 1;
    b.pending = b.arrivals & 0x7FFF;
  }
  machine().events++;
}

// Which box of rows a map stands for; the first bytes of a CUtensorMap here.
struct Box {
  const uint16_t* data;
  int64_t rows, columns, stride, box_rows;
};

}  // namespace emulation

template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T __ldg(const T* at) {
  return *at;
}
template <class T>
T __ldcg(const T* at) {
  return *at;
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(uint64_t{a} * b >> 32);
}
inline float __uint_as_float(uint32_t bits) {
  float v;
  memcpy(&v, &bits, sizeof v);
  return v;
}
inline float rsqrtf(float v) { return 1.0f / sqrtf(v); }
inline float __expf(float v) { return expf(v); }
inline float __fdividef(float a, float b) { return a / b; }
inline void __threadfence() {}
inline void __syncthreads() { emulation::give_up("__syncthreads: no kernel here comes to it"); }
inline int atomicAdd(int32_t* at, int32_t value) {
  const int32_t found = *at;
  *at += value;
  return found;
}
template <class T>
T __shfl_sync(unsigned, T value, int) {
  return value;  // of values that all lanes share: nvfp4_gemm.cu asks for no others
}

namespace hb {
namespace {

constexpr int kWarp = 32;
constexpr int kMaxShared = 160 << 10;  // little, so that rings come round

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline void launch_next() {}
inline void wait_for_previous() {}
template <int count>
void leave_registers() {}
template <int count>
void take_registers() {}

inline uint8_t* dynamic_shared() {
  emulation::Machine& m = emulation::machine();
  // Not where swizzled tiles would want it.
  return m.shared() + static_cast<uint32_t>(m.thread().rank) * emulation::kArena + 16;
}

inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(p) - emulation::machine().shared());
}

template <int id, int threads>
void sync_threads() {
  emulation::Meeting& meeting = emulation::machine().block().named[id];
  const uint64_t held = meeting.held;
  if (++meeting.here == threads) {
    meeting.here = 0;
    meeting.held++;
  }
  emulation::wait_until([&meeting, held] { return meeting.held != held; });
}

using Barrier = uint64_t;

inline void init_barrier(Barrier* barrier, int arrivals) {
  const auto count = static_cast<uint32_t>(arrivals);
  emulation::transactions(shared_address(barrier)) = {0, count, count, 0};
}
inline void publish_barriers() {}
inline void arrive_expecting(Barrier* barrier, int bytes) {
  emulation::settle(shared_address(barrier), 1, bytes);
}
inline void arrive(uint32_t barrier) { emulation::settle(barrier, 1, 0); }
inline void await_phase(uint32_t barrier, int parity) {
  emulation::wait_until([=] {
    return emulation::transactions(barrier).phase != static_cast<unsigned>(parity);
  });
}
inline void await_phase(Barrier* barrier, int parity) {
  await_phase(shared_address(barrier), parity);
}

inline uint32_t load_shared(uint32_t address) {
  uint32_t v;
  memcpy(&v, emulation::machine().shared() + address, sizeof v);
  return v;
}
inline uint4 load_shared4(uint32_t address) {
  return make_uint4(load_shared(address), load_shared(address + 4), load_shared(address + 8),
                    load_shared(address + 12));
}

inline void bulk_copy(void* to, const void* from, int bytes, Barrier* barrier) {
  const uint32_t at = shared_address(barrier);
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0 || bytes % 16 != 0 ||
      reinterpret_cast<uintptr_t>(to) % 16 != 0)
    emulation::give_up("a bulk copy that is not of 16 bytes");
  emulation::machine().copies.push_back([=] {
    memcpy(to, from, static_cast<size_t>(bytes));
    emulation::settle(at, 0, -bytes);
  });
}

// Rows of 128 bytes; the 16-byte parts of a row change places by the 128-byte swizzle.
inline void copy_box(uint32_t to, const emulation::Box& box, int column, int row,
                     uint32_t barrier) {
  if (to % 1024 != 0) emulation::give_up("a swizzled box that is not at a multiple of 1024");
  for (int64_t r = 0; r < box.box_rows; r++) {
    for (int64_t c = 0; c < 64; c++) {
      const int64_t from_row = row + r, from_column = column + c;
      const bool inside = from_row < box.rows && from_column < box.columns;
      const uint16_t v = inside ? box.data[from_row * box.stride + from_column] : uint16_t{0};
      const int64_t part = (c / 8) ^ (r % 8);
      memcpy(emulation::machine().shared() + to + r * 128 + part * 16 + c % 8 * 2, &v, sizeof v);
    }
  }
  emulation::settle(barrier, 0, -static_cast<int>(box.box_rows) * 128);
}

inline emulation::Box box_of(const CUtensorMap* map) {
  emulation::Box box;
  memcpy(&box, map, sizeof box);
  return box;
}

inline void prefetch_map(const CUtensorMap*) {}

inline void tensor_copy(void* to, const CUtensorMap* map, int column, int row, Barrier* barrier) {
  const uint32_t at = shared_address(to), on = shared_address(barrier);
  const emulation::Box box = box_of(map);
  emulation::machine().copies.push_back([=] { copy_box(at, box, column, row, on); });
}

inline uint32_t remote_address(uint32_t p, int rank) {
  return p % emulation::kArena + static_cast<uint32_t>(rank) * emulation::kArena;
}
inline uint32_t remote_address(const void* p, int rank) {
  return remote_address(shared_address(p), rank);
}

inline void tensor_multicast(void* to, const CUtensorMap* map, int column, int row,
                             Barrier* barrier, uint32_t ranks) {
  const uint32_t at = shared_address(to), on = shared_address(barrier);
  const emulation::Box box = box_of(map);
  for (int rank = 0; ranks >> rank != 0; rank++) {
    if ((ranks >> rank & 1) == 0) continue;
    emulation::machine().copies.push_back([=] {
      copy_box(remote_address(at, rank), box, column, row, remote_address(on, rank));
    });
  }
}

inline void arrive_remote(uint32_t barrier, int rank) {
  emulation::settle(remote_address(barrier, rank), 1, 0);
}

inline void send2(uint32_t address, float2 v, uint32_t barrier) {
  emulation::machine().copies.push_back([=] {
    memcpy(emulation::machine().shared() + address, &v, sizeof v);
    emulation::settle(barrier, 0, -static_cast<int>(sizeof v));
  });
}

// Of all threads of a cluster only those are waited for that have not ended.
inline void arrive_at_cluster() { emulation::machine().cluster_arrivals++; }

inline void await_cluster() {
  emulation::Machine& m = emulation::machine();
  const uint64_t mine = ++m.thread().cluster_waits;
  emulation::wait_until([&m, mine] {
    if (m.clusters_met >= mine) return true;
    const auto running = static_cast<uint64_t>(std::count_if(
        m.threads.begin(), m.threads.end(), [](const auto& t) { return !t.ended; }));
    if (m.cluster_arrivals < running) return false;
    m.cluster_arrivals = 0;
    m.clusters_met++;
    return true;
  });
}

inline float warp_sum(float v) {
  emulation::give_up("warp_sum: no kernel here comes to it");
  return v;
}

struct LaunchShape {
  dim3 grid, block;
  int shared_bytes = 0;
  int cluster = 1;
};

template <class... Params, class... Values>
int launch(void (*kernel)(Params...), const LaunchShape& shape, CUstream_st*, Values&&... values) {
  if (shape.shared_bytes > kMaxShared || shape.grid.x % static_cast<unsigned>(shape.cluster) != 0)
    return cudaErrorInvalidValue;
  gridDim = shape.grid;
  blockDim = shape.block;
  emulation::Machine& m = emulation::machine();
  m.failure = nullptr;
  m.body = [&] { kernel(values...); };
  for (unsigned block = 0; block < shape.grid.x; block += static_cast<unsigned>(shape.cluster)) {
    emulation::run_cluster(static_cast<int>(block), shape.cluster,
                           static_cast<int>(shape.block.x));
    if (m.failure != nullptr) return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

inline int encode_rows(CUtensorMap* map, const void* data, int rows, int columns, int64_t stride,
                       int box_rows) {
  const emulation::Box box = {static_cast<const uint16_t*>(data), rows, columns, stride, box_rows};
  static_assert(sizeof box <= sizeof *map);
  memcpy(map, &box, sizeof box);
  return cudaSuccess;
}

}  // namespace
}  // namespace hb
