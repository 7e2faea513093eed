// The runtime as one unit: it is built once, and linked to every library of kernels.
#include "memory.h"
#include "scheduler.h"
