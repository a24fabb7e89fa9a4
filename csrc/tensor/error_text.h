#pragma once

#include <c10/util/Exception.h>

#include <exception>
#include <string>

namespace fastddp {

// Returns the text of an exception without the C++ stack frames that torch adds.
inline std::string text_of(const std::exception& error) {
  const auto* const of_torch = dynamic_cast<const c10::Error*>(&error);
  return of_torch != nullptr ? of_torch->what_without_backtrace() : error.what();
}

}  // namespace fastddp
