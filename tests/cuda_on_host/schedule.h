// How the tests hand over a schedule and take back what went wrong.
#pragma once

#include <string>

#include "hopper.h"

inline hopper::Schedule schedule_of(const int* given) {
    auto when = [&](int i) { return static_cast<hopper::When>(given[i]); };
    return {
        when(0), when(1), when(2), given[3], given[4] != 0, given[5] != 0, static_cast<uint32_t>(given[6]),
        given[7]};
}

// What the function throws, or null.
template <typename Function>
const char* fault_of(Function function) {
    static std::string fault;
    try {
        function();
    } catch (const std::exception& error) {
        fault = error.what();
        return fault.c_str();
    }
    return nullptr;
}
