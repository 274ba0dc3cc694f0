// Checks the shim itself, with kernels whose results are known. `selftest bench` prints the cost of
// a block instead.
#include <cuda_runtime.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr unsigned kAll = 0xffffffffu;
int failures = 0;

#define CHECK(condition)                                               \
    do {                                                               \
        if (!(condition)) {                                            \
            std::printf("line %d failed: %s\n", __LINE__, #condition); \
            ++failures;                                                \
        }                                                              \
    } while (false)

const char* const orders[] = {"forward", "reverse", "random"};
void set_order(const char* order) { setenv("FASTKD_SIMT_ORDER", order, 1); }

// The text of the error that a launch throws; empty if it throws none.
std::string error_of(const std::function<void()>& launch) {
    try {
        launch();
    } catch (const std::runtime_error& e) {
        return e.what();
    }
    return "";
}

bool mentions(const std::string& text, std::initializer_list<const char*> parts) {
    for (const char* part : parts) {
        if (text.find(part) == std::string::npos) {
            std::printf("no \"%s\" in \"%s\"\n", part, text.c_str());
            return false;
        }
    }
    return true;
}

int linear_thread() {
    return static_cast<int>(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
}

__global__ void indices(int* seen) {
    const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    const unsigned size = blockDim.x * blockDim.y * blockDim.z;
    seen[block * size + static_cast<unsigned>(linear_thread())] += 1;
}

void test_indices() {
    std::vector<int> seen(2 * 3 * 4 * 8 * 5 * 2);
    simt::launch(indices, dim3(2, 3, 4), dim3(8, 5, 2), 0, seen.data());
    for (const int n : seen) CHECK(n == 1);
}

template <class T> __global__ void warp_sum(const T* in, T* out) {
    T v = in[threadIdx.x];
    for (unsigned d = 16; d; d /= 2) v += __shfl_down_sync(kAll, v, d);
    if (threadIdx.x % 32 == 0) out[threadIdx.x / 32] = v;
}

template <class T> void test_warp_sum() {
    std::vector<T> in(128), out(4), expected(4);
    for (std::size_t i = 0; i < in.size(); ++i) expected[i / 32] += in[i] = static_cast<T>(i * i);
    simt::launch(warp_sum<T>, 1, 128, 0, in.data(), out.data());
    CHECK(out == expected);
}

__global__ void shuffles(int width, int amount, int* out) {
    const int lane = linear_thread();
    const int v = 100 + lane;
    out[lane] = __shfl_sync(kAll, v, amount, width);
    out[32 + lane] = __shfl_up_sync(kAll, v, static_cast<unsigned>(amount), width);
    out[64 + lane] = __shfl_down_sync(kAll, v, static_cast<unsigned>(amount), width);
    out[96 + lane] = __shfl_xor_sync(kAll, v, amount, width);
}

void test_widths() {
    for (int width = 2; width <= 32; width *= 2) {
        for (int amount = 0; amount < 32; ++amount) {
            std::vector<int> out(128);
            simt::launch(shuffles, 1, 32, 0, width, amount, out.data());
            for (int lane = 0; lane < 32; ++lane) {
                const int first = lane / width * width, in = lane - first;
                const int other = lane ^ amount;
                const auto at = [&](int i) { return out[static_cast<std::size_t>(i + lane)] - 100; };
                CHECK(at(0) == first + amount % width);
                CHECK(at(32) == (in < amount ? lane : lane - amount));
                CHECK(at(64) == (in + amount >= width ? lane : lane + amount));
                CHECK(at(96) == (other >= first + width ? lane : other));
            }
        }
    }
}

__global__ void votes(unsigned* out) {
    const unsigned t = threadIdx.x;
    const unsigned ballot = __ballot_sync(kAll, t % 3 == 0);
    const int any = __any_sync(kAll, t == 40), all = __all_sync(kAll, t >= 32);
    if (t % 32 == 0) {
        out[t / 32 * 3] = ballot;
        out[t / 32 * 3 + 1] = static_cast<unsigned>(any);
        out[t / 32 * 3 + 2] = static_cast<unsigned>(all);
    }
}

void test_votes() {
    std::vector<unsigned> out(6), expected{0, 0, 0, 0, 1, 1};
    for (unsigned t = 0; t < 64; t += 3) expected[t / 32 * 3] |= 1u << t % 32;
    simt::launch(votes, 1, 64, 0, out.data());
    CHECK(out == expected);
}

// The halves of a warp take different ways, with different numbers of collectives, and so do the
// warps; the part of the third warp that the block lacks is not waited for.
__global__ void divergent(int* out) {
    const unsigned t = threadIdx.x;
    int v = static_cast<int>(t);
    if (t < 32) {
        if (t % 2) {
            for (int i = 0; i < 3; ++i) v = __shfl_sync(0xaaaaaaaau, v, (linear_thread() + 2) % 32);
        } else {
            v = __shfl_xor_sync(0x55555555u, v, 2);
            __syncwarp(0x55555555u);
        }
    } else if (t < 64) {
        for (int i = 0; i < 5; ++i) v += __any_sync(kAll, i & 1);
    }
    __syncwarp();
    out[t] = v;
}

void test_divergence() {
    std::vector<int> out(80), expected(80);
    for (int t = 0; t < 80; ++t) {
        const int even = t ^ 2, odd = (t + 6) % 32;
        expected[static_cast<std::size_t>(t)] = t < 32 ? (t % 2 ? odd : even) : t < 64 ? t + 2 : t;
    }
    simt::launch(divergent, 1, 80, 0, out.data());
    CHECK(out == expected);
}

// A lane of the full mask may be well past its own next shuffle, in a smaller mask, before another
// reads what it gave to the first.
__global__ void overtaking(int* out) {
    const int lane = linear_thread();
    int v = __shfl_xor_sync(kAll, lane, 31);
    if (lane < 16) {
        for (int i = 0; i < 4; ++i) v += 1000 * __shfl_xor_sync(0xffffu, 1, 1);
    }
    out[lane] = v;
}

void test_overtaking() {
    std::vector<int> out(32);
    simt::launch(overtaking, 1, 32, 0, out.data());
    for (int lane = 0; lane < 32; ++lane) {
        CHECK(out[static_cast<std::size_t>(lane)] == 31 - lane + (lane < 16 ? 4000 : 0));
    }
}

__global__ void __launch_bounds__(256) block_sum(const int* __restrict__ in, int n, int* out) {
    __shared__ int part[256];
    const int t = linear_thread();
    const int i = static_cast<int>(blockIdx.x) * 256 + t;
    part[t] = i < n ? __ldg(in + i) : 0;
    __syncthreads();
    for (int d = 128; d; d /= 2) {
        if (t < d) part[t] += part[t + d];
        __syncthreads();
    }
    if (t == 0) atomicAdd(out, part[0]);
}

void test_block_sum() {
    std::vector<int> in(1000);
    int expected = 0, out = 0;
    for (std::size_t i = 0; i < in.size(); ++i) expected += in[i] = static_cast<int>(i * 7 % 31);
    simt::launch(block_sum, 4, 256, 0, in.data(), 1000, &out);
    CHECK(out == expected);
}

// Threads that have returned are not waited for; the last of them returns while others wait.
__global__ void early_return(int live, int* out) {
    __shared__ int values[64];
    const int t = linear_thread();
    if (t >= live) return;
    values[t] = t;
    __syncthreads();
    out[t] = values[live - 1 - t];
    __syncthreads();
}

void test_early_return() {
    for (const int live : {1, 31, 33, 63, 64}) {
        std::vector<int> out(64, -1);
        simt::launch(early_return, 2, 64, 0, live, out.data());
        for (int t = 0; t < 64; ++t) {
            CHECK(out[static_cast<std::size_t>(t)] == (t < live ? live - 1 - t : -1));
        }
    }
}

__global__ void dynamic_shared_user(int n, int* garbage, int* out) {
    auto* bytes = static_cast<unsigned char*>(simt::dynamic_shared());
    auto* ints = static_cast<int*>(simt::dynamic_shared());
    const int t = linear_thread();
    if (t < n * 4 && bytes[t] != 0xA5) atomicAdd(garbage, 1);
    __syncthreads();
    if (t < n) ints[t] = t;
    __syncthreads();
    if (t < n) out[t] = ints[n - 1 - t];
}

void test_dynamic_shared() {
    int spoiled = 0;
    std::vector<int> out(16);
    simt::launch(dynamic_shared_user, 3, 64, 64, 16, &spoiled, out.data());
    CHECK(spoiled == 0);
    for (int i = 0; i < 16; ++i) CHECK(out[static_cast<std::size_t>(i)] == 15 - i);
}

struct Totals {
    int add, low, high;
    unsigned wrapped;
    unsigned long long long_add;
    float float_add;
    double double_add;
    int locked;
};

__global__ void atomics(Totals* totals) {
    const int t = linear_thread();
    atomicAdd(&totals->add, 1);
    atomicMin(&totals->low, -t);
    atomicMax(&totals->high, t);
    atomicAdd(&totals->wrapped, 0xffffffffu);
    atomicAdd(&totals->long_add, 1ull << 40);
    atomicAdd(&totals->float_add, 0.5f);
    atomicAdd(&totals->double_add, 0.25);
    int seen = totals->locked, expected;
    do {
        expected = seen;
        seen = atomicCAS(&totals->locked, expected, expected + t);
    } while (seen != expected);
    __threadfence();
}

void test_atomics() {
    Totals totals{};
    simt::launch(atomics, 2, 100, 0, &totals);
    CHECK(totals.add == 200);
    CHECK(totals.low == -99);
    CHECK(totals.high == 99);
    CHECK(totals.wrapped == static_cast<unsigned>(-200));
    CHECK(totals.long_add == 200ull << 40);
    CHECK(totals.float_add == 100.0f);
    CHECK(totals.double_add == 50.0);
    CHECK(totals.locked == 9900);
    float f = 1.5f;
    CHECK(atomicExch(&f, 2.5f) == 1.5f && f == 2.5f);
}

void test_intrinsics() {
    CHECK(__popc(0xf0f0u) == 8 && __popcll(~0ull) == 64);
    CHECK(__ffs(0) == 0 && __ffs(8) == 4 && __clz(0) == 32 && __clz(1) == 31);
    CHECK(__int_as_float(__float_as_int(1.5f)) == 1.5f && __float_as_uint(1.0f) == 0x3f800000u);
    CHECK(__longlong_as_double(__double_as_longlong(-2.5)) == -2.5);
    CHECK(min(1, 2) == 1 && max(1u, 2) == 2u && max(1.0f, NAN) == 1.0f && min(2.0f, 1.0) == 1.0);
    static_assert(sizeof(float4) == 16 && alignof(float4) == 16 && alignof(uint2) == 8);
    CHECK(make_float4(1, 2, 3, 4).w == 4 && make_int4(1, 2, 3, 4).y == 2);
}

__global__ void half_at_barrier() {
    if (threadIdx.x < 32) __syncthreads();
    if (threadIdx.x >= 32) __syncwarp(threadIdx.x < 48 ? 0xffffu : kAll);
}

__global__ void two_barriers() {
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
}

__global__ void shuffle_after_exit() {
    if (threadIdx.x == 5) return;
    __shfl_xor_sync(kAll, 1, 1);
}

__global__ void reads_outside_mask() {
    if (threadIdx.x < 8) __shfl_down_sync(0xffu, 1, 4);
}

__global__ void outside_own_mask() {
    if (threadIdx.x == 0) __syncwarp(1);
    if (threadIdx.x == 1) __syncwarp(1);
}

__global__ void odd_width() { __shfl_sync(kAll, 1, 0, 12); }

struct Owner {
    int* count;
    explicit Owner(int* c) : count(c) { ++*count; }
    ~Owner() { --*count; }
};

__global__ void throws(int* owners) {
    const Owner owner(owners);
    __syncwarp();
    if (threadIdx.x == 17 && blockIdx.x == 1) throw std::runtime_error("from the kernel");
    __syncthreads();
}

void test_faults() {
    const auto fault = [](void (*kernel)(), unsigned threads) {
        return error_of([&] { simt::launch(kernel, dim3(1, 2), threads, 0); });
    };
    const char* block = orders[1] == std::string(std::getenv("FASTKD_SIMT_ORDER")) ? "(0,1,0)" : "";
    CHECK(mentions(
        fault(half_at_barrier, 64),
        {"deadlock in block (0,", block, "threads 0-31", "__syncthreads at", "selftest.cpp:", "threads 48-63",
         "__syncwarp with mask 0xffffffff", "of its mask, threads 32-47 exited"}));
    CHECK(mentions(fault(two_barriers, 64), {"deadlock", "threads 0-31", "threads 32-63"}));
    CHECK(mentions(fault(shuffle_after_exit, 32), {"threads 0-4, 6-31", "of its mask, thread 5 exited"}));
    CHECK(mentions(fault(reads_outside_mask, 32), {"__shfl_down_sync with mask 0x000000ff", "reads lane"}));
    CHECK(mentions(fault(outside_own_mask, 32), {"thread 1 (1,0,0)", "does not name the calling lane 1"}));
    CHECK(mentions(fault(odd_width, 32), {"width 12"}));

    int owners = 0;
    CHECK(error_of([&] { simt::launch(throws, 3, 256, 0, &owners); }) == "from the kernel");
    CHECK(owners == 0);
}

void test_refused_launches() {
    int sum = 0;
    const auto launch = [&](dim3 grid, dim3 block, std::size_t shared) {
        simt::launch(block_sum, grid, block, shared, &sum, 0, &sum);
        return cudaGetLastError();
    };
    CHECK(launch(0, 256, 0) == cudaErrorInvalidConfiguration);
    CHECK(launch(1, 1025, 0) == cudaErrorInvalidConfiguration);
    CHECK(launch(1, 256, 60000) == cudaErrorInvalidValue);
    CHECK(cudaGetLastError() == cudaSuccess);
    CHECK(cudaFuncSetAttribute(block_sum, cudaFuncAttributeMaxDynamicSharedMemorySize, 60000) == cudaSuccess);
    CHECK(launch(1, 256, 60000) == cudaSuccess);
    CHECK(std::string(cudaGetErrorName(cudaErrorInvalidValue)) == "cudaErrorInvalidValue");
}

__global__ void missing_barrier(int* out) {
    __shared__ int values[64];
    const int t = linear_thread();
    values[t] = -1;
    __syncthreads();
    values[t] = t;
    // Here a __syncthreads is missing.
    out[t] = values[63 - t];
}

__global__ void arrival(int* count, int* out) {
    out[linear_thread() + static_cast<int>(blockIdx.x) * 64] = atomicAdd(count, 1);
}

void test_order() {
    std::vector<std::vector<int>> raced, arrived;
    for (const char* order : orders) {
        set_order(order);
        raced.emplace_back(64);
        simt::launch(missing_barrier, 1, 64, 0, raced.back().data());
        int count = 0;
        arrived.emplace_back(128);
        simt::launch(arrival, 2, 64, 0, &count, arrived.back().data());
    }
    CHECK(raced[0] != raced[1] && raced[0] != raced[2] && raced[1] != raced[2]);
    for (std::size_t i = 0; i < 128; ++i) {
        CHECK(arrived[0][i] == static_cast<int>(i));
        CHECK(arrived[1][i] == static_cast<int>(127 - i));
    }
    std::vector<int> again(64), other(64);
    simt::launch(missing_barrier, 1, 64, 0, again.data());
    setenv("FASTKD_SIMT_SEED", "7", 1);
    simt::launch(missing_barrier, 1, 64, 0, other.data());
    unsetenv("FASTKD_SIMT_SEED");
    CHECK(again == raced[2] && other != again);
}

__global__ void five_shuffles_two_barriers(int* out) {
    __shared__ int part[8];
    int v = linear_thread();
    for (int d = 16; d; d /= 2) v += __shfl_xor_sync(kAll, v, d);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (const int p : part) *out += p;
    }
    __syncthreads();
}

__global__ void no_waits(int* out) { *out += linear_thread(); }

void bench() {
    const auto report = [](const char* name, void (*kernel)(int*)) {
        int out = 0;
        simt::launch(kernel, 100, 256, 0, &out);
        const int blocks = 20000;
        const auto start = std::chrono::steady_clock::now();
        simt::launch(kernel, blocks, 256, 0, &out);
        const std::chrono::duration<double, std::micro> time = std::chrono::steady_clock::now() - start;
        std::printf("%s: %.1f us a block of 256 threads\n", name, time.count() / blocks);
    };
    for (const char* order : orders) {
        set_order(order);
        std::printf("%s\n", order);
        report("  5 shuffles, 2 __syncthreads", five_shuffles_two_barriers);
        report("  nothing to wait for", no_waits);
    }
}

}  // namespace

int main(int argc, char** argv) {
    if (argc > 1 && std::string(argv[1]) == "bench") return bench(), 0;
    for (const char* order : orders) {
        set_order(order);
        // Faults amid the rest, for they must not leave anything behind.
        for (int round = 0; round < 2; ++round) {
            test_indices();
            test_warp_sum<int>();
            test_warp_sum<unsigned long long>();
            test_warp_sum<float>();
            test_warp_sum<double>();
            test_widths();
            test_votes();
            test_divergence();
            test_overtaking();
            test_block_sum();
            test_early_return();
            test_dynamic_shared();
            test_atomics();
            test_faults();
        }
    }
    test_intrinsics();
    test_refused_launches();
    test_order();
    std::printf(failures ? "%d checks failed\n" : "all checks passed\n", failures);
    return failures != 0;
}
