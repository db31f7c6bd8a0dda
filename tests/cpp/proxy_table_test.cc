// The code that is generated from csrc/proxy/api.def: what the program passes
// to a function of the client reaches the library's function in the server.
#include <array>
#include <complex>
#include <cstdint>
#include <cstring>
#include <map>
#include <optional>
#include <random>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "generated_opcodes.h"
#include "proxy/forward.h"
#include "test.h"

// What the client exports; two functions that are not supported stand for all.
namespace exported {
#define DECLARE(library, name) extern "C" mnemosyne::proxy::types::name name;
MNEMOSYNE_FORWARD(DECLARE)
extern "C" int cusolverDnCreate(void** handle);
extern "C" void* nvshmem_malloc(size_t size_bytes);
}  // namespace exported

namespace mnemosyne::testing {
namespace {

using namespace proxy;  // NOLINT: tests only

// What the client's half of forward.h is told to do, and what it saw.
struct Client {
  CublasPointerMode mode = CublasPointerMode::kHost;
  int sticky = 0;
  std::optional<CommandWriter> posted;
  std::optional<Library> library;
  std::map<std::string, int> unsupported;
} client;

// Numbers stand for handles on the way; this is what they stand for.
std::vector<void*> handles;
uint32_t numberOf(void* handle) {
  handles.push_back(handle);
  return static_cast<uint32_t>(handles.size() - 1);
}

using Value = std::array<std::byte, 16>;

// What reached a function of the library: each argument, and of a pointer to a
// value on the host the value as well.
struct Call {
  std::string name;
  std::vector<Value> arguments;
};
std::optional<Call> called;
int result_of_call = 0;
int info_of_call = 0;

template <typename T>
Value bytesOf(const T& value) {
  static_assert(sizeof value <= 16);
  Value bytes{};
  std::memcpy(bytes.data(), &value, sizeof value);
  return bytes;
}

// Seen by both ends: in the mode of host pointers a scalar is its value.
template <typename T>
Value seen(T argument) {
  if constexpr (std::is_same_v<T, int*>) {
    return {};  // the server passes an int of its own
  } else if constexpr (std::is_pointer_v<T> &&
                       std::is_const_v<std::remove_pointer_t<T>>) {
    if (client.mode == CublasPointerMode::kDevice) return bytesOf(argument);
    if constexpr (std::is_same_v<T, const void*>) {
      return bytesOf(*static_cast<const uint16_t*>(argument));  // at least
    } else {
      return bytesOf(*argument);
    }
  } else {
    return bytesOf(argument);
  }
}

template <Forward opcode, typename Function>
struct Recorder;
template <Forward opcode, typename... Arguments>
struct Recorder<opcode, int(Arguments...)> {
  static const char* name;
  static int call(Arguments... arguments) {
    called = Call{name, {seen(arguments)...}};
    const auto report = [](auto argument) {
      if constexpr (std::is_same_v<decltype(argument), int*>)
        *argument = info_of_call;
    };
    (report(arguments), ...);
    return result_of_call;
  }
};
template <Forward opcode, typename... Arguments>
const char* Recorder<opcode, int(Arguments...)>::name = nullptr;

// As if the server's library were too old for this one.
constexpr const char* kLacking = "cublasZgelsBatched";

class Server : public GeneratedContext {
 public:
  struct Failure {
    Library library;
    std::string name;
    int code;
  };

  void* cublas(CommandReader& reader) override {
    return handles.at(reader.get<uint32_t>());
  }
  void* comm(uint32_t id) override { return handles.at(id); }
  void* stream(uint32_t id) override { return handles.at(id); }
  void failed(Library library, const char* name, int code) override {
    failures.push_back({library, name, code});
  }
  void* symbol(Library library, const char* name) override {
    if (std::string(name) == kLacking) return nullptr;
#define RECORD(library_of, function)                             \
  if (library == library_of && std::string(name) == #function) { \
    using R = Recorder<Forward::function, types::function>;      \
    R::name = #function;                                         \
    return reinterpret_cast<void*>(&R::call);                    \
  }
    MNEMOSYNE_FORWARD(RECORD)
#undef RECORD
    return nullptr;
  }

