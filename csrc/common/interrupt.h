// How a long call ends early: the thread that called asks a hook now and then, whose exception leaves the
// call; the other threads then begin nothing more.
#pragma once

#include <atomic>
#include <exception>

namespace fastkd {

// Throws where the call is to end; null where nobody asks. It is set before the first call.
extern void (*interrupt_hook)();

namespace cpu {

// Called between pieces of work, on any thread of a loop; throws where it is to end. It looks at the clock,
// which is nothing to a piece of 10 microseconds or more.
void poll();
// The same between shorter ones: it is poll() every 16th time.
void poll_often();

// A loop whose blocks several threads take.
class Loop {
  public:
    Loop();
    ~Loop();
    bool ended() const { return ended_.load(std::memory_order_relaxed); }
    void end() noexcept;  // keeps the exception that is being handled, if it is the first one
    void rethrow();       // the exception that was kept, after the loop

    // While a thread is in a block, poll() looks at its loop.
    class Block {
      public:
        explicit Block(const Loop&);
        ~Block();
        Block(const Block&) = delete;
        Block& operator=(const Block&) = delete;
    };

  private:
    const void* caller_;  // identifies the thread that called
    std::atomic<bool> ended_{false}, kept_{false};
    std::exception_ptr exception_;
};

}  // namespace cpu
}  // namespace fastkd
