// Blocks of memory copied from and to scattered places: a hand-off's. copies.py is its only caller.

#pragma once

#include <cstdint>
#include <cstring>

extern "C" void copy_blocks(char* target, const char* source, const int64_t* target_blocks,
                            const int64_t* source_blocks, int64_t blocks,
                            int64_t bytes) noexcept {
  for (int64_t i = 0; i < blocks; ++i) {
    std::memcpy(target + target_blocks[i] * bytes, source + source_blocks[i] * bytes,
                static_cast<size_t>(bytes));
  }
}
