#include "proxy/device_claim.h"

#include <sys/socket.h>
#include <sys/un.h>

#include <cstddef>
#include <cstdio>
#include <cstring>
#include <string>

namespace mnemosyne::proxy {

Fd claimDevice(const DeviceUuid& uuid) {
  std::string name = "mnemosyne-device-";
  for (const std::byte byte : uuid) {
    char text[3];
    std::snprintf(text, sizeof text, "%02x", std::to_integer<unsigned>(byte));
    name += text;
  }
  // The first byte stays 0: a name that is no file's, and goes with the socket.
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path + 1, name.data(), name.size());
  const size_t size = offsetof(sockaddr_un, sun_path) + 1 + name.size();
  Fd claim =
      Fd::make([] { return socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0); });
  const auto* to = reinterpret_cast<const sockaddr*>(&address);
  if (claim && bind(claim.get(), to, size) != 0) claim.reset();
  return claim;
}

}  // namespace mnemosyne::proxy
