// What a worker of forked_world.h does.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mnemosyne::testing {

// Serves until it is told to end, or the test's process is gone.
[[noreturn]] void workerMain(int pipe, uint64_t id, bool use_shm);

// Of a blocking socket. What cannot be sent is dropped.
void sendWhole(int fd, const void* data, size_t size);
bool receiveWhole(int fd, void* data, size_t size);

}  // namespace mnemosyne::testing
