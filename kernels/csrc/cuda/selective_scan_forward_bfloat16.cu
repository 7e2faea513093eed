#include "selective_scan_forward.cuh"

SSM_FORWARD(bfloat16, __nv_bfloat16)
