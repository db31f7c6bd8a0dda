// cuBLASLt: descriptors come with each multiplication, and are made for it
// alone.
#include <array>

#include "proxy/server.h"

namespace mnemosyne::proxy {
namespace {

struct Kind {
  const char* create;
  const char* destroy;
  const char* set;
  size_t num_made_with;
};
constexpr Kind kOperation = {"cublasLtMatmulDescCreate",
                             "cublasLtMatmulDescDestroy",
                             "cublasLtMatmulDescSetAttribute", 2};
constexpr Kind kLayout = {"cublasLtMatrixLayoutCreate",
                          "cublasLtMatrixLayoutDestroy",
                          "cublasLtMatrixLayoutSetAttribute", 4};
constexpr Kind kPreference = {"cublasLtMatmulPreferenceCreate",
                              "cublasLtMatmulPreferenceDestroy",
                              "cublasLtMatmulPreferenceSetAttribute", 0};

// One descriptor of the real library, read from a command.
class Descriptor {
 public:
  Descriptor(Libraries& libraries, const Kind& kind, CommandReader& reader)
      : libraries_(libraries), kind_(kind) {
    const auto bytes = reader.getBytes();
    std::array<int64_t, 4> with{};
    if (bytes.size() != kind.num_made_with * sizeof with[0]) {
      throw ProtocolError("a descriptor of cuBLASLt is made otherwise");
    }
    if (!bytes.empty()) std::memcpy(with.data(), bytes.data(), bytes.size());
    create(with);
    const auto num_attributes = reader.get<uint32_t>();
    auto* set = libraries.function<int(void*, int, const void*, size_t)>(
        Library::kCublasLt, kind.set);
    for (uint32_t at = 0; at < num_attributes; ++at) {
      const auto attribute = reader.get<int32_t>();
      const auto value = reader.getBytes();
      const int result = set(real_, attribute, value.data(), value.size());
      if (code_ == 0) code_ = result;
    }
  }
  Descriptor(const Descriptor&) = delete;
  ~Descriptor() {
    if (real_ == nullptr) return;
    libraries_.function<int(void*)>(Library::kCublasLt, kind_.destroy)(real_);
  }
  void* get() const { return real_; }
  int code() const { return code_; }

 private:
  void create(const std::array<int64_t, 4>& with) {
    void* function = libraries_.symbol(Library::kCublasLt, kind_.create);
    switch (kind_.num_made_with) {
      case 0:
        code_ = reinterpret_cast<int (*)(void**)>(function)(&real_);
        break;
      case 2:
        code_ = reinterpret_cast<int (*)(void**, int, int)>(function)(
            &real_, with[0], with[1]);
        break;
      default:
        code_ =
            reinterpret_cast<int (*)(void**, int, uint64_t, uint64_t, int64_t)>(
                function)(&real_, with[0], with[1], with[2], with[3]);
    }
  }

  Libraries& libraries_;
  const Kind& kind_;
  void* real_ = nullptr;
  int code_ = 0;
};

int worst(std::initializer_list<const Descriptor*> all) {
  for (const auto* each : all) {
    if (each->code() != 0) return each->code();
  }
  return 0;
}

}  // namespace

void* Server::lt() {
  if (lt_ == nullptr) {
    auto* create =
        libraries_.function<int(void**)>(Library::kCublasLt, "cublasLtCreate");
    failed(Library::kCublasLt, "cublasLtCreate", create(&lt_));
  }
  return lt_;
}

void Server::ltHeuristic(CommandReader& reader, Responder responder) {
  const Descriptor operation(libraries_, kOperation, reader);
  const Descriptor a(libraries_, kLayout, reader),
      b(libraries_, kLayout, reader);
  const Descriptor c(libraries_, kLayout, reader),
      d(libraries_, kLayout, reader);
  const Descriptor preference(libraries_, kPreference, reader);
  const auto num_wanted = reader.get<int32_t>();
  if (num_wanted < 0 || num_wanted > 64)
    throw ProtocolError("too many heuristics");
  std::vector<LtHeuristicResult> results(num_wanted);
  int num_found = 0;
  auto* get = libraries_.function<int(void*, void*, void*, void*, void*, void*,
                                      void*, int, LtHeuristicResult*, int*)>(
      Library::kCublasLt, "cublasLtMatmulAlgoGetHeuristic");
  int code = worst({&operation, &a, &b, &c, &d, &preference});
  if (code == 0) {
    code = get(lt(), operation.get(), a.get(), b.get(), c.get(), d.get(),
               preference.get(), num_wanted, results.data(), &num_found);
  }
  responder.answer(code, results.data(), num_found * sizeof results[0]);
}

void Server::ltMatmul(CommandReader& reader) {
  const Descriptor operation(libraries_, kOperation, reader);
  const Descriptor a(libraries_, kLayout, reader),
      b(libraries_, kLayout, reader);
  const Descriptor c(libraries_, kLayout, reader),
      d(libraries_, kLayout, reader);
  const auto alpha = reader.getBytes(), beta = reader.getBytes();
  const bool on_host = reader.get<bool>();
  const auto pointer = [](std::span<const std::byte> bytes) {
    uint64_t value = 0;
    std::memcpy(&value, bytes.data(), std::min(bytes.size(), sizeof value));
    return reinterpret_cast<const void*>(value);
  };
  std::array<void*, 5> at;  // a, b, c, d, workspace
  for (void*& each : at) each = reinterpret_cast<void*>(reader.get<uint64_t>());
  const auto workspace_bytes = reader.get<uint64_t>();
  const auto algorithm = reader.getBytes();
  void* on = stream(reader.get<uint32_t>());
  auto* multiply =
      libraries_
          .function<int(void*, void*, const void*, const void*, void*,
                        const void*, void*, const void*, const void*, void*,
                        void*, void*, const void*, void*, size_t, void*)>(
              Library::kCublasLt, "cublasLtMatmul");
  int code = worst({&operation, &a, &b, &c, &d});
  if (code == 0) {
    code = multiply(
        lt(), operation.get(), on_host ? alpha.data() : pointer(alpha), at[0],
        a.get(), at[1], b.get(), on_host ? beta.data() : pointer(beta), at[2],
        c.get(), at[3], d.get(), algorithm.empty() ? nullptr : algorithm.data(),
        at[4], workspace_bytes, on);
  }
  failed(Library::kCublasLt, "cublasLtMatmul", code);
}

}  // namespace mnemosyne::proxy
