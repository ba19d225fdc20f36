// A block of memory copied: a hand-off's.

#pragma once

#include <cstdint>
#include <cstring>

static void copy_block(char* target, const char* source, int64_t bytes) {
  std::memcpy(target, source, static_cast<size_t>(bytes));
}
