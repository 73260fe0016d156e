// Functions that take turns on one thread of the host, each with a stack of its own.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>
#include <memory>

// Entered by makecontext, switched by setjmp, which unlike swapcontext makes no system call.
class Fiber {
  public:
    // The depth at which the stack starts differs by `offset` bytes: stacks that all start at the same offset
    // from a large power of two would contend for the same lines of the cache.
    explicit Fiber(size_t stack_bytes = size_t{1} << 18, size_t offset = 0)
        : stack_(new char[stack_bytes]), stack_bytes_(stack_bytes - offset) {}

    // The next resume enters `function`.
    void start(void (*function)()) {
        function_ = function;
        entered_ = finished_ = false;
    }

    // Runs the function until it yields or ends.
    void resume() {
        running_ = this;
        if (_setjmp(resumer_) == 0) {
            if (entered_) _longjmp(here_, 1);
            entered_ = true;
            getcontext(&context_);
            context_.uc_stack.ss_sp = stack_.get();
            context_.uc_stack.ss_size = stack_bytes_;
            context_.uc_link = nullptr;
            makecontext(&context_, enter, 0);
            setcontext(&context_);
        }
    }

    // Back to who resumed the running fiber.
    static void yield() {
        if (_setjmp(running_->here_) == 0) _longjmp(resumer_, 1);
    }

    bool finished() const { return finished_; }

  private:
    static void enter() {
        running_->function_();
        running_->finished_ = true;
        _longjmp(resumer_, 1);
    }

    static inline Fiber* running_;
    static inline jmp_buf resumer_;

    std::unique_ptr<char[]> stack_;
    size_t stack_bytes_;
    void (*function_)() = nullptr;
    ucontext_t context_;
    jmp_buf here_;
    bool entered_ = false, finished_ = false;
};
