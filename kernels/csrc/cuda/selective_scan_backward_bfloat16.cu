#include "selective_scan.cuh"

SSM_BACKWARD(bfloat16, __nv_bfloat16)
