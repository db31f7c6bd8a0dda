// PTX: the assembly text that the driver compiles where no cubin suits.
#pragma once

#include <string_view>

#include "proxy/fat_binary.h"

namespace mnemosyne::proxy {

// The parameters lie as the driver will lay them for this device.
KernelTable readPtx(std::string_view text, int compute_capability);

}  // namespace mnemosyne::proxy
