#include "proxy/address_space.h"

#include <random>

#include "test.h"

using mnemosyne::proxy::AddressSpace;

TEST(equal_requests_get_equal_addresses) {
  AddressSpace first(0x1000, 0x100000, 0x1000),
      second(0x1000, 0x100000, 0x1000);
  for (const uint64_t size : {1u, 4096u, 4097u, 0u, 70000u}) {
    EXPECT(first.allocate(size)->address == second.allocate(size)->address);
  }
}

TEST(a_gap_is_used_again_by_what_fits) {
  AddressSpace space(0, 0x10000, 0x1000);
  const auto a = space.allocate(0x2000), b = space.allocate(0x1000);
  EXPECT(a->address == 0 && b->address == 0x2000);
  EXPECT(space.release(a->address)->size_bytes == 0x2000);
  EXPECT(space.allocate(0x3000)->address == 0x3000);
  EXPECT(space.allocate(0x1800)->address == 0);
  EXPECT(!space.release(0x1000).has_value());
}

TEST(what_does_not_fit_is_refused) {
  AddressSpace space(0x1000, 0x5000, 0x1000);
  EXPECT(!space.allocate(0x4001).has_value());
  EXPECT(!space.allocate(UINT64_MAX).has_value());
  EXPECT(space.allocate(0x4000).has_value());
  EXPECT(!space.allocate(1).has_value());
}

TEST(an_address_inside_finds_its_block) {
  AddressSpace space(0x1000, 0x100000, 0x1000);
  const auto block = space.allocate(0x2000);
  EXPECT(space.find(block->address + 0x1fff)->address == block->address);
  EXPECT(!space.find(block->address + 0x2000).has_value());
  EXPECT(!space.find(0xfff).has_value());
}

TEST(blocks_never_overlap) {
  AddressSpace space(0, 1 << 24, 4096);
  std::mt19937 random(3);
  for (int round = 0; round < 3000; ++round) {
    const auto blocks = space.blocks();
    if (random() % 3 == 0 && !blocks.empty()) {
      space.release(blocks[random() % blocks.size()].address);
    } else {
      space.allocate(random() % 300000);
    }
    uint64_t end = 0;
    for (const auto& block : space.blocks()) {
      EXPECT(block.address >= end);
      end = block.address + block.size_bytes;
    }
    EXPECT(end <= 1 << 24);
  }
}
