// Filter, draw and update the state on the GPU: a step of every row of a batch, without the host.
//
// The kernel does what pipeline/engine/filters.py does: the same filters in the same order, the same uniform, the same
// token, unless the uniform or a filter's edge is within rounding. A block draws for a row. What penalties and bans do
// to each token is kept in rows as wide as the vocabulary. A step changes one place in each, so its work does not grow
// with the context. A row with a `left` of 0 rests: it draws nothing and does not change.
//
// Logits become keys, unsigned numbers in the same order, so that a threshold is found exactly, three bits at a time.
// Weights become integers, so that their sums do not depend on the order in which threads add. Most tokens are far
// below top-k: at least k tokens reach the k-th largest of the threads' largest keys, and the tokens that reach this
// bound are listed in shared memory. If they do not fit in the list, or nothing limits their number, the row is read.
// Top-n-sigma and eta sum doubles over the row, as the list has no fixed order: each thread its own tokens, and then
// the threads, always in the same order.
//
// NVRTC compiles it without contraction of products and sums. For the tests, a C++ compiler does, with
// tests/engine/cuda/cuda_on_host.h.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#ifndef WARP
#define WARP 32
#endif
#define WARPS 32
#define WAYS 7
#define WAY_BITS 3
#define LISTED 2048
// The largest weight. Sums over a vocabulary of a million tokens fit in 64 bits.
#define UNIT 1099511627776.0f

// As in pipeline/engine/cuda/rows.py, which has the fields in the same order.
#define ENDING_IDS 8
#define LOGGED 8
#define ASKS_HOST ((1LL << 24) - 1)
#define STEP_BITS 24
#define INFINITE 0xff800000u
#define REMOVED 0x007fffffu

struct Rows {
    const float *logits;
    const float *bias;
    float *penalty;
    float *offset;
    double *counts;
    const float *repetition_penalty;
    const double *presence_penalty;
    const double *frequency_penalty;
    const float *temperature;
    const i64 *top_k;
    const double *top_p;
    const float *log_min_p;
    const double *top_n_sigma;
    const double *eta_cutoff;
    const i64 *ending_ids;
    const double *uniforms;
    i64 *drawn;
    i64 *left;
    const i64 *tag;
    i64 *log;
    i64 *input_ids;
    i64 *position_ids;
    int *last_positions;
    u32 *keys;       // scratch, as wide as the vocabulary
    float *weights;  // scratch, as wide as the vocabulary
    i64 vocabulary;
    i64 context;
};

struct Shared {
    u64 sums[2][WAYS][WARPS];
    double parts[2][WARPS];
    u64 totals[WARPS];
    u32 keys[LISTED];
    float weights[LISTED];
    int listed;
};

