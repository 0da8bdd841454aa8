// Stands in for the templates' wgmma.cuh on the host: a multiply is done when it is asked for.
#pragma once
#include "conversions.cuh"

namespace hb {
namespace {

inline void fence_multiplies() {}
inline void commit_multiplies() {}
template <int pending>
void await_multiplies() {}

inline uint64_t describe_tile(uint32_t tile) { return tile >> 4; }

// A: registers of the four lanes of a quad, rows g and g + 8 (PTX ISA, wgmma with A in registers).
// B: 16 columns of rows of 128 swizzled bytes.
template <int N>
void multiply_tile(float (&sums)[N / 2], const uint32_t* a, uint64_t b) {
  emulation::Machine& m = emulation::machine();
  emulation::Thread* warp = m.threads.data() + m.current / kWarp * kWarp;
  emulation::Thread& own = m.thread();
  const uint64_t turn = ++own.multiplies;
  memcpy(own.fragment[turn % 2], a, sizeof own.fragment[0]);
  emulation::wait_until([=] {
    return std::all_of(warp, warp + kWarp, [=](const auto& t) { return t.multiplies >= turn; });
  });
  const int lane = m.current % kWarp, g = lane / 4;
  float rows[2][16];
  for (int t = 0; t < 4; t++) {
    const uint32_t* fragment = warp[g * 4 + t].fragment[turn % 2];
    for (int register_ = 0; register_ < 4; register_++) {
      const int row = register_ % 2, k = register_ / 2 * 8 + 2 * t;
      rows[row][k] = low_of(fragment[register_]);
      rows[row][k + 1] = high_of(fragment[register_]);
    }
  }
  const uint32_t tile = static_cast<uint32_t>(b << 4) / 1024 * 1024;
  const int first = static_cast<int>((b << 4) % 1024) / 2;  // column
  for (int j = 0; j < N / 8; j++) {
    for (int e = 0; e < 2; e++) {
      const int token = 8 * j + lane % 4 * 2 + e;
      for (int k = 0; k < 16; k++) {
        const int column = first + k, part = (column / 8) ^ (token % 8);
        uint16_t x;
        memcpy(&x, m.shared() + tile + token * 128 + part * 16 + column % 8 * 2, sizeof x);
        const float v = __uint_as_float(static_cast<uint32_t>(x) << 16);
        sums[4 * j + e] = fmaf(rows[0][k], v, sums[4 * j + e]);
        sums[4 * j + 2 + e] = fmaf(rows[1][k], v, sums[4 * j + 2 + e]);
      }
    }
  }
}

}  // namespace
}  // namespace hb
