// Parameters of the kernels in layouts.cu, as the host sees them too.
#pragma once

struct Padded {
  char tag;
  double value;
  short count;
};

struct Nested {
  char first;
  Padded padded;
  float* pointers[3];
};

struct Byte {
  char only;
};

// As a CUtensorMap: aligned to more than any constant bank's parameters begin.
struct alignas(64) Aligned {
  unsigned long long words[16];
};

// Above 4 KiB it needs the newer way to describe it.
struct Large {
  char bytes[20001];
};
struct Medium {
  char bytes[4353];
};
