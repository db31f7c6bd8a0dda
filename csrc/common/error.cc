#include "common/error.h"

#include <cerrno>
#include <system_error>

namespace mnemosyne {

void throwErrno(const std::string& what) {
  throw std::system_error(errno, std::generic_category(), what);
}

}  // namespace mnemosyne
