#include "selective_scan_backward.cuh"

SSM_BACKWARD(float16, __half)
