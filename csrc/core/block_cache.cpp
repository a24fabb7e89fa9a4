#include "core/block_cache.h"

#include <algorithm>
#include <utility>

namespace fastddp {

void* BlockCache::allocate(std::size_t bytes) {
  allocated_ += bytes;
  while (!idle_blocks_.empty() &&
         allocated_ - idle_blocks_.front().freed_at > kPatience * std::max(peak_, bytes)) {
    evict_oldest();
  }
  if (void* const block = take_idle(bytes)) return block;
  const std::size_t before = std::exchange(peak_, std::max(peak_, in_use_ + bytes));
  evict_to(limit() - in_use_ - bytes);  // first, so that there is no moment of more
  void* block = nullptr;
  try {
    block = allocate_(bytes);
  } catch (...) {
    peak_ = before;
    if (idle_ == 0) throw;
    trim();  // what is kept here may be what is lacking
    block = allocate_(bytes);
    peak_ = std::max(peak_, in_use_ + bytes);
  }
  blocks_.emplace(block, bytes);
  in_use_ += bytes;
  return block;
}

bool BlockCache::release(void* block) {
  const auto found = blocks_.find(block);
  if (found == blocks_.end()) return false;
  const std::size_t bytes = found->second;
  idle_blocks_.push_back({block, bytes, allocated_});
  blocks_.erase(found);
  in_use_ -= bytes;
  idle_ += bytes;
  return true;
}

// The smallest that fits and, among equals, the last one freed, which is most likely still in the
// processor's caches.
void* BlockCache::take_idle(std::size_t bytes) {
  auto best = idle_blocks_.end();
  for (auto block = idle_blocks_.begin(); block != idle_blocks_.end(); ++block) {
    if (block->bytes < bytes || block->bytes - bytes > bytes / 8) continue;
    if (best == idle_blocks_.end() || block->bytes <= best->bytes) best = block;
  }
  if (best == idle_blocks_.end()) return nullptr;
  void* const data = best->data;
  const std::size_t size = best->bytes;
  blocks_.emplace(data, size);
  idle_blocks_.erase(best);
  idle_ -= size;
  in_use_ += size;
  peak_ = std::max(peak_, in_use_);
  return data;
}

void BlockCache::evict_to(std::size_t bytes) {
  while (idle_ > bytes) evict_oldest();
}

void BlockCache::evict_oldest() {
  const Block oldest = idle_blocks_.front();
  idle_blocks_.erase(idle_blocks_.begin());
  idle_ -= oldest.bytes;
  free_(oldest.data);
}

}  // namespace fastddp
