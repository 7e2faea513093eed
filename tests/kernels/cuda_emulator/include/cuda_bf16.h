// bfloat16 as a type to store: conversions, rounded to nearest even.
#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat16 {
    uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) { return emulator_bits<float>(uint32_t(x.bits) << 16); }

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    const uint32_t bits = emulator_bits<uint32_t>(x);
    if (std::isnan(x)) return {0x7fff};  // CUDA's NaN
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
