#include "proxy/emulated/device.h"

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <utility>

#include "common/float_mode.h"
#include "proxy/cuda_abi.h"
#include "proxy/emulated/registry.h"

namespace mnemosyne::proxy::emulated {
namespace {

void* handleOf(uintptr_t number) { return reinterpret_cast<void*>(number); }

std::atomic<Device*> the_device{nullptr};

}  // namespace

Device* device() { return the_device; }

int openDevice() {
  static std::mutex mutex;
  std::lock_guard<std::mutex> lock(mutex);
  if (the_device != nullptr) return kCudaSuccess;
  try {
    const Options options = Options::parse(
        getenv("MNEMOSYNE_EMULATED"), getenv("MNEMOSYNE_PROXY_GENERATION"));
    if (options.numDevices() < 1) return kCudaNoDevice;
    if (const char* const paths = getenv("MNEMOSYNE_EMULATED_KERNELS")) {
      const std::string wrong = registry().load(paths);
      if (!wrong.empty()) {
        throw OptionError("MNEMOSYNE_EMULATED_KERNELS: " + wrong);
      }
    }
    the_device = new Device(options);
  } catch (const OptionError& error) {
    std::fprintf(stderr, "emulated device: %s\n", error.what());
    return kCudaInvalidValue;
  }
  return kCudaSuccess;
}

Device::Device(const Options& options)
    : options_(options),
      memory_(options.memory_bytes),
      full_until_(Deadline::in(Milliseconds(options.full_ms))) {
  streams_[handleOf(kLegacyStream)] = makeStream(true);
  streams_[handleOf(kPerThreadStream)] = makeStream(true);
}

std::shared_ptr<Stream> Device::makeStream(bool is_blocking) {
  std::erase_if(all_streams_, [](const auto& each) { return each.expired(); });
  auto stream = std::make_shared<Stream>(
      is_blocking, error_,
      [this](Operation& operation) { execute(operation); });
  all_streams_.push_back(stream);
  return stream;
}

void Device::fail(int error) {
  std::vector<std::shared_ptr<Stream>> streams;
  std::vector<std::function<void()>> calls;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (error_ != kCudaSuccess) return;  // the first one stays
    error_ = error;
    for (const auto& each : all_streams_) {
      if (auto stream = each.lock()) streams.push_back(std::move(stream));
    }
    calls = on_failure_;
  }
  for (const auto& stream : streams) stream->wakeWaiters();
  for (const auto& call : calls) call();
}

void Device::onFailure(std::function<void()> call) {
  std::lock_guard<std::mutex> lock(mutex_);
  on_failure_.push_back(std::move(call));
}

void* Device::createStream(bool is_blocking) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto stream = makeStream(is_blocking);
  void* const handle = stream.get();
  streams_[handle] = std::move(stream);
  return handle;
}

int Device::destroyStream(void* handle) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = streams_.find(handle);
  if (found == streams_.end()) return kCudaInvalidHandle;
  if (reinterpret_cast<uintptr_t>(handle) <= kPerThreadStream) {
    return kCudaInvalidHandle;
  }
  found->second->close();
  streams_.erase(found);
  return kCudaSuccess;
}

std::shared_ptr<Stream> Device::find(void* handle) {
  const auto found =
      streams_.find(handle == nullptr ? handleOf(kLegacyStream) : handle);
  return found == streams_.end() ? nullptr : found->second;
}

// The legacy default stream waits for all blocking streams, and they for it.
void Device::order(Stream& stream, std::vector<Point>* after) {
  if (!stream.isBlocking()) return;
  const auto legacy = streams_.at(handleOf(kLegacyStream));
  const auto behind = [&](Stream& other) {
    Point point = other.last();
    if (!point.isReached()) after->push_back(std::move(point));
  };
  if (&stream != legacy.get()) return behind(*legacy);
  for (const auto& [handle, other] : streams_) {
    if (other != legacy && other->isBlocking()) behind(*other);
  }
}

int Device::submit(void* handle, Operation operation, Point* at) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto stream = find(handle);
  if (stream == nullptr) return kCudaInvalidHandle;
  if (operation.is_counted) operation.count = num_counted_++;
  order(*stream, &operation.after);
  Point point = stream->enqueue(std::move(operation));
  if (at != nullptr) *at = std::move(point);
  return kCudaSuccess;
}

int Device::pointsOf(void* handle, std::vector<Point>* points) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto stream = find(handle);
  if (stream == nullptr) return kCudaInvalidHandle;
  points->push_back(stream->last());
  if (stream == streams_.at(handleOf(kLegacyStream))) order(*stream, points);
  return kCudaSuccess;
}

std::vector<Point> Device::allPoints() {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<Point> points;
  for (const auto& [handle, stream] : streams_) {
    points.push_back(stream->last());
  }
  return points;
}

int Device::wait(const std::vector<Point>& points) const {
  for (const Point& point : points) point.wait();
  return error_;
}

void Device::execute(Operation& operation) {
  if (error_ != kCudaSuccess) return;
  int error = kCudaSuccess;
  try {
    const DefaultFloatMode mode;
    if (operation.is_counted) error = options_.strike(operation.count);
    if (error == kCudaSuccess) error = operation.body();
  } catch (const std::exception& exception) {
    std::fprintf(stderr, "emulated device: %s\n", exception.what());
    error = kCudaLaunchFailure;
  }
  if (error != kCudaSuccess) fail(error);
}

}  // namespace mnemosyne::proxy::emulated