// Map a float to a number in the same order. NaN is above infinity or below minus infinity.
__device__ u32 key_of(float value) {
    u32 bits = __float_as_uint(value);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ float value_of(u32 key) {
    return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

__device__ u64 whole(float weight) {
    return (u64)(weight * UNIT);
}

__device__ u64 larger(u64 one, u64 other) {
    return one > other ? one : other;
}

// Sum `ways` numbers each over the block's threads, and give the sums to all threads. `turn` alternates between calls,
// so that one barrier is enough: a thread that writes the sums of the next call has read those of the last.
__device__ void add_up(u64 *own, int ways, Shared *shared, int *turn) {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = (blockDim.x + WARP - 1) / WARP;
    for (int way = 0; way < ways; way++)
        for (int step = WARP / 2; step > 0; step /= 2)
            own[way] += __shfl_xor_sync(0xffffffffu, own[way], step);
    if (lane == 0)
        for (int way = 0; way < ways; way++)
            shared->sums[*turn][way][warp] = own[way];
    __syncthreads();
    for (int way = 0; way < ways; way++) {
        own[way] = 0;
        for (int other = lane; other < warps; other += WARP)
            own[way] += shared->sums[*turn][way][other];
        for (int step = WARP / 2; step > 0; step /= 2)
            own[way] += __shfl_xor_sync(0xffffffffu, own[way], step);
    }
    *turn = 1 - *turn;
}

// Sum a double over the block's threads in a fixed order, and give the sum to all threads. `turn` is as in `add_up`.
__device__ double sum_of(double own, Shared *shared, int *turn) {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = (blockDim.x + WARP - 1) / WARP;
    for (int step = WARP / 2; step > 0; step /= 2)
        own += __shfl_xor_sync(0xffffffffu, own, step);
    if (lane == 0)
        shared->parts[*turn][warp] = own;
    __syncthreads();
    own = 0;
    for (int other = lane; other < warps; other += WARP)
        own += shared->parts[*turn][other];
    for (int step = WARP / 2; step > 0; step /= 2)
        own += __shfl_xor_sync(0xffffffffu, own, step);
    *turn = 1 - *turn;
    return own;
}

// Find the largest key of the block's threads, and give it to all threads.
__device__ u32 largest_of(u32 key, Shared *shared, int *turn) {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = (blockDim.x + WARP - 1) / WARP;
    u64 largest = key;
    for (int step = WARP / 2; step > 0; step /= 2)
        largest = larger(largest, __shfl_xor_sync(0xffffffffu, largest, step));
    if (lane == 0)
        shared->sums[*turn][0][warp] = largest;
    __syncthreads();
    for (int other = lane; other < warps; other += WARP)
        largest = larger(largest, shared->sums[*turn][0][other]);
    for (int step = WARP / 2; step > 0; step /= 2)
        largest = larger(largest, __shfl_xor_sync(0xffffffffu, largest, step));
    *turn = 1 - *turn;
    return (u32)largest;
}

// Find the largest key at or above which the weights sum to at least `need`. Without weights, each token counts as one.
__device__ u32 find_edge(const u32 *keys, const float *weights, int count, u64 need, Shared *shared, int *turn) {
    u32 edge = 0;
    for (int shift = 30; shift >= 0; shift -= WAY_BITS) {
        // 32 is not a multiple of 3: the first pass takes two bits.
        int ways = shift == 30 ? 3 : WAYS;
        u64 reached[WAYS] = {0, 0, 0, 0, 0, 0, 0};
        for (int place = threadIdx.x; place < count; place += blockDim.x) {
            u32 key = keys[place];
            if (key < edge)
                continue;
            u64 weight = weights ? whole(weights[place]) : 1;
            for (int way = 0; way < ways; way++)
                if (key - edge >= (u32)(way + 1) << shift)
                    reached[way] += weight;
        }
        add_up(reached, ways, shared, turn);
        u32 digit = 0;
        for (int way = 0; way < ways; way++)
            if (reached[way] >= need)
                digit = way + 1;
        edge += digit << shift;
    }
    return edge;
}

// Log a drawn token, count it, and set what is fed next; or ask the host to draw. One thread does this.
__device__ void advance(Rows rows, i64 row, i64 token, bool is_drawn) {
    i64 step = rows.drawn[row];
    rows.log[row * LOGGED + step % LOGGED] = rows.tag[row] + (step << STEP_BITS) + (is_drawn ? token : ASKS_HOST);
    if (!is_drawn) {
        rows.left[row] = 0;
        return;
    }
    i64 cell = row * rows.vocabulary + token;
    rows.drawn[row] += 1;
    rows.counts[cell] += 1;
    rows.penalty[cell] = rows.repetition_penalty[row];
    rows.offset[cell] = (float)(rows.presence_penalty[row] + rows.frequency_penalty[row] * rows.counts[cell]);
    bool is_end = false;
    for (int ending = 0; ending < ENDING_IDS; ending++)
        is_end = is_end || rows.ending_ids[row * ENDING_IDS + ending] == token;
    rows.left[row] = is_end ? 0 : rows.left[row] - 1;
    if (rows.left[row] > 0) {
        rows.input_ids[row] = token;
        rows.position_ids[row] += 1;
        rows.last_positions[row] += 1;
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * WARP) draw(Rows rows) {
    __shared__ Shared shared;
    int turn = 0;
    int thread = threadIdx.x, threads = blockDim.x, lane = thread % WARP, warp = thread / WARP;
    i64 row = blockIdx.x;
    // Everything that `advance` changes is read before the first barrier.
    if (rows.left[row] <= 0)
        return;
    i64 step = rows.drawn[row] < rows.context ? rows.drawn[row] : rows.context - 1;
    double uniform = rows.uniforms[row * rows.context + step];
    int vocabulary = (int)rows.vocabulary;
    i64 start = row * rows.vocabulary;
    u32 *keys = rows.keys + start;
    float *weights = rows.weights + start;

    // Bias and penalties. Each thread keeps the largest key of its tokens, which are the same ones in the loops below.
    u32 largest = 0;
    u64 wrong = 0;
    for (int token = thread; token < vocabulary; token += threads) {
        i64 cell = start + token;
        float logit = rows.logits[cell] + rows.bias[cell];
        logit = logit > 0 ? logit / rows.penalty[cell] : logit * rows.penalty[cell];
        logit = logit - rows.offset[cell];
        u32 key = key_of(logit);
        wrong += logit != logit || key == INFINITE;
        keys[token] = key;
        largest = key > largest ? key : largest;
    }
    add_up(&wrong, 1, &shared, &turn);
    u32 top = largest_of(largest, &shared, &turn);
    if (wrong || top <= REMOVED) {
        if (thread == 0)
            advance(rows, row, 0, false);
        return;
    }

    // Temperature. The likeliest token gets the logit 0 and the weight 1.
    float peak = value_of(top), temperature = rows.temperature[row];
    for (int token = thread; token < vocabulary; token += threads) {
        float cooled = (value_of(keys[token]) - peak) / temperature;
        keys[token] = key_of(cooled);
        weights[token] = expf(cooled);
    }
    largest = key_of((value_of(largest) - peak) / temperature);

    // Top-k, among the list if it holds all candidates, else among the row.
    const u32 *read_keys = keys;
    const float *read_weights = weights;
    int count = vocabulary;
    u32 edge = key_of(rows.log_min_p[row]), edge_k = 0;
    i64 top_k = rows.top_k[row];
    if (0 < top_k && top_k < vocabulary) {
        if (top_k <= threads && threads <= vocabulary) {
            shared.keys[thread] = largest;
            if (thread == 0)
                shared.listed = 0;
            __syncthreads();
            u32 bound = find_edge(shared.keys, 0, threads, top_k, &shared, &turn);
            __syncthreads();
            for (int token = thread; token < vocabulary; token += threads) {
                if (keys[token] < bound)
                    continue;
                int place = atomicAdd(&shared.listed, 1);
                if (place < LISTED) {
                    shared.keys[place] = keys[token];
                    shared.weights[place] = weights[token];
                }
            }
            __syncthreads();
            if (shared.listed <= LISTED) {
                read_keys = shared.keys;
                read_weights = shared.weights;
                count = shared.listed;
            }
        }
        edge_k = find_edge(read_keys, 0, count, top_k, &shared, &turn);
    }

    // Top-p, among what top-k has kept.
    double top_p = rows.top_p[row];
    if (top_p < 1) {
        u64 mass = 0;
        for (int place = thread; place < count; place += threads)
            if (read_keys[place] >= edge_k)
                mass += whole(read_weights[place]);
        add_up(&mass, 1, &shared, &turn);
        double need = ceil(top_p * (double)mass);
        u32 edge_p = find_edge(read_keys, read_weights, count, need > 1 ? (u64)need : 1, &shared, &turn);
        edge = edge_p > edge ? edge_p : edge;
    }
    edge = edge_k > edge ? edge_k : edge;

    // Top-n-sigma. The largest logit is 0.
    double top_n_sigma = rows.top_n_sigma[row];
    if (top_n_sigma > 0) {
        double left = 0, sum = 0, squares = 0;
        for (int token = thread; token < vocabulary; token += threads) {
            bool is_left = keys[token] >= edge;
            left += is_left ? 1 : 0;
            sum += is_left ? value_of(keys[token]) : 0;
        }
        left = sum_of(left, &shared, &turn);
        double mean = sum_of(sum, &shared, &turn) / left;
        for (int token = thread; token < vocabulary; token += threads) {
            double distance = keys[token] >= edge ? value_of(keys[token]) - mean : 0;
            squares += distance * distance;
        }
        squares = sum_of(squares, &shared, &turn);
        u32 edge_sigma = key_of((float)(-top_n_sigma * sqrt(squares / left)));
        edge = edge_sigma > edge ? edge_sigma : edge;
    }

    // Eta, by the logarithms of its cutoff and of the probabilities.
    double eta_cutoff = rows.eta_cutoff[row];
    if (eta_cutoff > 0) {
        double mass = 0, moment = 0;
        for (int token = thread; token < vocabulary; token += threads) {
            if (keys[token] < edge)
                continue;
            double logit = value_of(keys[token]), weight = exp(logit);
            mass += weight;
            moment += weight * logit;
        }
        mass = sum_of(mass, &shared, &turn);
        double log_mass = log(mass), entropy = log_mass - sum_of(moment, &shared, &turn) / mass;
        double log_eta = fmin(log(eta_cutoff), log(eta_cutoff) / 2 - entropy);
        double least = log_eta + log_mass;
        u32 edge_eta = key_of(least < 0 ? (float)least : -0.0f);
        edge = edge_eta > edge ? edge_eta : edge;
    }

    // Find the token at which the CDF in vocabulary order first exceeds the uniform: first the warp with its range of
    // tokens, then the token. Until now each thread has read only keys and weights that it wrote.
    __syncthreads();
    int warps = (threads + WARP - 1) / WARP, run = (vocabulary + warps - 1) / warps;
    int first = warp * run, end = first + run < vocabulary ? first + run : vocabulary;
    u64 own = 0;
    for (int token = first + lane; token < end; token += WARP)
        own += keys[token] >= edge ? whole(weights[token]) : 0;
    for (int step = WARP / 2; step > 0; step /= 2)
        own += __shfl_xor_sync(0xffffffffu, own, step);
    if (lane == 0)
        shared.totals[warp] = own;
    __syncthreads();
    u64 before = 0, total = 0;
    for (int other = 0; other < warps; other++) {
        before += other < warp ? shared.totals[other] : 0;
        total += shared.totals[other];
    }
    u64 target = (u64)(uniform * (double)total);
    target = target < total ? target : total - 1;
    if (target < before || target >= before + own)
        return;
    for (int base = first; base < end; base += WARP) {
        int token = base + lane;
        u64 weight = token < end && keys[token] >= edge ? whole(weights[token]) : 0;
        u64 through = weight;
        for (int step = 1; step < WARP; step *= 2) {
            u64 lower = __shfl_up_sync(0xffffffffu, through, step);
            through += lane >= step ? lower : 0;
        }
        through += before;
        if (target < through && target >= through - weight)
            advance(rows, row, token, true);
        before = __shfl_sync(0xffffffffu, through, WARP - 1);
        if (target < before)
            return;
    }
}
