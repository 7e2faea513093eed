#include "selective_scan.cuh"

SSM_BACKWARD(float16, __half)
