// Just enough of CUDA to run a kernel with one block per row on the host: a system thread per thread of the block, and
// blocks one after the other. The WARP threads of a warp exchange values through memory.

#include <atomic>
#include <barrier>
#include <cmath>
#include <cstring>
#include <thread>
#include <vector>

#define __global__
#define __device__ static
#define __shared__ static
#define __launch_bounds__(threads)

struct Dimension {
    int x;
};
static thread_local Dimension threadIdx, blockIdx;
static Dimension blockDim;
static std::barrier<> *block_barrier;

static void __syncthreads() { block_barrier->arrive_and_wait(); }
static int atomicAdd(int *place, int value) { return __atomic_fetch_add(place, value, __ATOMIC_RELAXED); }

static unsigned long long exchanged[32][WARP];
static std::vector<std::barrier<> *> warp_barriers;

template <typename T>
static T exchange(T value, int from) {
    int warp = threadIdx.x / WARP;
    std::memcpy(&exchanged[warp][threadIdx.x % WARP], &value, sizeof value);
    warp_barriers[warp]->arrive_and_wait();
    T found;
    std::memcpy(&found, &exchanged[warp][from], sizeof found);
    warp_barriers[warp]->arrive_and_wait();
    return found;
}
template <typename T>
static T __shfl_xor_sync(unsigned, T value, int step) { return exchange(value, (threadIdx.x % WARP) ^ step); }
template <typename T>
static T __shfl_up_sync(unsigned, T value, int step) {
    int lane = threadIdx.x % WARP;
    return exchange(value, lane >= step ? lane - step : lane);
}
template <typename T>
static T __shfl_sync(unsigned, T value, int lane) { return WARP > 1 ? exchange(value, lane) : value; }

static unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
static float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

#include "sampler.cu"

extern "C" void draw_on_host(const Rows *rows, int count, int threads) {
    blockDim.x = threads;
    std::barrier<> barrier(threads);
    block_barrier = &barrier;
    warp_barriers.clear();
    for (int warp = 0; warp < threads / WARP; warp++)
        warp_barriers.push_back(new std::barrier<>(WARP));
    std::vector<std::thread> running;
    for (int number = 0; number < threads; number++)
        running.emplace_back([=] {
            threadIdx.x = number;
            for (int row = 0; row < count; row++) {
                blockIdx.x = row;
                draw(*rows);
                // The next block must not begin in the memory that this one shares.
                block_barrier->arrive_and_wait();
            }
        });
    for (auto &one : running)
        one.join();
    for (auto *one : warp_barriers)
        delete one;
}
