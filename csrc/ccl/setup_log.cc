#include "ccl/setup_log.h"

#include <cstring>
#include <stdexcept>

#include "common/error.h"
#include "common/sha256.h"

namespace mnemosyne::ccl {
namespace {

constexpr char kMagic[] = "mnemosyne set-up log 1\n";
constexpr size_t kMagicBytes = sizeof(kMagic) - 1;

size_t resultBytes(const Operation& op) {
  size_t total = 0;
  for (const Buffer& buffer : op.outputs) total += buffer.size;
  return total;
}

template <typename T>
void put(std::string* text, T value) {
  text->append(reinterpret_cast<const char*>(&value), sizeof(value));
}

void putString(std::string* text, const std::string& value) {
  put<uint64_t>(text, value.size());
  *text += value;
}

class Reader {
 public:
  Reader(const char* begin, const char* end) : at_(begin), end_(end) {}

  template <typename T>
  T get() {
    T value;
    std::memcpy(&value, take(sizeof(T)), sizeof(T));
    return value;
  }
  std::string getString() {
    const auto size = get<uint64_t>();
    return std::string(take(size), size);
  }
  bool atEnd() const { return at_ == end_; }

 private:
  const char* take(uint64_t size) {
    if (size > static_cast<uint64_t>(end_ - at_))
      throw std::invalid_argument("the set-up log is cut short");
    const char* taken = at_;
    at_ += size;
    return taken;
  }

  const char* at_;
  const char* end_;
};

Digest digestOf(const char* data, size_t size) {
  return sha256(std::as_bytes(std::span(data, size)));
}

}  // namespace

size_t SetupLog::reserve(const Operation& op) {
  auto& entries = groups_[op.group->name()].entries;
  entries.push_back({op.kind, true, -1, {}});
  return entries.size() - 1;
}

void SetupLog::record(const Operation& op, size_t place) {
  const size_t total = resultBytes(op);
  // Nor can it be told before whether a newcomer has room for unequal shares.
  if (total > kMaxResultBytes || op.kind == Kind::kAllGatherUnequal) return;
  // Not there if the recording was started anew in between.
  auto& entries = groups_[op.group->name()].entries;
  if (place >= entries.size() || entries[place].kind != op.kind) return;
  Entry& entry = entries[place];
  entry.is_placeholder = false;
  entry.source_rank = op.source_rank;
  entry.bytes.reserve(total);
  for (const Buffer& buffer : op.outputs)
    entry.bytes.append(reinterpret_cast<const char*>(buffer.data), buffer.size);
}

void SetupLog::answer(Operation& op) {
  const auto it = groups_.find(op.group->name());
  if (it == groups_.end()) return;
  Sequence& sequence = it->second;
  const size_t place = sequence.next++;
  const std::string who = "operation " + std::to_string(place) + " (" +
                          name(op.kind) + ") of group " + op.group->name();
  if (place >= sequence.entries.size() ||
      sequence.entries[place].kind != op.kind) {
    throw CollectiveMismatch(
        who +
            " is not in the set-up log; the script's set-up must do the same "
            "every time",
        -1, -1);
  }
  const Entry& entry = sequence.entries[place];
  if (entry.is_placeholder) return;
  if (entry.bytes.size() != resultBytes(op)) {
    throw CollectiveMismatch(who + " has " + std::to_string(resultBytes(op)) +
                                 " bytes of result, its predecessor had " +
                                 std::to_string(entry.bytes.size()),
                             -1, -1);
  }
  op.source_rank = entry.source_rank;
  const char* from = entry.bytes.data();
  for (const Buffer& buffer : op.outputs) {
    if (buffer.size > 0) std::memcpy(buffer.data, from, buffer.size);
    from += buffer.size;
  }
}

std::string SetupLog::serialize() const {
  std::string text = kMagic;
  put<uint64_t>(&text, groups_.size());
  for (const auto& [name, sequence] : groups_) {
    putString(&text, name);
    put<uint64_t>(&text, sequence.entries.size());
    for (const Entry& entry : sequence.entries) {
      put(&text, entry.kind);
      put(&text, static_cast<uint8_t>(entry.is_placeholder));
      put(&text, entry.source_rank);
      putString(&text, entry.bytes);
    }
  }
  const Digest digest = digestOf(text.data(), text.size());
  text.append(reinterpret_cast<const char*>(digest.data()), digest.size());
  return text;
}

SetupLog SetupLog::parse(const std::string& text) {
  if (text.empty()) return SetupLog();  // nothing is answered, all is skipped
  if (text.size() < kMagicBytes + sizeof(Digest) ||
      text.compare(0, kMagicBytes, kMagic) != 0) {
    throw std::invalid_argument("not a set-up log");
  }
  const size_t size = text.size() - sizeof(Digest);
  Digest digest;
  std::memcpy(digest.data(), text.data() + size, sizeof(Digest));
  if (!equalDigests(digest, digestOf(text.data(), size)))
    throw std::invalid_argument("the set-up log is damaged");
  Reader reader(text.data() + kMagicBytes, text.data() + size);
  SetupLog log;
  for (auto groups = reader.get<uint64_t>(); groups > 0; --groups) {
    const std::string name = reader.getString();
    auto& entries = log.groups_[name].entries;
    for (auto count = reader.get<uint64_t>(); count > 0; --count) {
      Entry entry;
      entry.kind = reader.get<Kind>();
      entry.is_placeholder = reader.get<uint8_t>() != 0;
      entry.source_rank = reader.get<int32_t>();
      entry.bytes = reader.getString();
      entries.push_back(std::move(entry));
    }
  }
  if (!reader.atEnd()) throw std::invalid_argument("the set-up log has a tail");
  return log;
}

}  // namespace mnemosyne::ccl
