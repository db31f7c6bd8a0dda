// Just enough to write tests whose names are sentences.
#pragma once

#include <functional>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>

namespace mnemosyne::testing {

struct Registration {
  Registration(const char* name, std::function<void()> body);
};

template <typename A, typename B>
void expectEqual(const A& a, const B& b, const char* what, int line) {
  if (a == b) return;
  std::ostringstream text;
  text << "line " << line << ": " << what << ": " << a << " != " << b;
  throw std::runtime_error(text.str());
}

inline void expect(bool holds, const char* what, int line) {
  if (!holds)
    throw std::runtime_error("line " + std::to_string(line) + ": " + what);
}

template <typename Error, typename Body>
void expectThrows(Body&& body, const char* what, int line) {
  try {
    body();
  } catch (const Error&) {
    return;
  }
  throw std::runtime_error("line " + std::to_string(line) + ": " + what +
                           " did not throw");
}

}  // namespace mnemosyne::testing

#define TEST(name)                                                             \
  static void name();                                                          \
  static const mnemosyne::testing::Registration register_##name(#name, &name); \
  static void name()
#define EXPECT(condition) \
  mnemosyne::testing::expect((condition), #condition, __LINE__)
#define EXPECT_EQ(a, b) \
  mnemosyne::testing::expectEqual((a), (b), #a " == " #b, __LINE__)
#define EXPECT_THROWS(Error, expression)                                    \
  mnemosyne::testing::expectThrows<Error>([&] { expression; }, #expression, \
                                          __LINE__)
