#include "common/sha256.h"

#include <string>

#include "test.h"

namespace mnemosyne::testing {
namespace {

Bytes bytes(const std::string& text) { return std::as_bytes(std::span(text)); }

std::string hex(const Digest& digest) {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (std::byte byte : digest) {
    text += kDigits[static_cast<int>(byte >> 4)];
    text += kDigits[static_cast<int>(byte & std::byte{15})];
  }
  return text;
}

}  // namespace

// FIPS 180-4 examples.
TEST(sha256_gives_the_published_digests) {
  EXPECT_EQ(hex(sha256(bytes(""))),
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(hex(sha256(bytes("abc"))),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(
      hex(sha256(bytes("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomno"
                       "pnopq"))),
      "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  EXPECT_EQ(hex(sha256(bytes(std::string(1'000'000, 'a')))),
            "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST(sha256_does_not_depend_on_how_the_text_is_cut) {
  const std::string text(300, 'x');
  for (size_t cut = 0; cut <= text.size(); cut += 7) {
    const Digest parts = Sha256()
                             .update(bytes(text).first(cut))
                             .update(bytes(text).subspan(cut))
                             .finish();
    EXPECT(equalDigests(parts, sha256(bytes(text))));
  }
}

// RFC 4231, test cases 1, 2 and 6.
TEST(hmac_gives_the_published_codes) {
  EXPECT_EQ(hex(hmacSha256(bytes(std::string(20, '\x0b')), bytes("Hi There"))),
            "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7");
  EXPECT_EQ(
      hex(hmacSha256(bytes("Jefe"), bytes("what do ya want for nothing?"))),
      "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
  EXPECT_EQ(hex(hmacSha256(bytes(std::string(131, '\xaa')),
                           bytes("Test Using Larger Than Block-Size Key - Hash "
                                 "Key First"))),
            "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54");
}

}  // namespace mnemosyne::testing
