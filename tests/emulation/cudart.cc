// Stands in for the CUDA runtime where kernels are emulated.
#define HOST_MULTIPROCESSORS 1
#include "../host_cudart.h"
