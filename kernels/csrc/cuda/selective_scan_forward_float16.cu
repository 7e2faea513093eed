#include "selective_scan.cuh"

SSM_FORWARD(float16, __half)
