// The scheduler: a block's threads are fibers on one OS thread, run in a fixed order of priority,
// each until it has to wait for others. A fiber outlives its thread and goes on with the next, so
// threads that never wait share one stack.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "cuda_runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SIMT_ASAN 1
#endif
#endif

#if SIMT_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__) && !defined(__aarch64__)
#define SIMT_UCONTEXT 1
#endif

#if SIMT_UCONTEXT
#include <ucontext.h>
#endif

namespace simt {
namespace {

[[noreturn]] void fiber_main();

// A Context is a point of execution that can be left and come back to.

#if SIMT_UCONTEXT

struct Context {
    ucontext_t state;

    void prepare(char* stack, char* top) {
        getcontext(&state);
        state.uc_stack.ss_sp = stack;
        state.uc_stack.ss_size = static_cast<std::size_t>(top - stack);
        state.uc_link = nullptr;
        makecontext(&state, [] { fiber_main(); }, 0);
    }
};

void swap(Context& from, Context& to) { swapcontext(&from.state, &to.state); }

#else

// Saves the registers that a call preserves on the stack, and continues on the other stack. No
// system call, unlike swapcontext, which saves the signal mask as well.
extern "C" void simt_swap_stacks(void** save, void* load);

#if defined(__x86_64__)

asm(R"(
  .pushsection .text
  .globl simt_swap_stacks
  .hidden simt_swap_stacks
  .type simt_swap_stacks, @function
simt_swap_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size simt_swap_stacks, . - simt_swap_stacks
  .popsection
)");

constexpr int kFrameWords = 8;  // six registers, the return address, the caller's return address
constexpr int kReturnWord = 6;

#else

asm(R"(
  .pushsection .text
  .globl simt_swap_stacks
  .hidden simt_swap_stacks
  .type simt_swap_stacks, %function
simt_swap_stacks:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
  .size simt_swap_stacks, . - simt_swap_stacks
  .popsection
)");

constexpr int kFrameWords = 20;
constexpr int kReturnWord = 11;

#endif

struct Context {
    void* sp;

    // As if fiber_main had been about to start when it called simt_swap_stacks.
    void prepare(char*, char* top) {
        void** frame = reinterpret_cast<void**>(top) - kFrameWords;
        std::fill(frame, frame + kFrameWords, nullptr);
        frame[kReturnWord] = reinterpret_cast<void*>(&fiber_main);
        sp = frame;
    }
};

void swap(Context& from, Context& to) { simt_swap_stacks(&from.sp, to.sp); }

#endif

struct Fiber {
    Context context;
    // For AddressSanitizer; switch_to fills in those of the OS thread's own stack.
    const void* stack = nullptr;
    std::size_t stack_bytes = 0;
    void* fake_stack = nullptr;
};

Fiber main_fiber;
Fiber* running = &main_fiber;
Fiber* previous = nullptr;

// The first thing that happens on a fiber after a switch to it.
void switched() {
#if SIMT_ASAN
    __sanitizer_finish_switch_fiber(running->fake_stack, &previous->stack, &previous->stack_bytes);
#endif
}

void switch_to(Fiber& to) {
    Fiber& from = *running;
    previous = &from;
    running = &to;
#if SIMT_ASAN
    __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
#endif
    swap(from.context, to.context);
    switched();
}

#if SIMT_ASAN
constexpr std::size_t kStackBytes = 256 * 1024;
#else
constexpr std::size_t kStackBytes = 64 * 1024;
#endif

class PooledFiber : public Fiber {
  public:
    PooledFiber() {
        const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
        bytes_ = kStackBytes + page;
        void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
        memory_ = static_cast<char*>(memory);
        mprotect(memory_, page, PROT_NONE);  // stacks grow down
        stack = memory_ + page;
        stack_bytes = kStackBytes;
        context.prepare(memory_ + page, memory_ + bytes_);
    }
    PooledFiber(const PooledFiber&) = delete;
    ~PooledFiber() { munmap(memory_, bytes_); }

