// The kernels of vector_add.cu and mlp.cu as functions of the host, for the
// emulated device. Each gets the grid, then what the kernel gets; memory of the
// device is memory of the host there.
#include "proxy/emulated/kernels.h"

namespace {

using mnemosyne::proxy::emulated::forEachThread;
using mnemosyne::proxy::emulated::Launch;
using mnemosyne::proxy::emulated::onHost;
using mnemosyne::proxy::emulated::RegisterKernel;

// Calls body(i) with what a kernel gets out of blockIdx.x, blockDim.x and
// threadIdx.x, as far as there is work.
template <typename Body>
void forEachIndex(const Launch& launch, int count, Body&& body) {
  const int most = static_cast<int>(launch.grid.x * launch.block.x);
  for (int i = 0; i < count && i < most; ++i) body(i);
}

void add(const Launch& launch, const float* a, const float* b, float* sum,
         int count) {
  forEachIndex(launch, count, [&](int i) { sum[i] = a[i] + b[i]; });
}

struct Affine {
  signed char sign;
  double factor;
  float offset;
};
void transform(const Launch& launch, float* values, Affine by, int count) {
  forEachIndex(launch, count, [&](int i) {
    values[i] = static_cast<float>(by.sign) * static_cast<float>(by.factor) *
                    values[i] +
                by.offset;
  });
}

struct Table {
  float values[1200];
};
void lookUp(const Launch& launch, float* values, Table table, int count) {
  forEachIndex(launch, count,
               [&](int i) { values[i] = table.values[i % 1200]; });
}

void fill(const Launch& launch, int* values, int value, int count) {
  forEachIndex(launch, count, [&](int i) { values[i] = value; });
}

void sumBlocks(const Launch& launch, const int* values, int* sums, int count) {
  const int threads = static_cast<int>(launch.block.x);
  if (launch.shared_bytes < launch.block.x * sizeof(int)) {
    return launch.fail(mnemosyne::proxy::kCudaIllegalAddress);
  }
  for (int block = 0; block < static_cast<int>(launch.grid.x); ++block) {
    sums[block] = 0;
    for (int i = block * threads; i < (block + 1) * threads && i < count; ++i) {
      sums[block] += values[i];
    }
  }
}

void nothing(const Launch&) {}

void matmul(const Launch& launch, const float* a, const float* b,
            float* product, int rows, int inner, int columns,
            bool is_a_transposed, bool is_b_transposed) {
  forEachThread(launch, [&](auto block, auto thread) {
    const int row = static_cast<int>(block.y * launch.block.y + thread.y);
    const int column = static_cast<int>(block.x * launch.block.x + thread.x);
    if (row >= rows || column >= columns) return;
    float sum = 0;
    for (int k = 0; k < inner; ++k) {
      sum +=
          (is_a_transposed ? a[k * rows + row] : a[row * inner + k]) *
          (is_b_transposed ? b[column * inner + k] : b[k * columns + column]);
    }
    product[row * columns + column] = sum;
  });
}

void addBias(const Launch& launch, float* values, const float* bias, int rows,
             int columns, bool is_rectified) {
  forEachIndex(launch, rows * columns, [&](int i) {
    const float value = values[i] + bias[i % columns];
    values[i] = is_rectified && value < 0 ? 0 : value;
  });
}

void meanSquare(const Launch&, const float* output, const float* target,
                float* loss, int count) {
  float sum = 0;
  for (int i = 0; i < count; ++i) {
    sum += (output[i] - target[i]) * (output[i] - target[i]);
  }
  *loss = sum / static_cast<float>(count);
}

void meanSquareBackward(const Launch& launch, const float* output,
                        const float* target, float* gradient, int count) {
  forEachIndex(launch, count, [&](int i) {
    gradient[i] = 2 * (output[i] - target[i]) / static_cast<float>(count);
  });
}

void rectifyBackward(const Launch& launch, float* gradient,
                     const float* activation, int count) {
  forEachIndex(launch, count, [&](int i) {
    if (activation[i] == 0) gradient[i] = 0;
  });
}

void sumColumns(const Launch& launch, const float* values, float* sums,
                int rows, int columns) {
  forEachIndex(launch, columns, [&](int column) {
    sums[column] = 0;
    for (int row = 0; row < rows; ++row) {
      sums[column] += values[row * columns + column];
    }
  });
}

void descend(const Launch& launch, float* weights, const float* gradients,
             float rate, int count) {
  forEachIndex(launch, count,
               [&](int i) { weights[i] -= rate * gradients[i]; });
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void
mnemosyne_register_kernels(RegisterKernel* registerKernel) {
  registerKernel("_Z3addPKfS0_Pfi", onHost<add>);
  registerKernel("_Z9transformPf6Affinei", onHost<transform>);
  registerKernel("_Z6lookUpPf5Tablei", onHost<lookUp>);
  registerKernel("_Z4fillIiEvPT_S0_i", onHost<fill>);
  registerKernel("_Z9sumBlocksPKiPii", onHost<sumBlocks>);
  registerKernel("_Z7nothingv", onHost<nothing>);
  registerKernel("_Z6matmulPKfS0_Pfiiibb", onHost<matmul>);
  registerKernel("_Z7addBiasPfPKfiib", onHost<addBias>);
  registerKernel("_Z10meanSquarePKfS0_Pfi", onHost<meanSquare>);
  registerKernel("_Z18meanSquareBackwardPKfS0_Pfi", onHost<meanSquareBackward>);
  registerKernel("_Z15rectifyBackwardPfPKfi", onHost<rectifyBackward>);
  registerKernel("_Z10sumColumnsPKfPfii", onHost<sumColumns>);
  registerKernel("_Z7descendPfPKffi", onHost<descend>);
}