  std::vector<Failure> failures;
};

void* handle() { return reinterpret_cast<void*>(0x1000); }

void reset() {
  client = Client();
  called.reset();
  handles.clear();
  result_of_call = info_of_call = 0;
}

Server execute(std::span<const std::byte> payload, uint16_t opcode) {
  Server server;
  CommandReader reader(payload);
  EXPECT(executeGenerated(opcode, reader, server));
  return server;
}
Server execute() {
  EXPECT(client.posted.has_value());
  return execute(client.posted->payload(), client.posted->opcode());
}

std::mt19937_64 generator(1);  // the same arguments in every run

// A scalar of each kind lies on the host, with random bytes.
template <typename T>
T makeArgument() {
  const uint64_t random = generator();
  if constexpr (std::is_pointer_v<T>) {
    if constexpr (std::is_const_v<std::remove_pointer_t<T>> ||
                  std::is_same_v<T, int*>) {
      static std::array<std::array<uint64_t, 2>, 8> places;
      static size_t used = 0;
      auto& place = places[used++ % places.size()];
      place = {generator() >> 2, generator() >> 2};  // no NaN
      return reinterpret_cast<T>(place.data());
    }
    return reinterpret_cast<T>(random | 1);
  } else if constexpr (std::is_same_v<T, int>) {
    // Any of them is right as the type of a computation as well.
    constexpr int kComputeTypes[] = {68, 70, 72, 75, 77};
    return kComputeTypes[random % std::size(kComputeTypes)];
  } else {
    return static_cast<T>(random);
  }
}

template <typename... Arguments>
int callWithAnything(int (*function)(Arguments...),
                     std::tuple<Arguments...>* arguments = nullptr) {
  const std::tuple<Arguments...> made{makeArgument<Arguments>()...};
  if (arguments != nullptr) *arguments = made;
  return std::apply(function, made);
}

template <typename... Arguments>
void expectArrival(const char* name, int (*function)(Arguments...),
                   Library library) {
  for (auto mode : {CublasPointerMode::kDevice, CublasPointerMode::kHost}) {
    reset();
    client.mode = mode;
    std::tuple<Arguments...> arguments;
    const int code = callWithAnything(function, &arguments);
    if (code == kCublasNotSupported) {  // the result would be on the host
      EXPECT(mode == CublasPointerMode::kHost);
      EXPECT(!client.posted.has_value());
      EXPECT_EQ(client.unsupported.size(), 1u);
      continue;
    }
    EXPECT_EQ(code, 0);
    EXPECT(client.library == library);
    const auto server = execute();
    if (std::string(name) == kLacking) continue;
    EXPECT(server.failures.empty());
    EXPECT(called.has_value());
    EXPECT_EQ(called->name, name);
    const std::vector<Value> sent = std::apply(
        [](auto... each) { return std::vector<Value>{seen(each)...}; },
        arguments);
    EXPECT(called->arguments == sent);
  }
}

int gemmEx(int compute_type, int result_type, const void* alpha,
           const void* beta) {
  return exported::cublasGemmEx(handle(), 0, 0, 1, 1, 1, alpha, nullptr, 0, 1,
                                nullptr, 0, 1, beta, nullptr, result_type, 1,
                                compute_type, -1);
}

}  // namespace
}  // namespace mnemosyne::testing

// The halves of forward.h that the client writes by hand.
namespace mnemosyne::proxy {
using testing::client;

int postForward(const CommandWriter& command, Library library) {
  client.posted.emplace(command);
  client.library = library;
  return client.sticky;
}
void putCublas(CommandWriter& command, void* handle) {
  command.put(testing::numberOf(handle));
}
CublasPointerMode pointerMode(void*) { return client.mode; }
uint32_t commId(void* comm) { return testing::numberOf(comm); }
uint32_t streamId(void* stream) { return testing::numberOf(stream); }
void noteUnsupported(const char* library, const char* name) {
  ++client.unsupported[std::string(library) + " " + name];
}
}  // namespace mnemosyne::proxy

