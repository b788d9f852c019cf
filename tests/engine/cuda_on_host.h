// Just enough of CUDA to run a kernel of one block a row on the host: a thread of the system for each of the block's,
// warps of one thread, and blocks one after the other.

#include <atomic>
#include <barrier>
#include <cmath>
#include <cstring>
#include <thread>
#include <vector>

#define WARP 1
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
template <typename T>
static T __shfl_xor_sync(unsigned, T value, int) { return value; }
template <typename T>
static T __shfl_up_sync(unsigned, T value, int) { return value; }
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
}
