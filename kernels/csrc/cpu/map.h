#pragma once
#include <cstdint>

// A tensor (batch, channel, time) of any strides; of `repeat` channels of a scan each reads the same one.
struct Map {
    const float* data;
    int64_t batch, channel, time;
    int64_t repeat;
};
