#include "selective_scan_backward.cuh"

SSM_BACKWARD(bfloat16, __nv_bfloat16)
