#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

namespace switch_moe {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// torch keeps an OpenMP pool whose threads spin for a while after each of its own parallel regions. A second
// pool would fight those spinning threads for the cores. torch loads its OpenMP runtime into the global
// symbol scope, so its entry point is found by name, whatever the file is called; libiomp5 exports the same
// name.
GompParallel find_torch_pool() {
#if defined(__unix__) || defined(__APPLE__)
    return reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#else
    return nullptr;
#endif
}

struct Work {
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    int64_t count;
    const std::function<void(int64_t)>* task;
    std::exception_ptr error;  // the first one that a task threw
};

// An exception must not leave through the pool, which knows none, while other threads still use `work`. It is
// kept, and no further task begins.
void drain(void* argument) {
    auto* work = static_cast<Work*>(argument);
    for (int64_t i = work->next++; i < work->count && !work->failed; i = work->next++) {
        try {
            (*work->task)(i);
        } catch (...) {
            if (!work->failed.exchange(true)) work->error = std::current_exception();
        }
    }
}

void run_threads(Work* work, unsigned used) {
    std::vector<std::thread> helpers;
    try {
        helpers.reserve(used);
        for (unsigned i = 1; i < used; ++i) helpers.emplace_back(drain, work);
    } catch (
        const std::exception&) {  // no memory or no more threads: those that started, and this one, do it
    }
    drain(work);
    for (auto& helper : helpers) helper.join();
}

}  // namespace

void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& task) {
    Work work;
    work.count = count;
    work.task = &task;
    const auto used = static_cast<unsigned>(std::min<int64_t>(count, std::max(threads, 1)));
    static const GompParallel torch_pool = find_torch_pool();
    if (used <= 1) {
        drain(&work);
    } else if (torch_pool != nullptr) {
        torch_pool(drain, &work, used, 0);
    } else {
        run_threads(&work, used);
    }
    if (work.error) std::rethrow_exception(work.error);
}

}  // namespace switch_moe
