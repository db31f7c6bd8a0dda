// Trains a small network by gradient descent, and prints the loss of each step
// and a hash of the weights: the same digits on each run, whatever happened to
// the device in between.
//
//   mlp [steps]
//
// Where the process has a device proxy, an error of the device costs one step:
// the proxy gets a new device, the program its weights, from a copy on the
// host.
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

__global__ void matmul(const float* a, const float* b, float* product, int rows,
                       int inner, int columns, bool is_a_transposed,
                       bool is_b_transposed) {
  const int row = blockIdx.y * blockDim.y + threadIdx.y;
  const int column = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= rows || column >= columns) return;
  float sum = 0;
  for (int k = 0; k < inner; ++k) {
    const float left = is_a_transposed ? a[k * rows + row] : a[row * inner + k];
    const float right =
        is_b_transposed ? b[column * inner + k] : b[k * columns + column];
    sum += left * right;
  }
  product[row * columns + column] = sum;
}

__global__ void addBias(float* values, const float* bias, int rows, int columns,
                        bool is_rectified) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= rows * columns) return;
  const float value = values[i] + bias[i % columns];
  values[i] = is_rectified && value < 0 ? 0 : value;
}

__global__ void meanSquare(const float* output, const float* target,
                           float* loss, int count) {
  float sum = 0;
  for (int i = 0; i < count; ++i) {
    sum += (output[i] - target[i]) * (output[i] - target[i]);
  }
  *loss = sum / count;
}

__global__ void meanSquareBackward(const float* output, const float* target,
                                   float* gradient, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) gradient[i] = 2 * (output[i] - target[i]) / count;
}

__global__ void rectifyBackward(float* gradient, const float* activation,
                                int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count && activation[i] == 0) gradient[i] = 0;
}

__global__ void sumColumns(const float* values, float* sums, int rows,
                           int columns) {
  const int column = blockIdx.x * blockDim.x + threadIdx.x;
  if (column >= columns) return;
  float sum = 0;
  for (int row = 0; row < rows; ++row) sum += values[row * columns + column];
  sums[column] = sum;
}

__global__ void descend(float* weights, const float* gradients, float rate,
                        int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) weights[i] -= rate * gradients[i];
}

namespace {

constexpr int kBatch = 32, kInputs = 24, kHidden = 48, kOutputs = 8;
constexpr int kWeights =
    kInputs * kHidden + kHidden + kHidden * kOutputs + kOutputs;
constexpr float kRate = 0.1f;

// From -1 to 1, the same everywhere.
std::vector<float> randomNumbers(int count, uint32_t seed, float scale) {
  std::vector<float> numbers(count);
  for (float& number : numbers) {
    seed = seed * 1664525u + 1013904223u;
    number = scale * (static_cast<int>(seed >> 8) - (1 << 23)) / (1 << 23);
  }
  return numbers;
}

// The parts of the network's weights, or of their gradients.
struct Layers {
  explicit Layers(float* at)
      : weights1(at),
        bias1(weights1 + kInputs * kHidden),
        weights2(bias1 + kHidden),
        bias2(weights2 + kHidden * kOutputs) {}
  float *weights1, *bias1, *weights2, *bias2;
};

#define TRY(call) \
  if (const cudaError_t error = (call); error != cudaSuccess) return error

class Training {
 public:
  Training()
      : inputs_(randomNumbers(kBatch * kInputs, 1, 1)),
        targets_(randomNumbers(kBatch * kOutputs, 2, 1)) {}

  cudaError_t allocate() {
    TRY(cudaStreamCreate(&stream_));
    for (const auto& [pointer, count] : {std::pair(&input_, kBatch * kInputs),
                                         {&target_, kBatch * kOutputs},
                                         {&weights_, kWeights},
                                         {&gradients_, kWeights},
                                         {&hidden_, kBatch * kHidden},
                                         {&hidden_gradient_, kBatch * kHidden},
                                         {&output_, kBatch * kOutputs},
                                         {&output_gradient_, kBatch * kOutputs},
                                         {&loss_, 1}}) {
      TRY(cudaMalloc(pointer, count * sizeof(float)));
    }
    TRY(cudaMallocHost(&saved_, kWeights * sizeof(float)));
    TRY(cudaMallocHost(&saving_, kWeights * sizeof(float)));
    TRY(cudaMallocHost(&last_loss_, sizeof(float)));
    const auto initial = randomNumbers(kWeights, 3, 0.3f);
    std::copy(initial.begin(), initial.end(), saved_);
    return cudaSuccess;
  }

  // All that the device must know before a step.
  cudaError_t upload() {
    TRY(toDevice(input_, inputs_.data(), kBatch * kInputs));
    TRY(toDevice(target_, targets_.data(), kBatch * kOutputs));
    TRY(toDevice(weights_, saved_, kWeights));
    return cudaStreamSynchronize(stream_);
  }

