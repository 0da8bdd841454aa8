// Stands in for the templates' conversions.cuh on the host.
#pragma once
#include "cuda_common.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace hb {
namespace {

inline float e4m3(uint32_t byte) {
  const int exponent = static_cast<int>(byte >> 3 & 15), mantissa = static_cast<int>(byte & 7);
  return exponent == 0 ? ldexpf(static_cast<float>(mantissa), -9)
                       : ldexpf(static_cast<float>(8 + mantissa), exponent - 10);
}

template <class T>
uint16_t bits(T v) {
  uint16_t found;
  memcpy(&found, &v, sizeof found);
  return found;
}

inline uint32_t widen_e4m3(uint32_t bytes) {
  return bits(__float2half(e4m3(bytes & 0xFF))) |
         static_cast<uint32_t>(bits(__float2half(e4m3(bytes >> 8 & 0xFF)))) << 16;
}

inline uint32_t pack_bf16(float low, float high) {
  return bits(__float2bfloat16(low)) | static_cast<uint32_t>(bits(__float2bfloat16(high))) << 16;
}

inline float low_of(uint32_t pair) { return __uint_as_float(pair << 16); }
inline float high_of(uint32_t pair) { return __uint_as_float(pair & 0xFFFF0000u); }

inline uint32_t multiply_bf16x2(uint32_t a, uint32_t b) {
  return pack_bf16(low_of(a) * low_of(b), high_of(a) * high_of(b));
}

}  // namespace
}  // namespace hb
