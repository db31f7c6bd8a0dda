// A cubin: the ELF file that ptxas makes for one kind of device.
#pragma once

#include <cstddef>
#include <span>

#include "proxy/fat_binary.h"

namespace mnemosyne::proxy {

KernelTable readCubin(std::span<const std::byte> cubin);

// Where it ends, by its own headers. Requires: they are readable.
size_t sizeOfCubin(const std::byte* cubin);

}  // namespace mnemosyne::proxy
