// The functions of csrc/cpu that the operators call; interface.h says with what.
#pragma once

#include "../cpu/interface.h"

extern "C" {
const char* ss2d_scan_forward(const Ss2dArguments* arguments);
const char* selective_scan_forward(const ScanArguments* arguments);
const char* causal_conv1d_forward(const ConvArguments* arguments);
}
