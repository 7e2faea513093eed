// Tells what this library was compiled from.

#include "interface.h"
#include "platform.h"

extern "C" SSM_EXPORT const Agreement* ssm_ops_abi() {
    static const Agreement all[] = {
        {"VERSION", VERSION},
        {"BLOCK", BLOCK},
        {"CHUNK", CHUNK},
        {"TILE_TOKENS", TILE_TOKENS},
        {"MAX_STATE", MAX_STATE},
        {"MAX_MAPS", MAX_MAPS},
        {"FLOAT32", FLOAT32},
        {"FLOAT16", FLOAT16},
        {"BFLOAT16", BFLOAT16},
        {"FLOAT64", FLOAT64},
        {"INT32", INT32},
        {"Buffer", sizeof(Buffer<float>)},
        {"Map", sizeof(Map)},
        {"StateMap", sizeof(StateMap)},
        {"Rows", sizeof(Rows)},
        {"ScanArguments", sizeof(ScanArguments)},
        {"ConvArguments", sizeof(ConvArguments)},
        {"DepthwiseArguments", sizeof(DepthwiseArguments)},
        {"GateArguments", sizeof(GateArguments)},
        {"NormArguments", sizeof(NormArguments)},
        {"CrossArguments", sizeof(CrossArguments)},
        {"Ss2dArguments", sizeof(Ss2dArguments)},
        {"NcSsdArguments", sizeof(NcSsdArguments)},
        {nullptr, 0},
    };
    return all;
}
