#include "selective_scan_forward.cuh"

SSM_FORWARD(float32, float)
