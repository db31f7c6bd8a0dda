// Registers host functions, by the subject.
#pragma once

#include "proxy/emulated/kernels.h"

namespace mnemosyne::torch_kernels {

using proxy::emulated::RegisterKernel;

void addArithmetic(RegisterKernel* add_to);
void addAttention(RegisterKernel* add_to);
void addComparisons(RegisterKernel* add_to);
void addCopies(RegisterKernel* add_to);
void addDropout(RegisterKernel* add_to);
void addForeach(RegisterKernel* add_to);
void addIndexing(RegisterKernel* add_to);
void addLayerNorm(RegisterKernel* add_to);
void addLoss(RegisterKernel* add_to);
void addRandom(RegisterKernel* add_to);
void addReductions(RegisterKernel* add_to);
void addSoftmax(RegisterKernel* add_to);
void addSorting(RegisterKernel* add_to);
void addUnary(RegisterKernel* add_to);

}  // namespace mnemosyne::torch_kernels
