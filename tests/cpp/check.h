// A minimal test framework: CHECK, TEST, and a main that runs and counts the tests.
#pragma once

#include <cstdio>
#include <exception>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace check {

using Body = void (*)();

inline std::vector<std::pair<const char*, Body>>& tests() {
  static std::vector<std::pair<const char*, Body>> all;
  return all;
}

struct Registration {
  Registration(const char* name, Body body) { tests().emplace_back(name, body); }
};

[[noreturn]] inline void fail(const char* file, int line, const char* what) {
  throw std::runtime_error(std::string(file) + ":" + std::to_string(line) + ": " + what);
}

inline int run() {
  int num_failed = 0;
  for (const auto& [name, body] : tests()) {
    try {
      body();
    } catch (const std::exception& error) {
      ++num_failed;
      std::printf("FAILED %s: %s\n", name, error.what());
    }
  }
  std::printf("%d passed, %d failed\n", static_cast<int>(tests().size()) - num_failed, num_failed);
  return tests().empty() || num_failed > 0 ? 1 : 0;
}

}  // namespace check

#define CHECK(condition)                                             \
  do {                                                               \
    if (!(condition)) ::check::fail(__FILE__, __LINE__, #condition); \
  } while (false)

#define CHECK_THROWS(expression, Exception)                                                   \
  do {                                                                                        \
    bool thrown = false;                                                                      \
    try {                                                                                     \
      (void)(expression);                                                                     \
    } catch (const Exception&) {                                                              \
      thrown = true;                                                                          \
    }                                                                                         \
    if (!thrown) ::check::fail(__FILE__, __LINE__, #expression " did not throw " #Exception); \
  } while (false)

#define TEST(name)                                                    \
  static void name();                                                 \
  static const ::check::Registration name##_registered(#name, &name); \
  static void name()
