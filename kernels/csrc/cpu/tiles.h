// Tiles (token, channel) of tensors, W channels wide: reading them from any layout, writing them. Included by the kernels
// for every instruction set, after lanes.h; `Map` is in map.h.

// Asks for tokens start .. start + count of `lanes` channels ahead of their use: each channel is a stream of its own, more
// than the hardware follows. Beyond the tensor it does nothing.
SSM_INLINE void prefetch(const Map& map, int64_t b, int64_t first, int lanes, int64_t start, int count) {
    if (map.time != 1) return;
    for (int c = 0; c < lanes; c++) {
        const float* source = map.data + b * map.batch + (first + c) / map.repeat * map.channel + start;
        for (int t = 0; t < count; t += W) __builtin_prefetch(source + t);
    }
}

// tile[t][c] = map[b, first + c, start + t] for t < tokens, c < lanes; the other lanes become 0.
SSM_INLINE void load_tile(float* tile, const Map& map, int64_t b, int64_t first, int lanes, int64_t start, int tokens) {
    if (lanes < W) std::memset(tile, 0, sizeof(float) * W * tokens);
    const float* source = map.data + b * map.batch + start * map.time;
    if (lanes == W && map.repeat == 1 && map.channel == 1) {
        for (int t = 0; t < tokens; t++) {
            store(tile + t * W, load(source + first + t * map.time));
            __builtin_prefetch(source + first + W + t * map.time);  // the next block: rows are too far apart to be foreseen
        }
    } else if (lanes == W && map.repeat == 1 && map.time == 1 && tokens >= W) {
        source += first * map.channel;
        for (int t = 0; t < tokens; t += W) {
            const int at = t + W <= tokens ? t : tokens - W;  // the last block may overlap the one before
            transpose(source + at, map.channel, tile + at * W, W);
        }
    } else {
        for (int c = 0; c < lanes; c++)
            for (int t = 0; t < tokens; t++)
                tile[t * W + c] = source[(first + c) / map.repeat * map.channel + t * map.time];
    }
}

// rows[c][t] = tile[t][c]: into a contiguous (channel, time) tensor of `length` tokens.
SSM_INLINE void store_tile(float* rows, int64_t length, const float* tile, int lanes, int tokens) {
    if (lanes == W && tokens >= W) {
        for (int t = 0; t < tokens; t += W) {
            const int at = t + W <= tokens ? t : tokens - W;
            transpose(tile + at * W, W, rows + at, length);
        }
    } else {
        for (int c = 0; c < lanes; c++)
            for (int t = 0; t < tokens; t++) rows[c * length + t] = tile[t * W + c];
    }
}
