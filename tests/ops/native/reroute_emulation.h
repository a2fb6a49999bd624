// A CUDA thread block on the CPU: every thread is a fiber, every barrier and warp operation a
// rendezvous of fibers, so that tests run the kernels' own source without a GPU. Fibers are resumed
// in random order, shared memory starts (and ends) as garbage, and a barrier that not all threads
// reach is an error: a missing barrier or a divergent warp operation shows as a wrong result or a
// deadlock. It says nothing about speed or about the memory model.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define SERE_KERNEL(threads) inline void
#define SERE_PARAMS const
#define SERE_SHARED(type, name) type& name = ::sere::emulation::shared<type>()
#define SERE_DEVICE inline

namespace sere::emulation {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kSharedBytes = 48 << 10;  // what a kernel gets without asking for more

struct Barrier {
  int expected = 0, arrived = 0, generation = 0;
};

struct Warp {
  Barrier barrier;
  uint64_t values[2][kWarp];  // two, so that a lane may start the next operation early
  int operation[2][kWarp];
};

struct Block {
  int index = 0, running = 0;
  Barrier barrier;
  bool voted[2];
  std::vector<Warp> warps;
  alignas(64) unsigned char memory[kSharedBytes];
};

struct Fiber {
  ucontext_t context;
  Block* block = nullptr;
  int thread = 0, warp_operations = 0, block_votes = 0;
  bool finished = false;
};

// One cluster of blocks at a time; the clusters of a grid run one after the other, in any order.
struct Machine {
  int threads = 0, blocks = 0, cluster = 1;
  Barrier cluster_barrier;
  std::vector<std::unique_ptr<Block>> resident;
  std::vector<Fiber> fibers;
  Fiber* current = nullptr;
  ucontext_t scheduler;
  int64_t progress = 0;
  std::string error;
  std::function<void()> body;
  char* stacks = nullptr;
  size_t stack_bytes = 0;
};

inline Machine machine;

inline void yield() {
  Fiber* me = machine.current;
  swapcontext(&me->context, &machine.scheduler);
}

inline void fail(const std::string& what) {
  if (machine.error.empty()) machine.error = what;
  while (true) yield();  // the scheduler sees the error and gives up
}

inline void wait(Barrier& barrier) {
  const int generation = barrier.generation;
  ++machine.progress;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
  } else {
    while (barrier.generation == generation) yield();
  }
}

template <typename T>
T& shared() {
  static_assert(sizeof(T) <= kSharedBytes);
  return *reinterpret_cast<T*>(machine.current->block->memory);
}

enum Operation { kBallot, kShuffle, kShuffleXor, kMax, kMin, kOr };

// Every lane's value, once all lanes of the warp have brought theirs to the same operation.
template <typename T>
const uint64_t* exchange(T value, Operation operation) {
  Fiber* me = machine.current;
  Warp& warp = me->block->warps[me->thread / kWarp];
  const int lane = me->thread % kWarp, side = me->warp_operations++ & 1;
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(value));
  warp.values[side][lane] = bits;
  warp.operation[side][lane] = operation;
  wait(warp.barrier);
  for (int other = 0; other < kWarp; ++other) {
    if (warp.operation[side][other] != operation) fail("lanes met at different warp operations");
  }
  return warp.values[side];
}

