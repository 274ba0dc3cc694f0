#include "common/interrupt.h"

#include <chrono>

namespace fastkd {

void (*interrupt_hook)() = nullptr;

namespace cpu {
namespace {

using Clock = std::chrono::steady_clock;
// Between calls of the hook, which may wait for a lock.
constexpr auto kInterval = std::chrono::milliseconds(200);

struct Thread {
    const Loop* loop = nullptr;  // in which it helps; the thread that called has none
    unsigned polls = 0;
    Clock::time_point next{};
};
thread_local Thread self;

struct Ended {};  // leaves a block of a loop that has ended

}  // namespace

void poll() {
    Thread& thread = self;
    if (thread.loop) {
        if (thread.loop->ended()) throw Ended{};
        return;
    }
    if (!interrupt_hook) return;
    const auto now = Clock::now();
    if (now < thread.next) return;
    thread.next = now + kInterval;
    interrupt_hook();
}

void poll_often() {
    if (++self.polls % 16 == 0) poll();
}

Loop::Loop() : caller_(&self) {}
Loop::~Loop() = default;

void Loop::end() noexcept {
    if (!kept_.exchange(true)) exception_ = std::current_exception();
    ended_.store(true, std::memory_order_relaxed);
}

void Loop::rethrow() {
    if (exception_) std::rethrow_exception(exception_);
}

Loop::Block::Block(const Loop& loop) {
    if (loop.caller_ == &self) poll_often();
    else self.loop = &loop;
}
Loop::Block::~Block() { self.loop = nullptr; }

}  // namespace cpu
}  // namespace fastkd
