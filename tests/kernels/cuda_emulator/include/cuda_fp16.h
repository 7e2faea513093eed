// Half precision as a type to store: conversions, rounded to nearest even.
#pragma once

#include "cuda_runtime.h"

struct __half {
    uint16_t bits;
};

inline float __half2float(__half x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
    if (exponent == 0) return emulator_bits<float>(sign | emulator_bits<uint32_t>(float(mantissa) * 0x1p-24f));
    return emulator_bits<float>(sign | (exponent == 31 ? 255 : exponent + 112) << 23 | mantissa << 13);
}

inline __half __float2half_rn(float x) {
    const uint32_t all = emulator_bits<uint32_t>(x), sign = all >> 16 & 0x8000;
    uint32_t bits = all & 0x7fffffff;
    if (bits > 0x7f800000) return {0x7fff};                    // CUDA's NaN
    if (bits >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // from 65520 on
    if (bits < 0x38800000) return {uint16_t(sign | uint32_t(nearbyintf(fabsf(x) * 0x1p24f)))};  // subnormal
    bits += 0xfff + (bits >> 13 & 1);
    return {uint16_t(sign | (bits - 0x38000000) >> 13)};
}
