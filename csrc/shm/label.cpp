#include "shm/label.h"

#include <map>
#include <mutex>

namespace fastddp::shm {
namespace {

// The most bytes of a name; a message holds two names.
constexpr std::size_t kNameBytes = 200;

thread_local std::uint64_t current_label = 0;

struct Owners {
  std::mutex mutex;
  std::map<std::uint32_t, std::string> names;
};

// Never destroyed, because a collective may fail while the process ends.
Owners& owners() {
  static auto& all = *new Owners;
  return all;
}

// Cuts a text, but not in the middle of a UTF-8 character.
std::string shortened(const std::string& text) {
  if (text.size() <= kNameBytes) return text;
  std::size_t end = kNameBytes;
  while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) --end;
  return text.substr(0, end) + "...";
}

std::string describe_owner(std::uint32_t owner) {
  if (owner == 0) return "the script itself";
  const std::lock_guard lock(owners().mutex);
  const auto found = owners().names.find(owner);
  return found != owners().names.end() ? found->second
                                       : "the wrapped model number " + std::to_string(owner);
}

}  // namespace

std::uint64_t Label::current() { return current_label; }

std::uint64_t Label::set(std::uint64_t label) {
  const std::uint64_t previous = current_label;
  current_label = label;
  return previous;
}

void name_owner(std::uint32_t owner, const std::string& text) {
  const std::lock_guard lock(owners().mutex);
  owners().names.insert_or_assign(owner, shortened(text));
  while (owners().names.size() > kOwnersKept) owners().names.erase(owners().names.begin());
}

std::string describe_label(std::uint64_t label) {
  const std::string owner = describe_owner(Label::owner_of(label));
  if (label == 0 || Label::what_of(label) == Label::kWhole) return owner;
  return "bucket " + std::to_string(Label::what_of(label)) + " of " + owner;
}

}  // namespace fastddp::shm
