#include "ccl/algorithms.h"
#include "ccl/turn.h"

namespace mnemosyne::ccl {

Task sendMessage(Operation& op) {
  Transfer out;
  out.send(op, op.root, op.tag, op.inputs[0].data, op.inputs[0].size);
  co_await out;
}

Task receiveMessage(Operation& op) {
  Turn turn(op, op.kind == Kind::kRecvAny ? -1 : op.root);
  co_await turn;
  op.source_rank = turn.source();
  Transfer in;
  in.recv(op, turn.source(), op.tag, op.outputs[0].data, op.outputs[0].size);
  co_await in;
}

}  // namespace mnemosyne::ccl
