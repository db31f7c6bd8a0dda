#include "proxy/ptx.h"

#include <charconv>
#include <optional>

namespace mnemosyne::proxy {
namespace {

constexpr uint64_t kMostParameterBytes = 32764;
constexpr uint64_t kMostAlignment = 1 << 16;
constexpr uint64_t kMaxVariableBytes = uint64_t{1} << 40;

// Where ptxas puts the first parameter in its bank of constants. An alignment
// above 16 is one of the place there, not of the offset.
uint64_t firstParameter(int compute_capability, uint64_t size_bytes) {
  if (compute_capability >= 100) return 0x380;
  if (compute_capability >= 90) return 0x210;
  return size_bytes <= 4352 ? 0x160 : 0x1a80;
}

[[noreturn]] void throwUnreadable(std::string_view what) {
  throw FatBinaryError("cannot read PTX near '" +
                       std::string(what.substr(0, 80)) + "'");
}

// Words (names, directives, numbers) and single signs, without comments.
class Tokens {
 public:
  explicit Tokens(std::string_view text)
      : rest_(text.substr(0, text.find('\0'))) {
    advance();
  }

  // Empty at the end.
  std::string_view peek() const { return token_; }
  std::string_view next() {
    const auto token = token_;
    advance();
    return token;
  }
  bool take(std::string_view expected) {
    if (token_ != expected) return false;
    advance();
    return true;
  }
  void expect(std::string_view expected) {
    if (!take(expected)) throwUnreadable(token_);
  }

 private:
  static bool isOfWord(char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
           (c >= '0' && c <= '9') || c == '_' || c == '$' || c == '%' ||
           c == '.';
  }

  void skipTo(std::string_view end) {
    const size_t at = rest_.find(end);
    rest_.remove_prefix(at == std::string_view::npos ? rest_.size()
                                                     : at + end.size());
  }

  void skipSpace() {
    while (!rest_.empty()) {
      if (rest_.starts_with("//")) {
        skipTo("\n");
      } else if (rest_.starts_with("/*")) {
        skipTo("*/");
      } else if (rest_.front() == '"') {  // a path; we need none
        rest_.remove_prefix(1);
        skipTo("\"");
      } else if (std::string_view(" \t\r\n").find(rest_.front()) !=
                 std::string_view::npos) {
        rest_.remove_prefix(1);
      } else {
        return;
      }
    }
  }

  void advance() {
    skipSpace();
    size_t size = 0;
    while (size < rest_.size() && isOfWord(rest_[size])) ++size;
    if (size == 0 && !rest_.empty()) size = 1;
    token_ = rest_.substr(0, size);
    rest_.remove_prefix(size);
  }