namespace mnemosyne::testing {

TEST(the_arguments_of_every_forwarded_function_arrive) {
#define ARRIVES(library, name) expectArrival(#name, &exported::name, library);
  MNEMOSYNE_FORWARD(ARRIVES)
}

TEST(a_command_that_is_cut_short_or_too_long_is_refused) {
  const auto expectRefusal = [] {
    if (!client.posted) return;
    const auto payload = client.posted->payload();
    std::vector<std::byte> bytes(payload.begin(), payload.end());
    for (size_t size = 0; size < bytes.size(); ++size) {
      EXPECT_THROWS(ProtocolError,
                    execute({bytes.data(), size}, client.posted->opcode()));
    }
    bytes.push_back(std::byte{0});
    EXPECT_THROWS(ProtocolError, execute(bytes, client.posted->opcode()));
    EXPECT(!called.has_value());
  };
#define REFUSED(library, name)       \
  reset();                           \
  callWithAnything(&exported::name); \
  expectRefusal();
  MNEMOSYNE_FORWARD(REFUSED)
}

TEST(a_scalar_that_claims_to_be_huge_is_refused) {
  reset();
  const float one = 1;
  EXPECT_EQ(gemmEx(68, 0, &one, &one), 0);
  const auto payload = client.posted->payload();
  std::vector<std::byte> bytes(payload.begin(), payload.end());
  const size_t place = sizeof(uint32_t) + 5 * sizeof(int);  // of alpha's size
  EXPECT(bytes[place] == std::byte{sizeof one});
  bytes[place] = std::byte{17};
  bytes.resize(bytes.size() + 64);
  EXPECT_THROWS(ProtocolError, execute(bytes, client.posted->opcode()));
}

TEST(an_opcode_of_no_forwarded_function_is_left_to_others) {
  Server server;
  CommandReader reader({});
  uint16_t end = kFirstForward;
#define COUNT(library, name) ++end;
  MNEMOSYNE_FORWARD(COUNT)
  for (uint16_t opcode : {uint16_t{0}, uint16_t{kFirstForward - 1}, end}) {
    EXPECT(!executeGenerated(opcode, reader, server));
  }
  EXPECT(Forward::cublasSgemm_v2 == Forward{kFirstForward});
}

TEST(a_scalar_is_as_large_as_the_type_of_the_computation) {
  const std::complex<double> scalar(1.5, -2.5);
  constexpr struct {
    int compute_type, result_type;
    size_t size_bytes;
  } kCases[] = {{64, 2, 2}, {68, 0, 4},  {68, 14, 4}, {77, 2, 4}, {68, 4, 8},
                {70, 1, 8}, {70, 5, 16}, {72, 10, 4}, {78, 0, 4}, {79, 1, 8}};
  reset();
  gemmEx(64, 2, &scalar, &scalar);
  const size_t without_scalars = client.posted->payload().size() - 2 * 2;
  for (const auto& each : kCases) {
    reset();
    EXPECT_EQ(gemmEx(each.compute_type, each.result_type, &scalar, &scalar), 0);
    EXPECT_EQ(client.posted->payload().size(),
              without_scalars + 2 * each.size_bytes);
    EXPECT(execute().failures.empty());
  }
}

TEST(an_unknown_type_of_computation_is_not_supported) {
  reset();
  const float one = 1;
  EXPECT_EQ(gemmEx(66, 0, &one, &one), kCublasNotSupported);
  EXPECT(!client.posted.has_value());
  EXPECT_EQ(client.unsupported.size(), 1u);
}

TEST(the_error_of_a_lost_device_is_returned) {
  reset();
  client.sticky = kCublasExecutionFailed;
  const float one = 1;
  EXPECT_EQ(gemmEx(68, 0, &one, &one), kCublasExecutionFailed);
}

TEST(what_the_library_returns_is_the_error_of_the_command) {
  reset();
  const float one = 1;
  gemmEx(68, 0, &one, &one);
  result_of_call = kCublasExecutionFailed;
  const auto server = execute();
  EXPECT_EQ(server.failures.size(), 1u);
  EXPECT(server.failures[0].library == Library::kCublas);
  EXPECT_EQ(server.failures[0].name, "cublasGemmEx");
  EXPECT_EQ(server.failures[0].code, kCublasExecutionFailed);
}

TEST(an_argument_that_the_library_calls_wrong_is_the_error_of_the_command) {
  reset();
  int info = 5;
  EXPECT_EQ(exported::cublasSgeqrfBatched(handle(), 1, 1, nullptr, 1, nullptr,
                                          &info, 1),
            0);
  EXPECT_EQ(info, 0);
  info_of_call = -3;
  const auto server = execute();
  EXPECT_EQ(server.failures.size(), 1u);
  EXPECT_EQ(server.failures[0].code, -3);
}

TEST(a_function_that_the_library_lacks_is_not_supported) {
  reset();
  callWithAnything(&exported::cublasZgelsBatched);
  const auto server = execute();
  EXPECT(!called.has_value());
  EXPECT_EQ(server.failures.size(), 1u);
  EXPECT_EQ(server.failures[0].name, kLacking);
  EXPECT_EQ(server.failures[0].code, kCublasNotSupported);
}

TEST(no_handle_and_no_scalar_are_refused_at_once) {
  reset();
  const float one = 1;
  EXPECT_EQ(gemmEx(68, 0, nullptr, &one), kCublasInvalidValue);
  EXPECT_EQ(gemmEx(68, 0, &one, nullptr), kCublasInvalidValue);
  EXPECT_EQ(
      exported::cublasSdot_v2(nullptr, 1, nullptr, 1, nullptr, 1, nullptr),
      kCublasNotInitialized);
  EXPECT_EQ(exported::ncclSend(nullptr, 1, 7, 0, nullptr, nullptr),
            kNcclInvalidArgument);
  EXPECT(!client.posted.has_value());
}

TEST(what_is_not_supported_says_so_and_is_counted) {
  reset();
  void* solver = nullptr;
  EXPECT_EQ(exported::cusolverDnCreate(&solver), 7);
  EXPECT_EQ(exported::cusolverDnCreate(&solver), 7);
  EXPECT(exported::nvshmem_malloc(8) == nullptr);
  EXPECT_EQ(client.unsupported["cusolver cusolverDnCreate"], 2);
  EXPECT_EQ(client.unsupported["nvshmem nvshmem_malloc"], 1);
}

}  // namespace mnemosyne::testing
