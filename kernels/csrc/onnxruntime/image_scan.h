// SS2DScan and BidirectionalScan: all routes over an image, or both ways through a sequence, by ss2d_scan_forward.
//
// A task is a part of the channels of one sample. A part that is not all of them, or does not fill blocks of channels, is
// copied out and back; that is little beside the scan.
//
// Shapes: batch B, pixels L = H * W, channels D, routes K, state N, rank R.
#pragma once

#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "runtime.h"

namespace ssm {

struct ImageScan {
    int64_t batch, length, dim, routes;
    const float* maps[MAX_MAPS];  // (B, L, D), which each route reads
    Tensor proj;                  // (B, ..., K * (R + 2 N))
    Tensor dt_weight, A, D, bias; // (K, D, R), (K * D, N), (K * D), (K * D)
    std::vector<int32_t> order;   // (K, L): the pixel at every place of a route
    float* y;                     // (B, L, D)

    int64_t rank() const { return dt_weight.shape[2]; }
    int64_t state() const { return A.shape[1]; }

    void check() const {
        const int64_t channels = routes * dim, fields = routes * (rank() + 2 * state());
        expect(dt_weight.shape[0] == routes && dt_weight.shape[1] == dim, "dt_weight does not fit the channels of x");
        expect(A.shape[0] == channels && D.shape[0] == channels && bias.shape[0] == channels,
               "A, D and dt_bias do not fit the channels of x");
        expect(proj.shape.back() == fields && proj.count() == batch * length * fields, "proj does not fit x");
    }

    void run(const Call& call) const {
        check();
        if (batch * length == 0) return;
        const int64_t blocks = (dim + BLOCK - 1) / BLOCK, parts = parts_of_sample(batch, blocks);
        call.parallel(batch * parts, [&](int64_t task) {
            const int64_t part = task % parts, first = part * blocks / parts * BLOCK;
            return scan(task / parts, first, std::min((part + 1) * blocks / parts * BLOCK, dim));
        });
    }

  private:
    // Channels first..last of sample b
    const char* scan(int64_t b, int64_t first, int64_t last) const {
        const int64_t own = last - first, filled = (own + BLOCK - 1) / BLOCK * BLOCK, sample = b * length * dim;
        const bool whole = own == dim && filled == dim;
        const int64_t fields = routes * (rank() + 2 * state());
        Ss2dArguments a{};
        a.batch = 1, a.dim = filled, a.length = length, a.state = state(), a.rank = rank(), a.routes = routes;
        a.parts = a.threads = 1;
        a.proj = any(reading(proj.data + b * length * fields, length * fields));
        a.order = {order.data(), routes * length, INT32};
        if (whole) {
            for (int64_t k = 0; k < routes; k++) a.x[k] = any(reading(maps[k] + sample, length * dim));
            a.dt_weight = reading(dt_weight.data, dt_weight.count()), a.A = reading(A.data, A.count());
            a.D = reading(D.data, D.count()), a.bias = reading(bias.data, bias.count());
            a.y = any(writing(y + sample, length * dim));
            return ss2d_scan_forward(&a);
        }
        const int64_t numbers = length * filled;
        const Scratch memory((routes + 1) * numbers + routes * filled * (rank() + state() + 2));
        float* next = memory;
        for (int64_t k = 0; k < routes; k++) {
            const bool again = k > 0 && maps[k] == maps[k - 1];
            if (!again) {
                copy_rows(maps[k] + sample + first, dim, length, own, next, filled);
                next += numbers;
            }
            a.x[k] = again ? a.x[k - 1] : any(reading(next - numbers, numbers));
        }
        a.dt_weight = part_of(dt_weight.data, rank(), first, own, filled, next);
        a.A = part_of(A.data, state(), first, own, filled, next);
        a.D = part_of(D.data, 1, first, own, filled, next);
        a.bias = part_of(bias.data, 1, first, own, filled, next);
        a.y = any(writing(next, numbers));
        const char* problem = ss2d_scan_forward(&a);
        for (int64_t t = 0; t < length && problem == nullptr; t++)
            std::memcpy(y + sample + t * dim + first, next + t * filled, sizeof(float) * own);
        return problem;
    }

