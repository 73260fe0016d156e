// parallel_for: every task runs once; an exception comes out when no task runs any more, on every pool.

#include <atomic>
#include <cstdio>
#include <new>
#include <thread>
#include <vector>

#include "parallel.h"

namespace {

int failures = 0;

void expect(bool right, const char* what, int threads) {
    if (right) return;
    std::printf("%s, with %d threads\n", what, threads);
    ++failures;
}

void check(int threads) {
    constexpr int kTasks = 64;
    std::vector<std::atomic<int>> runs(kTasks);
    switch_moe::parallel_for(kTasks, threads, [&](int64_t i) { ++runs[i]; });
    for (auto& count : runs) expect(count == 1, "a task did not run once", threads);

    for (int failing = 0; failing < kTasks; ++failing) {
        std::atomic<int> running{0}, throwing{0};
        bool caught = false;
        try {
            switch_moe::parallel_for(kTasks, threads, [&](int64_t i) {
                ++running;
                std::this_thread::yield();
                --running;
                if (i >= failing) {  // several threads throw
                    ++throwing;
                    throw std::bad_alloc();
                }
            });
        } catch (const std::bad_alloc&) {
            caught = true;
        }
        const int before = throwing;
        std::this_thread::yield();
        expect(caught, "no exception came out", threads);
        expect(running == 0 && throwing == before, "a task ran after the exception", threads);
        expect(before >= 1 && before <= threads, "tasks began after one had failed", threads);
    }
}

}  // namespace

int main() {
    for (int threads : {1, 2, 4}) check(threads);
    return failures == 0 ? 0 : 1;
}