  std::string_view rest_;
  std::string_view token_;
};

struct Declaration {
  std::string_view name;
  uint64_t alignment;
  uint64_t size_bytes;
};

uint64_t number(std::string_view word) {
  uint64_t value = 0;
  const auto [end, error] =
      std::from_chars(word.data(), word.data() + word.size(), value);
  if (error != std::errc() || end != word.data() + word.size() ||
      value > kMaxVariableBytes) {
    throwUnreadable(word);
  }
  return value;
}

// ".u32" has 4 bytes; 0 for what is no type.
uint64_t sizeOfType(std::string_view word) {
  if (word == ".texref" || word == ".surfref" || word == ".samplerref") {
    return 8;
  }
  if (word.size() < 3 ||
      std::string_view("usbf").find(word[1]) == std::string_view::npos) {
    return 0;
  }
  for (const auto& [bits, size_bytes] :
       {std::pair("8", 1), {"16", 2}, {"32", 4}, {"64", 8}, {"128", 16}}) {
    if (word.substr(2) == bits) return static_cast<uint64_t>(size_bytes);
  }
  return word == ".f16x2" ? 4 : 0;
}

// What follows ".param", ".global" or ".const":
//   .align 8 .b8 name[3][8]      .u64 .ptr .global .align 16 name
// Nothing where the size is not told: "name[]".
std::optional<Declaration> declaration(Tokens* tokens) {
  Declaration found{{}, 0, 0};
  uint64_t elements = 1;
  bool is_of_pointee = false;
  while (tokens->peek().starts_with('.')) {
    const auto word = tokens->next();
    if (word == ".align") {
      const uint64_t alignment = number(tokens->next());
      if (!is_of_pointee) found.alignment = alignment;
    } else if (word == ".ptr") {
      is_of_pointee = true;
    } else if (word == ".v2" || word == ".v4") {
      elements = static_cast<uint64_t>(word[2] - '0');
    } else if (word == ".attribute") {
      while (tokens->peek() != ")" && !tokens->peek().empty()) tokens->next();
      tokens->expect(")");
      while (tokens->take(")")) {  // .attribute(.unified(1, 2))
      }
    } else if (const uint64_t size_bytes = sizeOfType(word)) {
      found.size_bytes = size_bytes;
    }
  }
  found.name = tokens->next();
  if (found.name.empty() || found.size_bytes == 0) throwUnreadable(found.name);
  found.size_bytes *= elements;
  if (found.alignment == 0) found.alignment = found.size_bytes;
  if (found.alignment > kMostAlignment ||
      (found.alignment & (found.alignment - 1)) != 0) {
    throwUnreadable(found.name);
  }
  while (tokens->take("[")) {
    if (tokens->take("]")) return std::nullopt;
    const uint64_t count = number(tokens->next());
    if (count == 0 || found.size_bytes > kMaxVariableBytes / count) {
      throwUnreadable(found.name);
    }
    found.size_bytes *= count;
    tokens->expect("]");
  }
  return found;
}

// From the opening bracket to the one that closes it.
std::vector<Declaration> parameters(Tokens* tokens) {
  std::vector<Declaration> all;
  tokens->expect("(");
  if (tokens->take(")")) return all;
  do {
    tokens->expect(".param");
    const auto parameter = declaration(tokens);
    if (!parameter || all.size() == kMostParameterBytes) {
      throwUnreadable("a parameter without a size");
    }
    all.push_back(*parameter);
  } while (tokens->take(","));
  tokens->expect(")");
  return all;
}

KernelLayout layout(const std::vector<Declaration>& parameters,
                    uint64_t first) {
  KernelLayout layout;
  uint64_t end = first;
  for (const auto& [name, alignment, size_bytes] : parameters) {
    const uint64_t begin = (end + alignment - 1) & ~(alignment - 1);
    end = begin + size_bytes;
    if (end - first > kMostParameterBytes) throwUnreadable(name);
    layout.parameters.push_back({static_cast<uint32_t>(begin - first),
                                 static_cast<uint32_t>(size_bytes)});
  }
  layout.size_bytes = static_cast<uint32_t>(end - first);
  return layout;
}

KernelLayout layoutFor(int compute_capability,
                       const std::vector<Declaration>& parameters) {
  const uint64_t first = firstParameter(compute_capability, 0);
  const KernelLayout usual = layout(parameters, first);
  const uint64_t right = firstParameter(compute_capability, usual.size_bytes);
  return right == first ? usual : layout(parameters, right);
}

}  // namespace

KernelTable readPtx(std::string_view text, int compute_capability) {
  KernelTable table;
  Tokens tokens(text);
  if (tokens.peek() != ".version") throwUnreadable(tokens.peek());
  bool is_external = false;
  unsigned depth = 0;
  while (!tokens.peek().empty()) {
    const auto word = tokens.next();
    if (word == "{" || word == "(") ++depth;
    if ((word == "}" || word == ")") && depth > 0) --depth;
    if (depth > 0) continue;
    if (word == ".extern") {
      is_external = true;
    } else if (word == ".entry") {
      const std::string name(tokens.next());
      // Without parameters the brackets may be missing.
      const auto declared = tokens.peek() == "(" ? parameters(&tokens)
                                                 : std::vector<Declaration>();
      table.kernels.emplace(name, layoutFor(compute_capability, declared));
    } else if (word == ".global" || word == ".const") {
      const auto variable = declaration(&tokens);
      if (variable && !is_external) {
        table.variables.emplace(variable->name, variable->size_bytes);
      }
      is_external = false;
    } else if (word == ";" || word == "}") {
      is_external = false;
    }
  }
  return table;
}

}  // namespace mnemosyne::proxy