    // `own` numbers of every row, filled up with zeros
    static void copy_rows(const float* from, int64_t stride, int64_t rows, int64_t own, float* to, int64_t filled) {
        for (int64_t i = 0; i < rows; i++, from += stride, to += filled) {
            std::memcpy(to, from, sizeof(float) * own);
            std::memset(to + own, 0, sizeof(float) * (filled - own));
        }
    }

    // (K, D, numbers) -> (K, filled, numbers), at `next`, which moves on
    Buffer<const float> part_of(const float* all, int64_t numbers, int64_t first, int64_t own, int64_t filled,
                                float*& next) const {
        copy_rows(all + first * numbers, dim * numbers, routes, own * numbers, next, filled * numbers);
        const Buffer<const float> part = reading(next, routes * filled * numbers);
        next += routes * filled * numbers;
        return part;
    }
};

// x (B, H, W, D), proj (B, H, W, 4 * (R + 2 N)), dt_weight, A, D, dt_bias -> y (B, H, W, D)
struct SS2DScan {
    static constexpr const char* name = "SS2DScan";
    static constexpr size_t inputs = 6;
    int64_t columns, backwards;  // bit k: does route k walk the columns? backwards?

    template <typename Attributes>
    explicit SS2DScan(const Attributes& of) : columns(of.integer("columns")), backwards(of.integer("backwards")) {}

    void run(const Call& call) const {
        const Tensor x = call.input(0, "x", 4);
        ImageScan scan{x.shape[0], x.shape[1] * x.shape[2], x.shape[3], 4, {x.data, x.data, x.data, x.data}};
        scan.proj = call.input(1, "proj", 4), scan.dt_weight = call.input(2, "dt_weight", 3);
        scan.A = call.input(3, "A", 2), scan.D = call.input(4, "D", 1), scan.bias = call.input(5, "dt_bias", 1);
        scan.order.resize(4 * scan.length);
        for (int64_t k = 0; k < 4; k++) walk(scan.order.data() + k * scan.length, x.shape[1], x.shape[2], k);
        scan.y = call.output(x.shape);
        scan.run(call);
    }

    void walk(int32_t* order, int64_t height, int64_t width, int64_t k) const {
        const bool by_column = columns >> k & 1, from_end = backwards >> k & 1;
        const int64_t length = height * width;
        for (int64_t t = 0; t < length; t++) {
            const int64_t place = from_end ? length - 1 - t : t;
            order[t] = static_cast<int32_t>(by_column ? place % height * width + place / height : place);
        }
    }
};

// x_forward, x_backward (B, L, D), proj (B, L, 2 * (R + 2 N)), dt_weight, A, D, dt_bias -> y (B, L, D)
struct BidirectionalScan {
    static constexpr const char* name = "BidirectionalScan";
    static constexpr size_t inputs = 7;

    template <typename Attributes>
    explicit BidirectionalScan(const Attributes&) {}

    void run(const Call& call) const {
        const Tensor there = call.input(0, "x_forward", 3), back = call.input(1, "x_backward", 3);
        expect(there.shape == back.shape, "x_backward has not the shape of x_forward");
        ImageScan scan{there.shape[0], there.shape[1], there.shape[2], 2, {there.data, back.data}};
        scan.proj = call.input(2, "proj", 3), scan.dt_weight = call.input(3, "dt_weight", 3);
        scan.A = call.input(4, "A", 2), scan.D = call.input(5, "D", 1), scan.bias = call.input(6, "dt_bias", 1);
        for (int64_t t = 0; t < scan.length; t++) scan.order.push_back(static_cast<int32_t>(t));
        for (int64_t t = scan.length; t-- > 0;) scan.order.push_back(static_cast<int32_t>(t));
        scan.y = call.output(there.shape);
        scan.run(call);
    }
};

}  // namespace ssm
