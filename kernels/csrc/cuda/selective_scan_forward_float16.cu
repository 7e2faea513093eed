#include "selective_scan_forward.cuh"

SSM_FORWARD(float16, __half)
