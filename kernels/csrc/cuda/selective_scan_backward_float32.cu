#include "selective_scan.cuh"

SSM_BACKWARD(float32, float)
