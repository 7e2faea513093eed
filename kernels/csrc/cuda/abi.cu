// Tells what this library was compiled from.

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
