// Philox4x32-10, a random function of a counter: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2,
// 3" (2011).
#pragma once

#include <algorithm>
#include <cstdint>

namespace pyarch {

struct PhiloxKey {
  uint32_t low, high;

  static PhiloxKey of(uint64_t seed) { return {uint32_t(seed), uint32_t(seed >> 32)}; }
};

constexpr int PHILOX_BATCH = 16;  // counters that are worked on side by side

// Writes the four words of the counters (first + n, c1, c2, 0) one after another, for a whole batch of n.
// Words are kept in 64 bits, of which the upper half is never read.
inline void philox_batch(PhiloxKey key, uint32_t first, uint32_t c1, uint32_t c2, uint32_t* words) {
  uint64_t x0[PHILOX_BATCH], x1[PHILOX_BATCH], x2[PHILOX_BATCH], x3[PHILOX_BATCH];
  for (int n = 0; n < PHILOX_BATCH; ++n) {
    x0[n] = first + uint32_t(n);
    x1[n] = c1;
    x2[n] = c2;
    x3[n] = 0;
  }
  for (int round = 0; round < 10; ++round) {
    for (int n = 0; n < PHILOX_BATCH; ++n) {
      const uint64_t a = (x0[n] & 0xffffffffu) * 0xD2511F53u, b = (x2[n] & 0xffffffffu) * 0xCD9E8D57u;
      x0[n] = (b >> 32) ^ x1[n] ^ key.low;
      x1[n] = b;
      x2[n] = (a >> 32) ^ x3[n] ^ key.high;
      x3[n] = a;
    }
    key.low += 0x9E3779B9u;
    key.high += 0xBB67AE85u;
  }
  for (int n = 0; n < PHILOX_BATCH; ++n) {
    words[4 * n] = uint32_t(x0[n]);
    words[4 * n + 1] = uint32_t(x1[n]);
    words[4 * n + 2] = uint32_t(x2[n]);
    words[4 * n + 3] = uint32_t(x3[n]);
  }
}

// Says for `count` neighbours, from word 4 * first on, whether their word is at least the threshold; writes up to a
// whole batch of bytes more.
inline void philox_at_least(uint32_t threshold, PhiloxKey key, uint32_t first, uint32_t c1, uint32_t c2,
                            int64_t count, uint8_t* bytes) {
  constexpr int64_t WORDS = 4 * PHILOX_BATCH;
  uint32_t words[WORDS];
  for (int64_t begin = 0; begin < count; begin += WORDS) {
    philox_batch(key, first + uint32_t(begin / 4), c1, c2, words);
    for (int64_t n = 0; n < WORDS; ++n) bytes[begin + n] = words[n] >= threshold;
  }
}

}  // namespace pyarch
