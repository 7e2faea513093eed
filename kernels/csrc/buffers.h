// Tensors as the libraries get them from Python: with the type and the number of what lies there, so that a call can refuse
// what it did not expect before it reads anything. ssm_ops/_interface.py says the same in Python.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>

#ifdef __CUDACC__
#define SSM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SSM_HOST_DEVICE inline
#endif

enum DType : int64_t { ABSENT, FLOAT32, FLOAT16, BFLOAT16, FLOAT64, INT32 };

inline const char* name_of(int64_t dtype) {
    static const char* const names[] = {"nothing", "float32", "float16", "bfloat16", "float64", "int32"};
    return dtype >= ABSENT && dtype <= INT32 ? names[dtype] : "an unknown dtype";
}

inline int64_t bytes_of(int64_t dtype) {
    static const int64_t bytes[] = {0, 4, 2, 2, 8, 4};
    return dtype >= ABSENT && dtype <= INT32 ? bytes[dtype] : 0;
}

// A contiguous tensor of `count` numbers, or nothing. Used as a pointer to the first.
template <typename T>
struct Buffer {
    T* data;
    int64_t count, dtype;

    SSM_HOST_DEVICE operator T*() const { return data; }
};

// What is the first thing wrong with a call. The text lives until the next call of the same thread.
class Check {
  public:
    // null if nothing is wrong
    const char* problem() const { return text; }

    void that(bool holds, const char* format, ...) {
        if (holds || text) return;
        static thread_local char message[200];
        va_list arguments;
        va_start(arguments, format);
        std::vsnprintf(message, sizeof(message), format, arguments);
        va_end(arguments);
        text = message;
    }

    void dtype(const char* name, int64_t given, int64_t wanted) {
        that(given == wanted, "%s holds %s, not %s", name, name_of(given), name_of(wanted));
    }

    template <typename T>
    void buffer(const char* name, const Buffer<T>& b, int64_t wanted, int64_t count) {
        dtype(name, b.dtype, wanted);
        that(b.count == count, "%s holds %lld numbers, not %lld", name, (long long)b.count, (long long)count);
    }

    // The buffer may be absent.
    template <typename T>
    void optional(const char* name, const Buffer<T>& b, int64_t wanted, int64_t count) {
        if (b.dtype != ABSENT || b.data) buffer(name, b, wanted, count);
    }

    // A tensor of any strides
    template <int N>
    void shape(const char* name, const int64_t (&given)[N], const int64_t (&wanted)[N]) {
        for (int i = 0; i < N; i++)
            that(given[i] == wanted[i], "dimension %d of %s is %lld, not %lld", i, name, (long long)given[i],
                 (long long)wanted[i]);
    }

  private:
    const char* text = nullptr;
};

// What the two sides must agree on, by name; the last name is null.
struct Agreement {
    const char* name;
    int64_t value;
};
