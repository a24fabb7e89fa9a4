// The names of collectives in messages.
#include <cctype>
#include <cstring>
#include <string>

#include "shm/group.h"
#include "shm/label.h"

namespace fastddp::shm {
namespace {

const char* name_of(Element element) {
  switch (element) {
    case Element::kFloat32:
      return "float32";
    case Element::kFloat64:
      return "float64";
    case Element::kFloat16:
      return "float16";
    case Element::kBFloat16:
      return "bfloat16";
    case Element::kInt8:
      return "int8";
    case Element::kUInt8:
      return "uint8";
    case Element::kInt16:
      return "int16";
    case Element::kInt32:
      return "int32";
    case Element::kInt64:
      return "int64";
    case Element::kBool:
      return "bool";
  }
  return "elements of an unknown type";
}

const char* name_of(Reduction reduction) {
  switch (reduction) {
    case Reduction::kSum:
      return "sum";
    case Reduction::kAvg:
      return "average";
    case Reduction::kProduct:
      return "product";
    case Reduction::kMin:
      return "minimum";
    case Reduction::kMax:
      return "maximum";
    case Reduction::kBand:
      return "bitwise and";
    case Reduction::kBor:
      return "bitwise or";
    case Reduction::kBxor:
      return "bitwise xor";
  }
  return "?";
}

std::string printable(const TypeName& type) {
  std::string text(type.data(), ::strnlen(type.data(), type.size()));
  for (char& c : text) {
    if (std::isprint(static_cast<unsigned char>(c)) == 0) c = '?';
  }
  return text;
}

}  // namespace

const char* name_of(Kind kind) {
  switch (kind) {
    case Kind::kBarrier:
      return "barrier";
    case Kind::kAllReduce:
      return "all_reduce";
    case Kind::kReduceScatter:
      return "reduce_scatter";
    case Kind::kAllGather:
      return "all_gather";
    case Kind::kBroadcast:
      return "broadcast";
    case Kind::kReduce:
      return "reduce";
    case Kind::kGather:
      return "gather";
    case Kind::kScatter:
      return "scatter";
    case Kind::kAllToAll:
      return "all_to_all";
    case Kind::kMonitoredBarrier:
      return "monitored_barrier";
    case Kind::kRefused:
      return "a collective with wrong arguments, for which it raised an error";
    case Kind::kUnknown:
      break;
  }
  return "another collective";
}

std::string Group::describe_difference(const std::string& one,
                                       const Call& its_call,
                                       const std::string& other,
                                       const Call& others_call) const {
  const bool differ_in_label = its_call.label != others_call.label;
  const auto part = [&](const std::string& who, const Call& call) {
    std::string text = who + " called " + describe(call);
    if (differ_in_label && call.label == 0) text += ", for " + describe_label(0);
    return text;
  };
  std::string text = part(one, its_call) + ", " + part(other, others_call);
  const std::uint32_t owner = Label::owner_of(its_call.label);
  const std::uint32_t others_owner = Label::owner_of(others_call.label);
  if (owner != others_owner && owner != 0 && others_owner != 0) {
    text +=
        "; the losses of several wrapped models must be built and run in the same order on all "
        "ranks";
  }
  return text;
}

std::string Group::describe(const Call& call) const {
  std::string text = name_of(call.kind);
  const bool has_root = call.kind == Kind::kBroadcast || call.kind == Kind::kReduce ||
                        call.kind == Kind::kGather || call.kind == Kind::kScatter;
  if (has_root) text += " with root " + std::to_string(call.root);
  if (call.kind != Kind::kBarrier && call.kind <= Kind::kBroadcast && !call.elsewhere) {
    text += " of " + std::to_string(call.numel) + " " + name_of(call.element);
    if (call.type != TypeName{}) text += " in " + printable(call.type);
    if (call.kind == Kind::kAllReduce || call.kind == Kind::kReduceScatter)
      text += std::string(", ") + name_of(call.reduction);
  }
  if (call.elsewhere && call.kind <= Kind::kBroadcast) text += ", handed to another backend";
  if (call.label != 0) text += ", for " + describe_label(call.label);
  return text;
}

std::string Group::describe_current() const {
  return "collective " + std::to_string(count()) + " (" + describe(calls_[me_]) + ")";
}

}  // namespace fastddp::shm
