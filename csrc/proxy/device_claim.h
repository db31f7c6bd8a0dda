// Says to all programs under the proxy on this machine that a device is in use,
// so that none takes it for one that is gone.
#pragma once

#include "common/fd.h"
#include "proxy/protocol.h"

namespace mnemosyne::proxy {

// Holds for as long as the descriptor is open, which ends with the process.
// Nothing if another process holds it.
Fd claimDevice(const DeviceUuid& uuid);

}  // namespace mnemosyne::proxy
