#include "proxy/forward.h"
namespace mnemosyne::proxy {
bool executeGenerated(uint16_t, CommandReader&, GeneratedContext&) { return false; }
}
