#include "shm/layout.h"

#include <bit>
#include <new>

namespace fastddp::shm {
namespace {

std::uint64_t pack(const Call& call) {
  return static_cast<std::uint64_t>(call.kind) | static_cast<std::uint64_t>(call.element) << 8 |
         static_cast<std::uint64_t>(call.reduction) << 16 |
         static_cast<std::uint64_t>(call.staged) << 24 |
         static_cast<std::uint64_t>(call.elsewhere) << 25 |
         static_cast<std::uint64_t>(call.root) << 32;
}

void unpack(std::uint64_t what, Call& call) {
  call.kind = static_cast<Kind>(what & 0xFF);
  call.element = static_cast<Element>(what >> 8 & 0xFF);
  call.reduction = static_cast<Reduction>(what >> 16 & 0xFF);
  call.staged = (what >> 24 & 1) != 0;
  call.elsewhere = (what >> 25 & 1) != 0;
  call.root = static_cast<std::uint32_t>(what >> 32);
}

}  // namespace

void PublishedCall::write(Time number, const Call& call) {
  const std::uint64_t doubled = number * 2;
  // A sequence lock: the number is odd while the parts are written. The parts are atomics, and
  // their stores are releases, so a reader that sees one part of this call also sees the odd
  // number. (H. Boehm, "Can Seqlocks Get Along With Programming Language Memory Models?", MSPC
  // 2012.) The store of the odd number is a release too, so a reader that finds a call replaced
  // also sees what its rank did before.
  number_.store(doubled + 1, std::memory_order_release);
  what_.store(pack(call), std::memory_order_release);
  numel_.store(call.numel, std::memory_order_release);
  operand_.store(call.operand, std::memory_order_release);
  label_.store(call.label, std::memory_order_release);
  began_.store(call.began, std::memory_order_release);
  const auto type = std::bit_cast<std::array<std::uint64_t, 2>>(call.type);
  for (std::size_t i = 0; i < type.size(); ++i) type_[i].store(type[i], std::memory_order_release);
  number_.store(doubled, std::memory_order_release);
}

bool PublishedCall::read(Time number, Call& call) const {
  const std::uint64_t doubled = number * 2;
  if (number_.load(std::memory_order_acquire) != doubled) return false;
  unpack(what_.load(std::memory_order_acquire), call);
  call.numel = numel_.load(std::memory_order_acquire);
  call.operand = operand_.load(std::memory_order_acquire);
  call.label = label_.load(std::memory_order_acquire);
  call.began = began_.load(std::memory_order_acquire);
  std::array<std::uint64_t, 2> type{};
  for (std::size_t i = 0; i < type.size(); ++i) type[i] = type_[i].load(std::memory_order_acquire);
  call.type = std::bit_cast<TypeName>(type);
  return number_.load(std::memory_order_acquire) == doubled;
}

void Layout::construct() const {
  const Nonce nonce = header().nonce;
  auto* const made = new (base_) Header;
  made->nonce = nonce;
  made->ranks = static_cast<std::uint32_t>(ranks_);
  for (std::size_t i = 0; i < ranks_; ++i) new (&rank(i)) RankBlock;
}

}  // namespace fastddp::shm
