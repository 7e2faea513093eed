#include "selective_scan.cuh"

SSM_FORWARD(float32, float)
