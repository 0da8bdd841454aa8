// CuTe's own answers, for tests/test_sm120.py: where CUTLASS looks for a block scale, and which
// elements of a block-scaled mma each lane holds. Writes int32 to stdout.
//   cute_layouts scales ROWS K    offset of (row, 16-group), [SFA | SFB][ROWS][K / 16]
//   cute_layouts mma              m + 16 k, n + 8 k, m + 16 n, m + 16 k, n + 8 k of each lane and value of
//                                 A, B, C, scales of A, scales of B
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <cute/tensor.hpp>
#include <cute/atom/mma_traits_sm120.hpp>
#include <cutlass/detail/sm100_blockscaled_layout.hpp>

using namespace cute;

static void put(int32_t value) { fwrite(&value, sizeof value, 1, stdout); }

template <class Layout>
static void put_scales(const Layout& layout, int rows, int k) {
  for (int row = 0; row < rows; row++)
    for (int at = 0; at < k; at += 16) put(static_cast<int32_t>(layout(row, at, 0)));
}

template <class Layout>
static void put_fragments(const Layout& layout) {
  for (int lane = 0; lane < 32; lane++)
    for (int value = 0; value < size<1>(layout); value++)
      put(static_cast<int32_t>(layout(lane, value)));
}

int main(int count, char** words) {
  if (count == 4 && !strcmp(words[1], "scales")) {
    using Config = cutlass::detail::Sm1xxBlockScaledConfig<16>;
    const int rows = atoi(words[2]), k = atoi(words[3]), other = 1;
    put_scales(Config::tile_atom_to_shape_SFA(make_shape(rows, other, k, 1)), rows, k);
    put_scales(Config::tile_atom_to_shape_SFB(make_shape(other, rows, k, 1)), rows, k);
    return 0;
  }
  using Atom = SM120::BLOCKSCALED::SM120_16x8x64_TN_VS<cutlass::float_e2m1_t, cutlass::float_e2m1_t,
                                                       float, cutlass::float_ue4m3_t, 16>;
  using Traits = MMA_Traits<Atom>;
  put_fragments(Traits::ALayout{});
  put_fragments(Traits::BLayout{});
  put_fragments(Traits::CLayout{});
  put_fragments(Traits::SFALayout{});
  put_fragments(Traits::SFBLayout{});
}
