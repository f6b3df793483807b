// Tile registers (AMX): eight, each of up to 16 rows of 16 steps, in which bfloat16 is multiplied where they are.
//
// An instruction multiplies a left operand, rows of 16 steps, by a right one, 16 steps of 16 columns, and adds the
// products to rows of 16 sums. A step is two neighbouring bfloat16, so operands are what gemm_pack.h says but that a left
// one is rows of steps. A row of the left operand reaches its own row of sums only.
#pragma once

#include <cstdint>
#include <type_traits>

#include "vec.h"

namespace pyarch {

// Where a thread that multiplies elements without tile registers would set them up.
struct NoTileRegisters {
  explicit NoTileRegisters(int64_t = 0) {}
};

#if defined(__AMX_BF16__)

constexpr int64_t MOST_TILE_ROWS = 16, TILE_STEPS = 16;

template <class T>
constexpr bool IN_TILES = std::is_same_v<T, bfloat16>;

// Asks the operating system for them, for the whole process; without its yes the first use ends the process.
bool permit_tile_registers();

// While it lives, the thread's tile registers are set up: 0 to 5 for sums and left operands of so many rows, 6 and 7 for
// right ones. What the thread's vectors make is flushed to zero where it would be subnormal, as tile registers do it: a
// hundred times as fast.
class TileRegisters {
 public:
  explicit TileRegisters(int64_t rows = MOST_TILE_ROWS);
  ~TileRegisters();
  TileRegisters(const TileRegisters&) = delete;

 private:
  const unsigned control_;
};

template <class T>
using TileRegistersFor = std::conditional_t<IN_TILES<T>, TileRegisters, NoTileRegisters>;

// The compiler does not know that tile instructions read and write memory.
ALWAYS_INLINE void memory_is_touched() { asm volatile("" ::: "memory"); }

#else

template <class T>
constexpr bool IN_TILES = false;

template <class T>
using TileRegistersFor = NoTileRegisters;

#endif

}  // namespace pyarch
