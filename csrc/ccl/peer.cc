#include "ccl/peer.h"

#include <sys/epoll.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

namespace mnemosyne::ccl {
namespace {

// One peer that sends without end must not keep the others waiting.
constexpr size_t kReadBudget = 1 << 20;

// Where thrown-away payload goes. Nobody reads it.
std::byte* trash() {
  thread_local std::array<std::byte, 16 * 1024> bytes;
  return bytes.data();
}

constexpr size_t kTrashBytes = 16 * 1024;

uint64_t cost(uint64_t total) { return total + kMessageCost; }

}  // namespace

void Peer::attach(std::unique_ptr<Link> link, const Standing& theirs,
                  const Standing& ours) {
  link_ = std::move(link);
  state_ = State::kOpen;
  has_departed_ = false;
  at_ = theirs;
  linked_at_ = std::max(theirs.epoch, ours.epoch);
  in_header_bytes_ = in_left_ = 0;
  in_transfer_ = nullptr;
  in_to_ = nullptr;
  in_early_ = in_counted_ = false;
  out_header_left_ = out_left_ = 0;
  out_transfer_ = nullptr;
  // The epoch moved on while hands were shaken.
  if (ours.epoch != host_.epoch()) {
    FrameHeader marker;
    marker.type = FrameType::kMarker;
    marker.epoch = host_.epoch();
    marker.total = host_.membersDigest();
    control_.insert(control_.begin() + control_sent_, marker);
  }
  host_.onMarker(*this);
  host_.onWork(*this);
}

void Peer::drop(const std::string& why) {
  if (state_ == State::kGone) return;
  const bool was_sending = out_transfer_ != nullptr;
  state_ = State::kGone;
  if (link_) host_.onClosing(link_->fd());
  link_.reset();
  in_transfer_ = nullptr;
  out_transfer_ = nullptr;
  out_header_left_ = out_left_ = in_left_ = in_header_bytes_ = 0;
  control_.clear();
  control_sent_ = 0;
  const bool is_needed =
      was_sending || queue_first_ != nullptr ||
      std::any_of(outbound_.begin(), outbound_.end(),
                  [](const auto& entry) { return entry.second.sender; }) ||
      std::any_of(inbound_.begin(), inbound_.end(),
                  [](const auto& entry) { return entry.second.receiver; });
  if ((!has_departed_ && !is_excused) || is_needed) host_.onLost(*this, why);
}

void Peer::checkSilence(Milliseconds patience) {
  if (!link_ || !link_->isUnanswered(patience)) return;
  // The other side may have noticed first, and be on its way with a new link.
  if (letGo()) return host_.onUnlinked(*this);
  drop("its host has acknowledged nothing for " +
       std::to_string(patience.count()) + " ms");
}

bool Peer::letGo() {
  if (state_ != State::kOpen || has_departed_ || is_excused || has_spoken_ ||
      at_.epoch >= host_.epoch()) {
    return false;
  }
  discard();
  state_ = State::kUnlinked;
  has_spoken_ = true;  // once in an epoch: the next one may break as well
  out_header_left_ = out_left_ = 0;
  control_sent_ = 0;
  // The next handshake says what the marker does.
  std::erase_if(control_, [](const FrameHeader& frame) {
    return frame.type == FrameType::kMarker;
  });
  return true;
}

void Peer::discard() {
  state_ = State::kGone;
  if (link_) host_.onClosing(link_->fd());
  link_.reset();
}

// ---------------------------------------------------------------- messages

void Peer::post(Transfer* transfer) {
  transfer->is_send_ ? postSend(transfer) : postRecv(transfer);
  if (state_ == State::kGone && transfer->is_pending_)
    host_.onLost(*this, has_departed_ ? "it has left" : "its link is gone");
  else if (transfer->is_pending_ && hasLeft(transfer->key_))
    host_.onMissed(*this, transfer->key_);
  host_.onWork(*this);
}

void Peer::postSend(Transfer* transfer) {
  const size_t size = transfer->size_;
  transfer->is_credited_ = size <= kEagerBytes && cost(size) <= window_;
  if (transfer->is_credited_) {
    window_ -= cost(size);
    enqueue(transfer);
    return;
  }
  const auto [it, is_new] = outbound_.try_emplace(transfer->key_);
  Outbound& out = it->second;
  if (out.is_granted) {
    const bool same = fits(*transfer, out.total, out.signature);
    outbound_.erase(it);
    if (same) enqueue(transfer);
    return;
  }
  out.sender = transfer;
  // The receiver of a long message grants it unasked, unless it does not know
  // yet from whom it will receive.
  if (size <= kEagerBytes || transfer->key_.sequence & kPointToPoint)
    control(FrameType::kRequest, transfer->key_, transfer->op_signature(),
            size);
}

void Peer::postRecv(Transfer* transfer) {
  Inbound& in = inbound_[transfer->key_];
  const bool is_here = in.is_announced || in.is_complete || !in.early.empty();
  if (is_here && !fits(*transfer, in.total, in.signature)) return;
  if (in.is_complete) {
    if (in.total > 0) std::memcpy(transfer->data_, in.early.data(), in.total);
    giveBack(in.total);
    inbound_.erase(transfer->key_);
    transfer->finish();
    return;
  }
  in.receiver = transfer;
  if (in.is_announced || transfer->size_ > kEagerBytes)
    control(FrameType::kGrant, transfer->key_, transfer->op_signature(),
            transfer->size_);
}

void Peer::withdraw(Transfer* transfer) {
  if (!transfer->is_send_) {
    if (in_transfer_ == transfer) {
      in_transfer_ = nullptr;
      in_to_ = nullptr;
    }
    const auto it = inbound_.find(transfer->key_);
    if (it != inbound_.end() && it->second.receiver == transfer)
      it->second.receiver = nullptr;
    return;
  }
  const auto it = outbound_.find(transfer->key_);
  if (it != outbound_.end() && it->second.sender == transfer) {
    outbound_.erase(it);
    return;
  }
  if (out_transfer_ == transfer) {
    // The peer counts on the rest of the frame, and may complete its message
    // with it: it gets what it would have got.
    out_transfer_ = nullptr;
    if (out_header_left_ == sizeof(FrameHeader)) {
      out_header_left_ = out_left_ = 0;
      if (out_.credited) window_ += cost(out_.total);
    } else if (out_left_ > 0) {
      rest_.assign(out_from_, out_from_ + out_left_);
      out_from_ = rest_.data();
    }
    return;
  }
  if (unlink(transfer) && transfer->is_credited_)
    window_ += cost(transfer->size_);
}

bool Peer::hasArrived(const MessageKey& key) const {
  const auto it = inbound_.find(key);
  return it != inbound_.end() && it->second.receiver == nullptr &&
         (it->second.is_announced || it->second.is_complete);
}

bool Peer::fits(const Transfer& mine, uint64_t total, uint16_t signature) {
  if (mine.size_ == total && mine.op_signature() == signature) return true;
  control(FrameType::kReject, mine.key_, mine.op_signature(), mine.size_);
  host_.onMismatch(*this, mine.size_ == total
                              ? "it runs another operation, type, size or root"
                              : "its message has " + std::to_string(total) +
                                    " bytes, ours " +
                                    std::to_string(mine.size_));
  return false;
}

// Ranks that run different collectives may use different tags, so that no
// transfer of ours ever meets what they send: without this both would wait for
// ever.
bool Peer::isForeign() {
  if (!host_.contradicts(in_.key, in_.signature)) return false;
  tellForeign(in_.key);
  return true;
}

bool Peer::differs(const MessageKey& key, uint16_t signature) {
  const auto hasOther = [&](const auto& messages) {
    auto it = messages.lower_bound({key.group, key.sequence, 0});
    return it != messages.end() && it->first.group == key.group &&
           it->first.sequence == key.sequence &&
           it->second.signature != signature;
  };
  if (!hasOther(inbound_) && !hasOther(outbound_)) return false;
  tellForeign(key);
  return true;
}

void Peer::tellForeign(const MessageKey& key) {
  control(FrameType::kReject, key, 0, 0);
  host_.onMismatch(*this, "it runs another operation, type, size or root");
}

void Peer::giveBack(uint64_t total) {
  early_bytes_ -= std::min(early_bytes_, cost(total));
  owed_ += cost(total);
  if (owed_ < kWindowBytes / 4) return;
  control(FrameType::kCredit, {}, 0, std::exchange(owed_, 0));
}

void Peer::enqueue(Transfer* transfer) {
  transfer->queue_next_ = nullptr;
  transfer->queue_previous_ = queue_last_;
  (queue_last_ ? queue_last_->queue_next_ : queue_first_) = transfer;
  queue_last_ = transfer;
}

bool Peer::unlink(Transfer* transfer) {
  Transfer* next = transfer->queue_next_;
  Transfer* previous = transfer->queue_previous_;
  if (previous == nullptr && queue_first_ != transfer)
    return false;  // not in it
  (previous ? previous->queue_next_ : queue_first_) = next;
  (next ? next->queue_previous_ : queue_last_) = previous;
  transfer->queue_next_ = transfer->queue_previous_ = nullptr;
  return true;
}

void Peer::control(FrameType type, const MessageKey& key, uint16_t signature,
                   uint64_t total) {
  if (state_ == State::kGone) return;
  FrameHeader frame;
  frame.type = type;
  frame.key = key;
  frame.signature = signature;
  frame.total = total;
  frame.epoch = host_.epoch();
  control_.push_back(frame);
  host_.onWork(*this);
}

void Peer::fence() {
  inbound_.clear();
  outbound_.clear();
  window_ = kWindowBytes;
  owed_ = early_bytes_ = 0;
  left_.clear();
  in_to_ = nullptr;
  in_early_ = in_counted_ = false;
  control_.clear();
  control_sent_ = 0;
  has_spoken_ = false;
  // Its end may stand unread: it must be seen before anything of the new epoch
  // goes over it.
  if (link_) link_->onEvents(EPOLLIN);
  if (state_ == State::kOpen)
    control(FrameType::kMarker, {}, 0, host_.membersDigest());
}

void Peer::sayFarewell() {
  if (state_ == State::kOpen) control(FrameType::kFarewell, {}, 0, 0);
}

void Peer::sayClosed(uint64_t group, uint64_t generation, Closing why) {
  if (state_ != State::kOpen) return;
  control(FrameType::kClose, {group, generation << kGenerationShift, 0}, 0,
          static_cast<uint64_t>(why));
}

void Peer::forget(uint64_t group) {
  for (auto it = inbound_.begin(); it != inbound_.end();) {
    const Inbound& in = it->second;
    if (it->first.group != group || !host_.isClosed(it->first)) {
      ++it;
      continue;
    }
    if (in_early_ && in_.key == it->first) {
      in_early_ = false;  // the rest of it is thrown away
      in_to_ = nullptr;
      in_counted_ = true;
    } else if (in.is_complete) {
      giveBack(in.total);
    }
    it = inbound_.erase(it);
  }
  std::erase_if(outbound_, [&](const auto& entry) {
    return entry.first.group == group && host_.isClosed(entry.first);
  });
}

bool Peer::hasLeft(const MessageKey& key) const {
  const auto it = left_.find(key.group);
  return it != left_.end() && generationOf(key.sequence) < it->second;
}

void Peer::setLeft(const MessageKey& key) {
  uint64_t& generations = left_[key.group];
  generations = std::max(generations, generationOf(key.sequence) + 1);
}

// ---------------------------------------------------------------- in and out

void Peer::onEvents(uint32_t events) {
  if (link_) link_->onEvents(events);
  host_.onWork(*this);
}

void Peer::pump() {
  if (link_) receiveAll();
  if (link_) sendAll();
}

void Peer::receiveAll() {
  size_t budget = kReadBudget;
  while (link_ && !isAhead()) {
    size_t n;
    if (in_header_bytes_ < sizeof(in_)) {
      auto* to = reinterpret_cast<std::byte*>(&in_) + in_header_bytes_;
      n = link_->read(to, sizeof(in_) - in_header_bytes_);
      in_header_bytes_ += n;
      host_.onBytes(0, n);
      if (n == 0) break;
      // Read on: the end may stand right behind, and makes no event of its own.
      if (in_header_bytes_ < sizeof(in_)) continue;
      onHeader();
      if (!link_) return;
    } else {
      n = in_to_ ? link_->read(in_to_, in_left_)
                 : link_->read(trash(), std::min(in_left_, kTrashBytes));
      if (n == 0) break;
      if (in_to_) in_to_ += n;
      in_left_ -= n;
      host_.onBytes(0, n);
    }
    if (in_left_ == 0) {
      onPayloadEnd();
      in_header_bytes_ = 0;
    }
    if (n >= budget) {
      host_.onWork(*this);
      return;
    }
    budget -= n;
  }
  if (link_ && link_->ended()) onEnd();
}

void Peer::onHeader() {
  in_left_ = in_.payload_bytes;
  in_to_ = nullptr;
  in_transfer_ = nullptr;
  in_early_ = false;
  const bool is_data = in_.type == FrameType::kData;
  if (in_left_ > (is_data ? kChunkBytes : 0)) return refuse("too long a frame");
  if (in_.type == FrameType::kMarker) {
    if (in_.epoch < at_.epoch) return refuse("a marker of an older epoch");
    at_ = {in_.epoch, in_.total};
    return host_.onMarker(*this);
  }
  if (in_.type == FrameType::kFarewell) {
    has_departed_ = true;
    return;
  }
  // Of an older epoch, or for operations that were cancelled.
  if (in_.epoch != host_.epoch() || host_.hasFailed()) return;
  if (in_.type == FrameType::kClose) {
    if (in_.total > static_cast<uint64_t>(Closing::kLeft))
      return refuse("an unknown frame");
    return host_.onClose(*this, in_.key, static_cast<Closing>(in_.total));
  }
  const bool is_credit = in_.type == FrameType::kCredit;
  if (!is_data && !is_credit && host_.isClosed(in_.key)) return;
  switch (in_.type) {
    case FrameType::kData:
      return onData();
    case FrameType::kRequest:
      return onRequest();
    case FrameType::kGrant:
      return onGrant();
    case FrameType::kCredit:
      window_ = std::min(window_ + in_.total, kWindowBytes);
      return;
    case FrameType::kReject:
      return host_.onMismatch(*this, "it refused a message of ours");
    default:
      return refuse("an unknown frame");
  }
}

void Peer::onData() {
  if (in_.credited) {
    early_bytes_ += cost(in_.total);
    if (in_.total != in_.payload_bytes || early_bytes_ > kWindowBytes)
      return refuse("data beyond the window");
    in_counted_ = true;
  }
  if (host_.isClosed(in_.key)) return;  // thrown away
  Inbound& in = inbound_[in_.key];
  if (!in.receiver && isForeign()) return;
  if (Transfer* transfer = in.receiver) {
    if (!fits(*transfer, in_.total, in_.signature)) return;
    if (in_left_ > transfer->size_ - transfer->moved_)
      return refuse("data beyond the message");
    in_transfer_ = transfer;
    in_to_ = transfer->data_ + transfer->moved_;
    return;
  }
  if (!in_.credited || !in.early.empty() || in.is_complete)
    return refuse("data that nobody asked for");
  in.total = in_.total;
  in.signature = in_.signature;
  in.early.resize(in_.total);
  in_to_ = in.early.data();
  in_early_ = true;
  in_counted_ = false;  // until somebody takes it
}

void Peer::onPayloadEnd() {
  if (Transfer* transfer = std::exchange(in_transfer_, nullptr)) {
    transfer->moved_ += in_.payload_bytes;
    if (transfer->moved_ < transfer->size_) return;
    inbound_.erase(in_.key);
    if (std::exchange(in_counted_, false)) giveBack(in_.total);
    transfer->finish();
    return;
  }
  if (std::exchange(in_counted_, false)) giveBack(in_.total);
  if (!std::exchange(in_early_, false)) return;
  const auto it = inbound_.find(in_.key);
  if (it == inbound_.end()) return;
  Inbound& in = it->second;
  in.is_complete = true;
  if (Transfer* transfer = in.receiver) {  // it came while the payload did
    if (in.total > 0) std::memcpy(transfer->data_, in.early.data(), in.total);
    giveBack(in.total);
    inbound_.erase(it);
    transfer->finish();
  } else if (in_.key.sequence & kPointToPoint) {
    host_.onArrival(*this, in_.key);
  }
}

void Peer::onRequest() {
  Inbound& in = inbound_[in_.key];
  if (Transfer* transfer = in.receiver) {
    // A long one was granted when it was posted.
    if (fits(*transfer, in_.total, in_.signature) &&
        transfer->size_ <= kEagerBytes) {
      control(FrameType::kGrant, in_.key, in_.signature, in_.total);
    }
    return;
  }
  if (isForeign()) return;
  in.is_announced = true;
  in.total = in_.total;
  in.signature = in_.signature;
  if (in_.key.sequence & kPointToPoint) host_.onArrival(*this, in_.key);
}

void Peer::onGrant() {
  const auto [it, is_new] = outbound_.try_emplace(in_.key);
  Outbound& out = it->second;
  if (Transfer* transfer = out.sender) {
    outbound_.erase(it);
    if (fits(*transfer, in_.total, in_.signature)) enqueue(transfer);
    return;
  }
  if (isForeign()) return;
  out.is_granted = true;
  out.total = in_.total;
  out.signature = in_.signature;
}

void Peer::onEnd() {
  if (letGo()) return host_.onUnlinked(*this);
  drop(has_departed_ ? "it has left" : "its link closed without a farewell");
}

void Peer::refuse(const std::string& why) {
  has_departed_ = false;
  drop("it sent " + why);
}

bool Peer::hasOutput() const {
  return link_ && (out_header_left_ + out_left_ > 0 ||
                   control_sent_ < control_.size() || queue_first_);
}

void Peer::sendAll() {
  while (out_header_left_ + out_left_ > 0 || nextFrame()) {
    const auto* header = reinterpret_cast<const std::byte*>(&out_ + 1);
    const iovec parts[2] = {
        {const_cast<std::byte*>(header - out_header_left_), out_header_left_},
        {const_cast<std::byte*>(out_from_), out_left_}};
    const size_t wanted = out_header_left_ + out_left_;
    const size_t n = link_->write(parts, 2);
    host_.onBytes(n, 0);
    const size_t of_header = std::min(n, out_header_left_);
    out_header_left_ -= of_header;
    out_left_ -= n - of_header;
    out_from_ += n - of_header;
    if (out_header_left_ + out_left_ == 0) onFrameSent();
    if (n < wanted) break;
  }
  link_->flush();
}

bool Peer::nextFrame() {
  static constexpr std::byte kNothing{};
  out_from_ = &kNothing;
  out_left_ = 0;
  if (control_sent_ < control_.size()) {
    out_ = control_[control_sent_++];
    if (control_sent_ == control_.size()) {
      control_.clear();
      control_sent_ = 0;
    }
  } else if (Transfer* transfer = queue_first_) {
    unlink(transfer);
    out_transfer_ = transfer;
    out_left_ = std::min(transfer->size_ - transfer->moved_, kChunkBytes);
    out_from_ = transfer->data_ + transfer->moved_;
    out_ = {};
    out_.type = FrameType::kData;
    out_.credited = transfer->is_credited_;
    out_.signature = transfer->op_signature();
    out_.payload_bytes = static_cast<uint32_t>(out_left_);
    out_.epoch = host_.epoch();
    out_.key = transfer->key_;
    out_.total = transfer->size_;
  } else {
    return false;
  }
  has_spoken_ |= out_.type != FrameType::kMarker;
  out_header_left_ = sizeof(FrameHeader);
  return true;
}

void Peer::onFrameSent() {
  if (out_.type == FrameType::kFarewell) link_->endWriting();
  Transfer* transfer = std::exchange(out_transfer_, nullptr);
  if (transfer == nullptr) return;
  transfer->moved_ += out_.payload_bytes;
  if (transfer->moved_ < transfer->size_) {
    enqueue(transfer);
  } else {
    transfer->finish();
  }
}

}  // namespace mnemosyne::ccl
