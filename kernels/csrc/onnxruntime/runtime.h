// ONNX Runtime's C API as the operators of this folder use it: tensors of float32, attributes, parallel loops, errors.
//
// Everything throws `Failure`, which the registration (register.cpp) turns into a status. Work is shared out among the
// threads of the session, so that its settings hold: the kernels of csrc/cpu are compiled here without OpenMP, and each
// call of them is one task.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../cpu/interface.h"
#include "../third_party/onnxruntime_c_api.h"

namespace ssm {

constexpr int64_t OPS_VERSION = 1;  // of the operators, as ssm_ops/onnxruntime.py says; raised when their meaning changes
constexpr uint32_t API_VERSION = 17;  // the oldest onnxruntime (1.17) that has all that is called here
constexpr const char* DOMAIN_NAME = "ssm_ops";

using Failure = std::runtime_error;

extern const OrtApi* api;  // set when the library is registered

inline void require(OrtStatus* status) {
    if (status == nullptr) return;
    const std::string text = api->GetErrorMessage(status);
    api->ReleaseStatus(status);
    throw Failure(text);
}

inline void expect(bool holds, const std::string& text) {
    if (!holds) throw Failure(text);
}

using Shape = std::vector<int64_t>;

struct Tensor {
    const float* data;
    Shape shape;
    int64_t count() const {
        int64_t numbers = 1;
        for (int64_t size : shape) numbers *= size;
        return numbers;
    }
};

// What one run of a node reads and writes.
class Call {
  public:
    explicit Call(OrtKernelContext* context) : context(context) {}

    Tensor input(size_t index, const char* name, size_t dimensions) const {
        const OrtValue* value = nullptr;
        require(api->KernelContext_GetInput(context, index, &value));
        expect(value != nullptr, std::string(name) + " is missing");
        OrtTensorTypeAndShapeInfo* info = nullptr;
        require(api->GetTensorTypeAndShape(value, &info));
        const std::unique_ptr<OrtTensorTypeAndShapeInfo, void (*)(OrtTensorTypeAndShapeInfo*)> owner(
            info, [](OrtTensorTypeAndShapeInfo* x) { api->ReleaseTensorTypeAndShapeInfo(x); });
        size_t count = 0;
        require(api->GetDimensionsCount(info, &count));
        expect(count == dimensions, std::string(name) + " has " + std::to_string(count) + " dimensions, not " +
                                        std::to_string(dimensions));
        Tensor tensor{nullptr, Shape(count)};
        require(api->GetDimensions(info, tensor.shape.data(), count));
        void* data = nullptr;
        require(api->GetTensorMutableData(const_cast<OrtValue*>(value), &data));
        tensor.data = static_cast<const float*>(data);
        return tensor;
    }

    float* output(const Shape& shape) const {
        OrtValue* value = nullptr;
        require(api->KernelContext_GetOutput(context, 0, shape.data(), shape.size(), &value));
        void* data = nullptr;
        require(api->GetTensorMutableData(value, &data));
        return static_cast<float*>(data);
    }

    // task(i) for i = 0..count-1, on the threads of the session. A task returns null, or what went wrong.
    template <typename Task>
    void parallel(int64_t count, const Task& task) const {
        struct Work {
            const Task& task;
            std::vector<std::string> problems;
        } work{task, std::vector<std::string>(count)};
        const auto run = [](void* data, size_t i) {
            Work& work = *static_cast<Work*>(data);
            try {
                const char* problem = work.task(static_cast<int64_t>(i));
                if (problem != nullptr) work.problems[i] = problem;
            } catch (const std::exception& error) {
                work.problems[i] = error.what();
            }
        };
        if (count == 1)
            run(&work, 0);
        else
            require(api->KernelContext_ParallelFor(context, run, count, 0, &work));
        for (const std::string& problem : work.problems) expect(problem.empty(), problem);
    }

  private:
    OrtKernelContext* context;
};

// How many parts a sample is cut into. More threads than the machine has processors would not help a session, and what a
// part costs extra is small: nothing here depends on the number of threads, nor do the results.
inline int64_t parts_of_sample(int64_t batch, int64_t most) {
    const int64_t processors = std::thread::hardware_concurrency();
    const int64_t wanted = (processors + batch - 1) / (batch > 0 ? batch : 1);
    return wanted < 1 ? 1 : wanted > most ? most : wanted;
}

inline Buffer<const float> reading(const float* data, int64_t count) { return {data, count, FLOAT32}; }
inline Buffer<float> writing(float* data, int64_t count) { return {data, count, FLOAT32}; }

// For arguments that may be of any type
inline Buffer<const void> any(Buffer<const float> b) { return {b.data, b.count, b.dtype}; }
inline Buffer<void> any(Buffer<float> b) { return {b.data, b.count, b.dtype}; }

// Memory that nobody has written to: a vector would fill it.
class Scratch {
  public:
    explicit Scratch(int64_t floats) : memory(static_cast<float*>(std::malloc(sizeof(float) * (floats > 0 ? floats : 1)))) {
        expect(memory != nullptr, "no memory for " + std::to_string(floats) + " numbers");
    }
    Scratch(const Scratch&) = delete;
    ~Scratch() { std::free(memory); }
    operator float*() const { return memory; }

  private:
    float* memory;
};

}  // namespace ssm
