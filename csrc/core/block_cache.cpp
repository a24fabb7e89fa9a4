#include "core/block_cache.h"

#include <iterator>
#include <utility>

namespace fastddp {

void* BlockCache::allocate(std::size_t bytes, Clock::time_point now) {
  decay(now);
  if (void* const block = take_idle(bytes)) return block;
  const std::size_t before = std::exchange(peak_, std::max(peak_, in_use_ + bytes));
  evict_to(limit() - in_use_ - bytes);  // first, so that the limit holds at every moment
  void* block = nullptr;
  try {
    block = allocate_(bytes);
  } catch (...) {
    peak_ = before;
    if (trim() == 0) throw;  // the memory kept here may be what is lacking
    block = allocate_(bytes);
    peak_ = std::max(peak_, in_use_ + bytes);
  }
  blocks_.emplace(block, bytes);
  in_use_ += bytes;
  return block;
}

bool BlockCache::release(void* block, Clock::time_point now) {
  decay(now);
  const auto found = blocks_.find(block);
  if (found == blocks_.end()) return false;
  const std::size_t bytes = found->second;
  idle_blocks_.push_back({block, bytes, now});
  by_size_.emplace(bytes, std::prev(idle_blocks_.end()));
  blocks_.erase(found);
  in_use_ -= bytes;
  idle_ += bytes;
  return true;
}

void BlockCache::decay(Clock::time_point now) {
  while (!idle_blocks_.empty() && now - idle_blocks_.front().freed_at >= patience_) evict_oldest();
  if (now - window_begin_ >= patience_) begin_window(now);
}

std::size_t BlockCache::trim() {
  const std::size_t bytes = idle_;
  evict_to(0);
  return bytes;
}

// The smallest block that fits and, among equals, the one freed last, which is most likely still in
// the processor's caches.
void* BlockCache::take_idle(std::size_t bytes) {
  const auto fit = by_size_.lower_bound(bytes);
  if (fit == by_size_.end() || fit->first - bytes > bytes / 8) return nullptr;
  const Block block = take_out(std::prev(by_size_.upper_bound(fit->first)));
  blocks_.emplace(block.data, block.bytes);
  in_use_ += block.bytes;
  peak_ = std::max(peak_, in_use_);
  return block.data;
}

// If a whole window went by without a call, nothing changed in it.
void BlockCache::begin_window(Clock::time_point now) {
  peak_before_ = now - window_begin_ < 2 * patience_ ? peak_ : in_use_;
  peak_ = in_use_;
  window_begin_ = now;
  evict_to(limit() - in_use_);
}

void BlockCache::evict_to(std::size_t bytes) {
  while (idle_ > bytes) evict_oldest();
}

void BlockCache::evict_oldest() {
  const Block oldest = take_out(by_size_.lower_bound(idle_blocks_.front().bytes));
  free_(oldest.data, oldest.bytes);
}

BlockCache::Block BlockCache::take_out(Sizes::iterator entry) {
  const Block block = *entry->second;
  idle_blocks_.erase(entry->second);
  by_size_.erase(entry);
  idle_ -= block.bytes;
  return block;
}

}  // namespace fastddp
