// Sets up tile registers; see tile_registers.h.
#include "tile_registers.h"

#if defined(__AMX_BF16__)

#include <sys/syscall.h>
#include <unistd.h>

namespace pyarch {

bool permit_tile_registers() {
  constexpr long REQUEST_PERMISSION = 0x1023,
                 TILE_DATA = 18;  // of Linux's asm/prctl.h and of the XCR0 register
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

TileRegisters::TileRegisters(int64_t rows) : control_(_mm_getcsr()) {
  constexpr unsigned FLUSH_TO_ZERO = 0x8000;  // of the MXCSR register
  constexpr int REGISTERS_OF_TILES = 8, FIRST_RIGHT = 6;
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_a_row[16] = {};
    uint8_t rows[16] = {};
  } settings;
  for (int tile = 0; tile < REGISTERS_OF_TILES; ++tile) {
    settings.bytes_a_row[tile] = TILE_STEPS * sizeof(float);
    settings.rows[tile] = uint8_t(tile < FIRST_RIGHT ? rows : TILE_STEPS);
  }
  memory_is_touched();
  _tile_loadconfig(&settings);
  _mm_setcsr(control_ | FLUSH_TO_ZERO);
}

TileRegisters::~TileRegisters() {
  _tile_release();
  _mm_setcsr(control_);
}

}  // namespace pyarch

#endif
