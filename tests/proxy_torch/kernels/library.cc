// What the emulated device calls when it has loaded this library.
#include <initializer_list>

#include "kernels.h"

using namespace mnemosyne::torch_kernels;

extern "C" __attribute__((visibility("default"))) void
mnemosyne_register_kernels(RegisterKernel* add_to) {
  for (auto* add :
       {addArithmetic, addAttention, addComparisons, addCopies, addDropout,
        addForeach, addIndexing, addLayerNorm, addLoss, addRandom,
        addReductions, addSoftmax, addSorting, addUnary}) {
    add(add_to);
  }
}