  cudaError_t step() {
    const Layers layer(weights_), gradient(gradients_);
    TRY(multiply(input_, layer.weights1, hidden_, kBatch, kInputs, kHidden));
    TRY(addBiasTo(hidden_, layer.bias1, kHidden, true));
    TRY(multiply(hidden_, layer.weights2, output_, kBatch, kHidden, kOutputs));
    TRY(addBiasTo(output_, layer.bias2, kOutputs, false));

    constexpr int kValues = kBatch * kOutputs;
    meanSquare<<<1, 1, 0, stream_>>>(output_, target_, loss_, kValues);
    TRY(cudaGetLastError());
    meanSquareBackward<<<blocks(kValues), 64, 0, stream_>>>(
        output_, target_, output_gradient_, kValues);
    TRY(cudaGetLastError());

    TRY(multiply(hidden_, output_gradient_, gradient.weights2, kHidden, kBatch,
                 kOutputs, true));
    TRY(sumUp(output_gradient_, gradient.bias2, kOutputs));
    TRY(multiply(output_gradient_, layer.weights2, hidden_gradient_, kBatch,
                 kOutputs, kHidden, false, true));
    rectifyBackward<<<blocks(kBatch * kHidden), 64, 0, stream_>>>(
        hidden_gradient_, hidden_, kBatch * kHidden);
    TRY(cudaGetLastError());
    TRY(multiply(input_, hidden_gradient_, gradient.weights1, kInputs, kBatch,
                 kHidden, true));
    TRY(sumUp(hidden_gradient_, gradient.bias1, kHidden));
    descend<<<blocks(kWeights), 64, 0, stream_>>>(weights_, gradients_, kRate,
                                                  kWeights);
    TRY(cudaGetLastError());

    TRY(toHost(last_loss_, loss_, 1));
    TRY(toHost(saving_, weights_, kWeights));
    TRY(cudaStreamSynchronize(stream_));
    std::swap(saved_, saving_);  // the step is done
    return cudaSuccess;
  }

  float loss() const { return *last_loss_; }
  const float* weights() const { return saved_; }

 private:
  static int blocks(int count) { return (count + 63) / 64; }

  cudaError_t toDevice(float* to, const float* from, int count) {
    return cudaMemcpyAsync(to, from, count * sizeof(float),
                           cudaMemcpyHostToDevice, stream_);
  }
  cudaError_t toHost(float* to, const float* from, int count) {
    return cudaMemcpyAsync(to, from, count * sizeof(float),
                           cudaMemcpyDeviceToHost, stream_);
  }
  cudaError_t multiply(const float* a, const float* b, float* product, int rows,
                       int inner, int columns, bool is_a_transposed = false,
                       bool is_b_transposed = false) {
    const dim3 block(16, 16);
    const dim3 grid((columns + 15) / 16, (rows + 15) / 16);
    matmul<<<grid, block, 0, stream_>>>(a, b, product, rows, inner, columns,
                                        is_a_transposed, is_b_transposed);
    return cudaGetLastError();
  }
  cudaError_t addBiasTo(float* values, const float* bias, int columns,
                        bool is_rectified) {
    addBias<<<blocks(kBatch * columns), 64, 0, stream_>>>(
        values, bias, kBatch, columns, is_rectified);
    return cudaGetLastError();
  }
  cudaError_t sumUp(const float* values, float* sums, int columns) {
    sumColumns<<<blocks(columns), 64, 0, stream_>>>(values, sums, kBatch,
                                                    columns);
    return cudaGetLastError();
  }

  const std::vector<float> inputs_, targets_;
  cudaStream_t stream_;
  float *input_, *target_, *weights_, *gradients_, *hidden_, *hidden_gradient_,
      *output_, *output_gradient_, *loss_;  // on the device
  // On the host: the weights behind the last finished step, and those of the
  // step that is under way.
  float *saved_, *saving_, *last_loss_;
};

// Whether there is a device again, with nothing in its memory.
bool recover(cudaError_t error) {
  std::fprintf(stderr, "the device failed: %s (%d)\n",
               cudaGetErrorString(error), static_cast<int>(error));
  using Recover = int (*)(int timeout_ms);
  const auto proxy =
      reinterpret_cast<Recover>(dlsym(RTLD_DEFAULT, "mnemosyne_proxy_recover"));
  if (proxy == nullptr || proxy(60'000) != 0) return false;
  cudaGetLastError();  // what is behind us
  std::fprintf(stderr, "there is a new device\n");
  return true;
}

// The step, again and again if need be. False: the device does not come back.
bool finish(Training* training, bool is_uploaded) {
  while (true) {
    cudaError_t error = is_uploaded ? cudaSuccess : training->upload();
    if (error == cudaSuccess) error = training->step();
    if (error == cudaSuccess) return true;
    if (!recover(error)) return false;
    is_uploaded = false;
  }
}

uint64_t hashOf(const float* values, int count) {
  uint64_t hash = 0xcbf29ce484222325;  // FNV-1a
  const auto* bytes = reinterpret_cast<const unsigned char*>(values);
  for (size_t i = 0; i < count * sizeof(float); ++i) {
    hash = (hash ^ bytes[i]) * 0x100000001b3;
  }
  return hash;
}

}  // namespace

int main(int argc, char** argv) {
  const int steps = argc > 1 ? std::atoi(argv[1]) : 20;
  Training training;
  if (const cudaError_t error = training.allocate(); error != cudaSuccess) {
    std::fprintf(stderr, "no memory: %s\n", cudaGetErrorString(error));
    return 1;
  }
  for (int step = 0; step < steps; ++step) {
    if (!finish(&training, step > 0)) return 1;
    std::printf("step %d loss %.9g\n", step, training.loss());
  }
  std::printf("weights %016llx\n", static_cast<unsigned long long>(
                                       hashOf(training.weights(), kWeights)));
  return 0;
}
