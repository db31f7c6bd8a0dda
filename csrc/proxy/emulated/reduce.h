// Reductions over the ranks, in the order of the ranks, so that all of them get
// the same bits.
#pragma once

#include <cstddef>
#include <vector>

namespace mnemosyne::proxy::emulated {

// ncclDataType_t; 0 for a number that is none.
size_t ncclTypeBytes(int type);

enum ReduceOp : int {  // ncclRedOp_t
  kSum = 0,
  kProduct = 1,
  kMaximum = 2,
  kMinimum = 3,
  kAverage = 4,
};

// Whether elements of the type can be reduced, and not only moved.
bool isReducible(int type);

// to[i] = inputs[0][i] op inputs[1][i] op ..., for `count` elements. `to` may
// be one of the inputs. Halves are added up in float and rounded once.
void reduce(int type, int op, const std::vector<const std::byte*>& inputs,
            std::byte* to, size_t count);

// to[i] = from[i] * *factor, all of the type.
void scale(int type, const std::byte* factor, const std::byte* from,
           std::byte* to, size_t count);

}  // namespace mnemosyne::proxy::emulated
