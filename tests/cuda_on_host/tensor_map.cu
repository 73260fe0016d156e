// Makes a tensor map with hopper.h as nvcc compiles it; tensor_map_driver.cpp is the driver.
#include <cstdio>
#include <exception>

#include "hopper.h"

int main() {
    auto* address = reinterpret_cast<const void*>(uintptr_t{0x7000});
    try {
        hopper::tensor_map(address, {40, 30, 20}, {80, 2400}, {32, 16, 1}, hopper::Swizzle::k64);
        hopper::tensor_map(address, {64, 8}, {128}, {64, 4}, hopper::Swizzle::k128);
        hopper::tensor_map(address, {64, 8}, {120}, {64, 4}, hopper::Swizzle::k128);
    } catch (const std::exception& error) {
        std::printf("%s\n", error.what());
    }
}
