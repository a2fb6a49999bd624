// What the kernels ask of the machine. nvcc compiles these to single instructions; every other
// compiler gets the emulator (tests/ops/native), which runs the same kernel source on the CPU,
// so that the tests exercise it without a GPU. Warp operations need all 32 lanes.
#pragma once

#include <cstdint>

#ifndef __CUDACC__
#include "reroute_emulation.h"
#else

#include <cooperative_groups.h>
#include <cuda_fp16.h>

#define SERE_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define SERE_PARAMS const __grid_constant__
#define SERE_SHARED(type, name) __shared__ type name
#define SERE_DEVICE __device__ __forceinline__

namespace sere {

SERE_DEVICE int thread_index() { return threadIdx.x; }
SERE_DEVICE int num_threads() { return blockDim.x; }
SERE_DEVICE int block_index() { return blockIdx.x; }
SERE_DEVICE int num_blocks() { return gridDim.x; }

SERE_DEVICE void sync_block() { __syncthreads(); }
SERE_DEVICE bool elect_any_block(bool value) { return __syncthreads_or(value); }

SERE_DEVICE void sync_warp() { __syncwarp(); }
SERE_DEVICE uint32_t ballot(bool value) { return __ballot_sync(0xffffffffu, value); }
template <typename T>
SERE_DEVICE T shuffle(T value, int lane, int width = 32) {
  return __shfl_sync(0xffffffffu, value, lane, width);
}
template <typename T>
SERE_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
SERE_DEVICE uint32_t warp_max(uint32_t value) { return __reduce_max_sync(0xffffffffu, value); }
SERE_DEVICE uint32_t warp_min(uint32_t value) { return __reduce_min_sync(0xffffffffu, value); }
SERE_DEVICE uint32_t warp_or(uint32_t value) { return __reduce_or_sync(0xffffffffu, value); }
SERE_DEVICE int count_bits(uint32_t bits) { return __popc(bits); }
SERE_DEVICE int lowest_bit(uint32_t bits) { return __ffs(bits) - 1; }  // -1: none

// Clusters: thread blocks that read each other's shared memory, from sm_90.
#if __CUDA_ARCH__ >= 900
SERE_DEVICE void sync_cluster() { cooperative_groups::this_cluster().sync(); }
template <typename T>
SERE_DEVICE T* peer(T* shared, int rank) {
  return cooperative_groups::this_cluster().map_shared_rank(shared, rank);
}
#else
SERE_DEVICE void sync_cluster() { __trap(); }
template <typename T>
SERE_DEVICE T* peer(T* shared, int) {
  __trap();
  return shared;
}
#endif

// Work on shared, a peer's shared and device memory.
SERE_DEVICE uint32_t atomic_or(uint32_t* at, uint32_t bits) { return atomicOr(at, bits); }
SERE_DEVICE int atomic_add(int* at, int value) { return atomicAdd(at, value); }
SERE_DEVICE int atomic_min(int* at, int value) { return atomicMin(at, value); }
SERE_DEVICE int atomic_max(int* at, int value) { return atomicMax(at, value); }
SERE_DEVICE void atomic_add(int64_t* at, int64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(at), static_cast<unsigned long long>(value));
}
SERE_DEVICE void fence_device() { __threadfence(); }

// Past the first-level cache: another block may have written it while this one ran, or be writing
// it now, where old or new are both fine for the caller.
template <typename T>
SERE_DEVICE T load_racing(const T* at) {
  return *reinterpret_cast<const volatile T*>(at);
}

SERE_DEVICE void prefetch(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

// Programmatic dependent launch: what the kernels before this one wrote is visible only after the
// wait. Both are no-ops in a launch without the attribute.
SERE_DEVICE void wait_for_prior_kernels() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
SERE_DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

SERE_DEVICE float exponential(float x) { return expf(x); }
SERE_DEVICE float from_half(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
SERE_DEVICE float from_bfloat16(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }

template <typename T>
struct alignas(4 * sizeof(T)) Quad {
  T at[4];
};
// Four neighbours in one load; `from` is aligned to all four.
template <typename T>
SERE_DEVICE Quad<T> load_quad(const T* from) {
  return *reinterpret_cast<const Quad<T>*>(from);
}

}  // namespace sere
#endif  // __CUDACC__
