#include "shm/messages.h"

namespace fastddp::shm {

// Returns null for streams beyond the limit: they are never counted.
Messages::Count* Messages::count_of(const Stream& stream) {
  if (counts_.size() >= kStreamsKept && !counts_.contains(stream)) return nullptr;
  return &counts_.try_emplace(stream, 0).first->second;
}

std::optional<std::uint64_t> Messages::announce(End end,
                                                std::size_t peer,
                                                std::uint32_t tag,
                                                std::uint64_t bytes) {
  last_ = nullptr;
  last_count_ = count_of({end, peer, tag});
  if (last_count_ == nullptr || !last_count_->has_value()) return {};
  std::uint32_t& nth = **last_count_;
  if (++nth == 0) ++nth;  // with tag 0, number 0 would mean an empty entry
  const std::uint64_t message = std::uint64_t{tag} << 32 | nth;
  MessageLog& log = layout_.messages(me_, peer, end);
  last_ = &log.entries[written_[{end, peer}]++ % kMessagesKept];
  last_->message = 0;
  last_->bytes = bytes;
  last_->message = message;
  const End other = end == End::kSender ? End::kReceiver : End::kSender;
  for (const MessageLog::Entry& theirs : layout_.messages(peer, me_, other).entries) {
    if (theirs.message != message) continue;
    const std::uint64_t their_bytes = theirs.bytes;
    if (theirs.message == message) return their_bytes;  // the entry was not replaced meanwhile
  }
  return {};
}

void Messages::withdraw() {
  if (last_ == nullptr) return;
  last_->message = 0;
  --**last_count_;
  last_ = nullptr;
}

void Messages::take_from_anybody(std::uint32_t tag) {
  for (std::size_t peer = 0; peer < ranks_; ++peer) {
    if (Count* const count = count_of({End::kReceiver, peer, tag})) count->reset();
  }
}

}  // namespace fastddp::shm
