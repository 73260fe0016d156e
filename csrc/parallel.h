// parallel_for: run independent tasks on the threads that torch already has.
#pragma once

#include <cstdint>
#include <functional>

namespace switch_moe {

// Calls task(i) once for every i in [0, count), on up to `threads` threads. The order is unspecified, so a
// task writes only to what it owns. Where a task throws, the rest may be left out, and the first exception is
// thrown again when no thread runs a task any more.
void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& task);

}  // namespace switch_moe
