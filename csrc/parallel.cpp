#include "parallel.h"

#include <algorithm>
#include <atomic>
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
    int64_t count;
    const std::function<void(int64_t)>* task;
};

void drain(void* argument) {
    auto* work = static_cast<Work*>(argument);
    for (int64_t i = work->next++; i < work->count; i = work->next++) (*work->task)(i);
}

}  // namespace

void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& task) {
    Work work;
    work.count = count;
    work.task = &task;
    const auto used = static_cast<unsigned>(std::min<int64_t>(count, std::max(threads, 1)));
    if (used <= 1) return drain(&work);
    static const GompParallel torch_pool = find_torch_pool();
    if (torch_pool != nullptr) return torch_pool(drain, &work, used, 0);
    std::vector<std::thread> helpers;
    for (unsigned i = 1; i < used; ++i) helpers.emplace_back(drain, &work);
    drain(&work);
    for (auto& helper : helpers) helper.join();
}

}  // namespace switch_moe