template <typename T>
T decode(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline void fiber_main() {
  machine.body();
  Fiber* me = machine.current;
  me->finished = true;
  ++machine.progress;
  if (--me->block->running == 0) std::memset(me->block->memory, 0xcd, kSharedBytes);
  while (true) yield();
}

inline void run_cluster(int first_block, std::mt19937& random) {
  Machine& m = machine;
  const int fibers = m.cluster * m.threads;
  m.cluster_barrier = {fibers, 0, 0};
  m.resident.clear();
  m.fibers = std::vector<Fiber>(fibers);
  for (int b = 0; b < m.cluster; ++b) {
    auto block = std::make_unique<Block>();
    block->index = first_block + b;
    block->running = m.threads;
    block->barrier.expected = m.threads;
    block->voted[0] = block->voted[1] = false;
    block->warps.resize(m.threads / kWarp);
    for (Warp& warp : block->warps) warp.barrier.expected = kWarp;
    std::memset(block->memory, 0xab, kSharedBytes);
    m.resident.push_back(std::move(block));
  }
  for (int f = 0; f < fibers; ++f) {
    Fiber& fiber = m.fibers[f];
    fiber.block = m.resident[f / m.threads].get();
    fiber.thread = f % m.threads;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = m.stacks + f * kStackBytes;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
  std::vector<int> order(fibers);
  std::iota(order.begin(), order.end(), 0);
  while (true) {
    std::shuffle(order.begin(), order.end(), random);
    const int64_t before = m.progress;
    bool all_finished = true;
    for (int f : order) {
      if (m.fibers[f].finished) continue;
      all_finished = false;
      m.current = &m.fibers[f];
      swapcontext(&m.scheduler, &m.current->context);
      if (!m.error.empty()) throw std::runtime_error(m.error);
    }
    if (all_finished) return;
    if (m.progress == before) throw std::runtime_error("deadlock: not all threads reach a barrier");
  }
}

// kernel<<<blocks, threads>>>(params), in clusters of `cluster` blocks.
template <typename Kernel, typename... Params>
void launch(Kernel kernel, int blocks, int threads, int cluster, unsigned seed, Params... params) {
  Machine& m = machine;
  if (threads % kWarp || threads > 1024 || blocks % cluster) {
    throw std::runtime_error("bad launch configuration");
  }
  const size_t needed = size_t(cluster) * threads * kStackBytes;
  if (m.stack_bytes < needed) {
    if (m.stacks) munmap(m.stacks, m.stack_bytes);
    void* at = mmap(nullptr, needed, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) throw std::runtime_error("no memory for the emulator's stacks");
    m.stacks = static_cast<char*>(at);
    m.stack_bytes = needed;
  }
  m.threads = threads;
  m.blocks = blocks;
  m.cluster = cluster;
  m.error.clear();
  m.body = [&] { kernel(params...); };
  std::mt19937 random(seed);
  std::vector<int> order(blocks / cluster);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  for (int at : order) run_cluster(at * cluster, random);
}

}  // namespace sere::emulation

namespace sere {

inline int thread_index() { return emulation::machine.current->thread; }
inline int num_threads() { return emulation::machine.threads; }
inline int block_index() { return emulation::machine.current->block->index; }
inline int num_blocks() { return emulation::machine.blocks; }

inline void sync_block() { emulation::wait(emulation::machine.current->block->barrier); }
inline bool elect_any_block(bool value) {
  emulation::Fiber* me = emulation::machine.current;
  bool& any = me->block->voted[me->block_votes++ & 1];
  any |= value;
  sync_block();
  const bool result = any;
  sync_block();
  any = false;
  return result;
}

inline uint32_t ballot(bool value) {
  const uint64_t* all = emulation::exchange(value, emulation::kBallot);
  uint32_t bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= uint32_t(all[lane] & 1) << lane;
  return bits;
}
inline void sync_warp() { ballot(false); }
template <typename T>
T shuffle(T value, int lane, int width = 32) {
  const int base = emulation::machine.current->thread % 32 / width * width;
  const uint64_t* all = emulation::exchange(value, emulation::kShuffle);
  return emulation::decode<T>(all[base + lane % width]);
}
template <typename T>
T shuffle_xor(T value, int mask) {
  const int lane = emulation::machine.current->thread % 32;
  return emulation::decode<T>(emulation::exchange(value, emulation::kShuffleXor)[lane ^ mask]);
}
inline uint32_t warp_max(uint32_t value) {
  const uint64_t* all = emulation::exchange(value, emulation::kMax);
  return uint32_t(*std::max_element(all, all + 32));
}
inline uint32_t warp_min(uint32_t value) {
  const uint64_t* all = emulation::exchange(value, emulation::kMin);
  return uint32_t(*std::min_element(all, all + 32));
}
inline uint32_t warp_or(uint32_t value) {
  const uint64_t* all = emulation::exchange(value, emulation::kOr);
  return uint32_t(std::reduce(all, all + 32, uint64_t{0}, std::bit_or<>()));
}
inline int count_bits(uint32_t bits) { return std::popcount(bits); }
inline int lowest_bit(uint32_t bits) { return bits ? std::countr_zero(bits) : -1; }

inline void sync_cluster() { emulation::wait(emulation::machine.cluster_barrier); }
template <typename T>
T* peer(T* shared, int rank) {
  unsigned char* mine = emulation::machine.current->block->memory;
  unsigned char* theirs = emulation::machine.resident[rank]->memory;
  return reinterpret_cast<T*>(theirs + (reinterpret_cast<unsigned char*>(shared) - mine));
}

template <typename T>
T atomic_update(T* at, T value) {
  const T old = *at;
  *at = value;
  return old;
}
inline uint32_t atomic_or(uint32_t* at, uint32_t bits) { return atomic_update(at, *at | bits); }
inline int atomic_add(int* at, int value) { return atomic_update(at, *at + value); }
inline int atomic_min(int* at, int value) { return atomic_update(at, *at < value ? *at : value); }
inline int atomic_max(int* at, int value) { return atomic_update(at, *at > value ? *at : value); }
inline void atomic_add(int64_t* at, int64_t value) { *at += value; }
inline void fence_device() {}
template <typename T>
T load_racing(const T* at) {
  return *at;
}
inline void prefetch(const void*) {}
inline void wait_for_prior_kernels() {}
inline void let_next_kernel_start() {}
inline float exponential(float x) { return std::exp(x); }
inline float from_half(uint16_t bits) { return float(std::bit_cast<_Float16>(bits)); }
inline float from_bfloat16(uint16_t bits) { return std::bit_cast<float>(uint32_t(bits) << 16); }

template <typename T>
struct alignas(4 * sizeof(T)) Quad {
  T at[4];
};
template <typename T>
Quad<T> load_quad(const T* from) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(Quad<T>)) emulation::fail("misaligned load");
  return *reinterpret_cast<const Quad<T>*>(from);
}

}  // namespace sere
