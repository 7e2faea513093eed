#include "selective_scan_backward.cuh"

SSM_BACKWARD(float32, float)