  private:
    char* memory_;
    std::size_t bytes_;
};

std::vector<std::unique_ptr<PooledFiber>> fibers;
std::vector<Fiber*> idle_fibers;

Fiber* take_fiber() {
    if (idle_fibers.empty()) {
        idle_fibers.reserve(fibers.size() + 1);  // room for all, so that giving back never throws
        fibers.push_back(std::make_unique<PooledFiber>());
        return fibers.back().get();
    }
    Fiber* fiber = idle_fibers.back();
    idle_fibers.pop_back();
    return fiber;
}

constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kWarp = 32;

unsigned lowest(std::uint64_t bits) { return static_cast<unsigned>(std::countr_zero(bits)); }

template <class F> void each_lane(unsigned lanes, F f) {
    for (; lanes; lanes &= lanes - 1) f(lowest(lanes));
}

// A set of threads, by priority: the scheduler takes the first.
class Set {
  public:
    void insert(unsigned i) { words_[i / 64] |= 1ull << i % 64; }
    void erase(unsigned i) { words_[i / 64] &= ~(1ull << i % 64); }
    bool contains(unsigned i) const { return words_[i / 64] >> i % 64 & 1; }
    unsigned first() const {
        for (unsigned w = 0; w < kWords; ++w) {
            if (words_[w]) return w * 64 + lowest(words_[w]);
        }
        return kNone;
    }
    static constexpr unsigned kNone = ~0u;

