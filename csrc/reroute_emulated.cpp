// The CUDA kernels on the CPU, for the tests alone (see reroute_emulation.h).
#include "reroute.cu"
#include "reroute_fused.cu"
