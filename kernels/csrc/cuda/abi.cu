// Tells what this library was compiled from, and whether it has code for a device.

#include "interface.cuh"

SSM_EXPORT const Agreement* ssm_ops_abi() {
    static const Agreement all[] = {
        {"VERSION", VERSION},
        {"MAX_STATE", MAX_STATE},
        {"RUN", K},
        {"CHUNK", CHUNK},
        {"FORWARD_THREADS", FORWARD_THREADS},
        {"BACKWARD_THREADS", BACKWARD_THREADS},
        {"GATED_THREADS", GATED_THREADS},
        {"FORWARD_ROWS", FORWARD_ROWS},
        {"BACKWARD_ROWS", BACKWARD_ROWS},
        {"SUMS", SUMS},
        {"SHARED_BYTES", SHARED_BYTES},
        {"FLOAT32", FLOAT32},
        {"FLOAT16", FLOAT16},
        {"BFLOAT16", BFLOAT16},
        {"FLOAT64", FLOAT64},
        {"INT32", INT32},
        {"Buffer", sizeof(Buffer<float>)},
        {"Map", sizeof(Map)},
        {"StateMap", sizeof(StateMap)},
        {"ScanArguments", sizeof(ScanArguments)},
        {nullptr, 0},
    };
    return all;
}

namespace {

__global__ void nothing() {}

}  // namespace

// Null, or why the kernels of this library, which are compiled for the same devices as this one, cannot run there: no
// such device, a driver that is too old, no code for its architecture. Launches nothing, so that it may be asked while a
// graph is captured.
SSM_EXPORT const char* ssm_ops_probe(const int64_t* device) {
    cudaError_t status = cudaSetDevice(int(*device));
    // sets it to what it is; on the way the runtime looks for the code
    if (status == cudaSuccess) status = cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, 0);
    return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}