  private:
    static constexpr unsigned kWords = kMaxThreads / 64;
    std::array<std::uint64_t, kWords> words_{};
};

struct Thread {
    uint3 index;
    unsigned number;
    unsigned priority;
    Fiber* fiber;  // null until it starts
    // What it waits for, and its part in a warp's collective.
    Op op;
    unsigned mask;
    Site site;
    unsigned source;
    std::uint64_t value;
    std::uint64_t result;
};

// Lanes that have come to the same collective.
struct Meeting {
    Op op;
    unsigned mask;
    unsigned arrived;
};

struct Warp {
    unsigned lanes;  // those that the block has
    unsigned meetings;
    std::array<Meeting, kWarp> meeting;
};

struct Barrier {
    unsigned arrived;
    Site site;
    bool mixed;  // threads have come to different __syncthreads
};

std::vector<Thread> threads;
std::vector<Warp> warps;
std::vector<unsigned> thread_order;  // by priority
Thread* current = nullptr;
Set live, ready;
unsigned live_count;
Barrier barrier;
std::exception_ptr error;  // ends the block: its threads are unwound
void (*kernel_body)(const void*);
const void* kernel_context;
void* dynamic_memory = nullptr;

struct Cancelled {};

std::string hex(unsigned v) {
    std::string digits;
    for (int shift = 28; shift >= 0; shift -= 4) digits += "0123456789abcdef"[v >> shift & 15];
    return "0x" + digits;
}

std::string text(uint3 v) {
    return "(" + std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z) + ")";
}

std::string text(Site site) { return std::string(site.file) + ":" + std::to_string(site.line); }

// "thread 3", "threads 0-7, 9"
std::string text(const std::vector<unsigned>& numbers) {
    std::string list;
    for (std::size_t i = 0; i < numbers.size();) {
        std::size_t end = i + 1;
        while (end < numbers.size() && numbers[end] == numbers[end - 1] + 1) ++end;
        if (i) list += ", ";
        list += std::to_string(numbers[i]);
        if (end - i > 1) list += "-" + std::to_string(numbers[end - 1]);
        i = end;
    }
    return (numbers.size() == 1 ? "thread " : "threads ") + list;
}

std::string text(Op op, unsigned mask) {
    static constexpr const char* names[] = {"__syncthreads",  "__syncwarp",       "__shfl_sync",
                                            "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync",
                                            "__ballot_sync",  "__any_sync",       "__all_sync"};
    std::string name = names[static_cast<int>(op)];
    return op == Op::syncthreads ? name : name + " with mask " + hex(mask);
}

bool same(Site a, Site b) {
    return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

[[noreturn]] void misuse(Op op, unsigned mask, Site site, const std::string& what) {
    throw std::runtime_error("simt: block " + text(blockIdx) + ", thread " + std::to_string(current->number) +
                             " " + text(current->index) + ": " + text(op, mask) + " at " + text(site) + ": " +
                             what);
}

// All live threads wait: who for what, and why that does not come.
std::string deadlock() {
    struct Group {
        const Thread* first;
        std::vector<unsigned> members;
    };
    std::vector<Group> groups;
    for (const Thread& t : threads) {
        if (!live.contains(t.priority)) continue;
        const auto found = std::find_if(groups.begin(), groups.end(), [&](const Group& g) {
            const Thread& f = *g.first;
            return f.op == t.op && same(f.site, t.site) &&
                   (t.op == Op::syncthreads || (f.mask == t.mask && f.number / kWarp == t.number / kWarp));
        });
        if (found == groups.end()) {
            groups.push_back({&t, {t.number}});
        } else {
            found->members.push_back(t.number);
        }
    }

    std::string report = "simt: deadlock in block " + text(blockIdx) + ":";
    for (const Group& g : groups) {
        const Thread& f = *g.first;
        report += "\n  " + text(g.members) + " " + text(f.index) +
                  (g.members.size() == 1 ? " waits at " : "... wait at ") + text(f.op, f.mask) + " at " +
                  text(f.site);
        if (f.op == Op::syncthreads) continue;
        std::vector<unsigned> exited, elsewhere;
        const unsigned warp = f.number / kWarp;
        each_lane(f.mask & warps[warp].lanes, [&](unsigned lane) {
            const Thread& t = threads[warp * kWarp + lane];
            if (!live.contains(t.priority)) {
                exited.push_back(t.number);
            } else if (t.op != f.op || t.mask != f.mask) {
                elsewhere.push_back(t.number);
            }
        });
        if (!exited.empty()) report += "; of its mask, " + text(exited) + " exited";
        if (!elsewhere.empty()) report += "; of its mask, " + text(elsewhere) + " at another place";
    }
    return report;
}

// Ends the block: the threads that have started are resumed once more, to unwind.
void cancel(std::exception_ptr reason) {
    if (error) return;
    error = std::move(reason);
    ready = Set();
    for (const Thread& t : threads) {
        if (!live.contains(t.priority)) continue;
        if (t.fiber) {
            ready.insert(t.priority);
        } else {
            live.erase(t.priority);
            --live_count;
        }
    }
}

// The thread to run next; null when all have exited.
Thread* pick() {
    if (live_count == 0) return nullptr;
    unsigned p = ready.first();
    if (p == Set::kNone) {
        cancel(std::make_exception_ptr(std::runtime_error(deadlock())));
        p = ready.first();
    }
    ready.erase(p);
    return &threads[thread_order[p]];
}

void set_current(Thread& t) {
    current = &t;
    detail::thread_index = t.index;
}

void resume(Thread& t) {
    if (!t.fiber) t.fiber = take_fiber();
    set_current(t);
    switch_to(*t.fiber);
}

// Notes what the running thread is about to wait for.
Thread& await(Op op, unsigned mask, Site site) {
    if (error) throw Cancelled();  // again: the kernel has caught the first
    current->op = op;
    current->mask = mask;
    current->site = site;
    return *current;
}

// Runs others until this thread is ready and has its turn.
void suspend() {
    Thread& self = *current;
    Thread* next = pick();
    if (next != &self) resume(*next);
    if (error) throw Cancelled();
}

void release_barrier_if_complete() {
    if (barrier.arrived < live_count || barrier.mixed) return;
    barrier.arrived = 0;
    ready = live;
}

void fiber_main() {
    switched();
    for (;;) {
        Thread& self = *current;
        std::exception_ptr thrown;
        try {
            kernel_body(kernel_context);
        } catch (const Cancelled&) {
        } catch (...) {
            thrown = std::current_exception();
        }

        live.erase(self.priority);
        --live_count;
        if (thrown) cancel(std::move(thrown));
        if (!error && live_count > 0 && barrier.arrived > 0) release_barrier_if_complete();

        Thread* next = pick();
        if (next && !next->fiber) {
            next->fiber = self.fiber;
            set_current(*next);
            continue;
        }
        idle_fibers.push_back(self.fiber);
        if (next) {
            resume(*next);
        } else {
            switch_to(main_fiber);
        }
    }
}

void run_block() {
    live = Set();
    for (Thread& t : threads) {
        t.fiber = nullptr;
        live.insert(t.priority);
    }
    ready = live;
    live_count = static_cast<unsigned>(threads.size());
    for (Warp& w : warps) w.meetings = 0;
    barrier = {};
    resume(*pick());
    current = nullptr;
    if (error) std::rethrow_exception(std::exchange(error, nullptr));
}

// FASTKD_SIMT_ORDER, with FASTKD_SIMT_SEED for the random one: the order in which blocks run, and
// the priority of threads.
class Order {
  public:
    Order() {
        const char* name = std::getenv("FASTKD_SIMT_ORDER");
        const std::string_view order = name && *name ? name : "forward";
        reverse_ = order == "reverse";
        random_ = order == "random";
        if (!reverse_ && !random_ && order != "forward") {
            throw std::invalid_argument("simt: FASTKD_SIMT_ORDER is forward, reverse or random");
        }
        if (const char* seed = std::getenv("FASTKD_SIMT_SEED")) state_ += std::strtoull(seed, nullptr, 10);
    }

    bool random() const { return random_; }

    void arrange(std::vector<unsigned>& items) {
        std::iota(items.begin(), items.end(), 0u);
        if (reverse_) std::reverse(items.begin(), items.end());
        if (!random_) return;
        for (std::size_t n = items.size(); n > 1; --n) std::swap(items[n - 1], items[below(n)]);
    }

  private:
    std::size_t below(std::size_t n) {  // splitmix64
        std::uint64_t z = state_ += 0x9e3779b97f4a7c15u;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
        z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        return static_cast<std::size_t>((z ^ z >> 31) % n);
    }

    bool reverse_, random_;
    std::uint64_t state_ = 0;
};

void prioritize(Order& order) {
    order.arrange(thread_order);
    for (unsigned p = 0; p < thread_order.size(); ++p) threads[thread_order[p]].priority = p;
}

uint3 position(unsigned number, dim3 size) {
    return {number % size.x, number / size.x % size.y, number / size.x / size.y};
}

std::unordered_map<const void*, int>& shared_limits() {
    static std::unordered_map<const void*, int> limits;
    return limits;
}

cudaError_t check(const void* kernel, dim3 grid, dim3 block, std::size_t shared_bytes) {
    const auto product = [](dim3 d) { return std::uint64_t{d.x} * d.y * d.z; };
    if (block.x > 1024 || block.y > 1024 || block.z > 64 || grid.x > 0x7fffffff || grid.y > 65535 ||
        grid.z > 65535 || product(block) == 0 || product(block) > kMaxThreads || product(grid) == 0) {
        return cudaErrorInvalidConfiguration;
    }
    const auto limit = shared_limits().find(kernel);
    const int allowed = limit == shared_limits().end() ? detail::kSharedDefault : limit->second;
    return shared_bytes > static_cast<std::size_t>(allowed) ? cudaErrorInvalidValue : cudaSuccess;
}

constexpr std::align_val_t kSharedAlignment{128};

struct SharedMemory {
    explicit SharedMemory(std::size_t size) : bytes(size) {
        // Of this very size, so that AddressSanitizer sees what reaches past it.
        if (bytes) dynamic_memory = ::operator new(bytes, kSharedAlignment);
    }
    SharedMemory(const SharedMemory&) = delete;
    ~SharedMemory() {
        if (dynamic_memory) ::operator delete(dynamic_memory, kSharedAlignment);
        dynamic_memory = nullptr;
    }
    void spoil() const {
        if (bytes) std::memset(dynamic_memory, 0xA5, bytes);
    }

    std::size_t bytes;
};

}  // namespace

void* dynamic_shared() { return dynamic_memory; }

namespace detail {

void run(const void* kernel, dim3 grid, dim3 block, std::size_t shared_bytes, void (*body)(const void*),
         const void* context) {
    static std::recursive_mutex mutex;  // recursive, so that a nested launch gets to the check below
    const std::lock_guard lock(mutex);
    if (current) throw std::logic_error("simt: a kernel cannot launch a kernel");
    if (const auto refused = check(kernel, grid, block, shared_bytes); refused != cudaSuccess) {
        fail(refused);
        return;
    }

    Order order;
    const SharedMemory shared(shared_bytes);
    kernel_body = body;
    kernel_context = context;
    grid_size = grid;
    block_size = block;

    const unsigned count = block.x * block.y * block.z;
    threads.resize(count);
    thread_order.resize(count);
    warps.resize((count + kWarp - 1) / kWarp);
    for (unsigned i = 0; i < count; ++i) {
        threads[i].number = i;
        threads[i].index = position(i, block);
    }
    for (unsigned w = 0; w < warps.size(); ++w) {
        const unsigned rest = count - w * kWarp;
        warps[w].lanes = rest < kWarp ? (1u << rest) - 1 : ~0u;
    }
    prioritize(order);

    std::vector<unsigned> blocks(std::size_t{grid.x} * grid.y * grid.z);
    order.arrange(blocks);
    for (const unsigned b : blocks) {
        block_index = position(b, grid);
        shared.spoil();
        if (order.random()) prioritize(order);
        run_block();
    }
}

cudaError_t allow_shared(const void* kernel, int bytes) {
    if (bytes < 0 || bytes > kSharedOptin) return fail(cudaErrorInvalidValue);
    shared_limits()[kernel] = std::max(bytes, kSharedDefault);
    return cudaSuccess;
}

unsigned lane() { return current->number % kWarp; }

Segment segment(Op op, unsigned mask, int width, Site site) {
    const auto w = static_cast<unsigned>(width);
    if (w == 0 || w > kWarp || (w & (w - 1))) {
        misuse(op, mask, site, "the width " + std::to_string(width) + " is no power of two up to 32");
    }
    return {lane(), lane() & ~(w - 1), lane() | (w - 1)};
}

void syncthreads(Site site) {
    await(Op::syncthreads, 0, site);
    if (barrier.arrived == 0) {
        barrier.site = site;
        barrier.mixed = false;
    } else if (!same(site, barrier.site)) {
        barrier.mixed = true;
    }
    ++barrier.arrived;
    release_barrier_if_complete();
    suspend();
}

std::uint64_t collective(Op op, unsigned mask, std::uint64_t value, unsigned source, Site site) {
    Thread& self = await(op, mask, site);
    self.value = value;
    self.source = source;

    Warp& warp = warps[self.number / kWarp];
    const unsigned lane = self.number % kWarp;
    // Lanes that the block does not have are not waited for: the default mask of __syncwarp names
    // them in a block of, say, 48 threads.
    const unsigned awaited = mask & warp.lanes;
    if (!(awaited >> lane & 1)) {
        misuse(op, mask, site, "the mask does not name the calling lane " + std::to_string(lane));
    }
    if (!(awaited >> source & 1)) {
        misuse(op, mask, site,
               "lane " + std::to_string(lane) + " reads lane " + std::to_string(source) +
                   ", which the mask does not name or the block does not have");
    }

    const auto end = warp.meeting.begin() + warp.meetings;
    const auto meeting = std::find_if(warp.meeting.begin(), end,
                                      [&](const Meeting& m) { return m.op == op && m.mask == mask; });
    if (meeting == end) {
        *meeting = {op, mask, 0};
        ++warp.meetings;
    }
    meeting->arrived |= 1u << lane;

    if (meeting->arrived == awaited) {
        *meeting = warp.meeting[--warp.meetings];
        // The last to come works out every lane's result, since a lane that goes on may overwrite
        // its value before another has read it.
        Thread* const lanes = &threads[self.number - lane];
        const bool vote = op == Op::ballot || op == Op::any || op == Op::all;
        std::uint64_t ballot = 0;
        if (vote) each_lane(awaited, [&](unsigned i) { ballot |= lanes[i].value << i; });
        each_lane(awaited, [&](unsigned i) {
            lanes[i].result = vote ? ballot : lanes[lanes[i].source].value;
            ready.insert(lanes[i].priority);
        });
    }
    suspend();
    return self.result;
}

}  // namespace detail
}  // namespace simt
