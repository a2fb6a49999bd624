// The CUDA kernels on the CPU, for the tests alone (see reroute_emulation.h); csrc/ is on the path.
#include "reroute.cu"
#include "reroute_fused.cu"
#include "rules.cu"
#include "rules_fused.cu"
