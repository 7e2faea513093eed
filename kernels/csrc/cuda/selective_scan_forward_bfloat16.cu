#include "selective_scan.cuh"

SSM_FORWARD(bfloat16, __nv_bfloat16)
