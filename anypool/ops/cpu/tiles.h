// Products of a few rows by one or two vectors of columns, which larger ones are made of.
#pragma once

#include <vector>

#include "common.h"

namespace anypool {

// Memory of a thread that only grows, so that no step takes fresh pages.
inline float* scratch(size_t floats) {
  thread_local std::vector<float> memory;
  if (memory.size() < floats + kLanes) memory.resize(floats + kLanes);
  return memory.data() + (kLanes - reinterpret_cast<uintptr_t>(memory.data()) / sizeof(float) % kLanes) % kLanes;
}

// ---- c = a b or c += a b, of a few rows by one or two vectors of columns --------------------------------------------
//
// a(r, k) is a[r * lda + k], or a[k * lda + r] if a is held by columns. b and c are held by rows.

template <int Rows, int Vectors, bool ByColumns>
void multiply_tile(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t depth, bool add) {
  Vec acc[Rows][Vectors];
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v) acc[r][v] = add ? load(c + r * ldc + v * kLanes) : Vec{};
  for (int64_t k = 0; k < depth; ++k) {
    Vec line[Vectors];
    for (int v = 0; v < Vectors; ++v) line[v] = load(b + k * ldb + v * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
      const float value = ByColumns ? a[k * lda + r] : a[r * lda + k];
      for (int v = 0; v < Vectors; ++v) acc[r][v] += line[v] * value;
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v) store(c + r * ldc + v * kLanes, acc[r][v]);
}

template <int Rows, int Vectors, bool ByColumns>
void multiply_rest(int64_t rows, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t depth, bool add) {
  if constexpr (Rows > 0) {
    if (rows == Rows) return multiply_tile<Rows, Vectors, ByColumns>(a, lda, b, ldb, c, ldc, depth, add);
    multiply_rest<Rows - 1, Vectors, ByColumns>(rows, a, lda, b, ldb, c, ldc, depth, add);
  }
}

// columns: a multiple of 16.
template <bool ByColumns>
void multiply(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
              int64_t ldc, bool add) {
  const int64_t step = ByColumns ? 1 : lda;
  int64_t column = 0;
  for (; column + 2 * kLanes <= columns; column += 2 * kLanes) {
    int64_t r = 0;
    for (; r + kRowTile <= rows; r += kRowTile)
      multiply_tile<kRowTile, 2, ByColumns>(a + r * step, lda, b + column, ldb, c + r * ldc + column, ldc, depth, add);
    multiply_rest<kRowTile - 1, 2, ByColumns>(rows - r, a + r * step, lda, b + column, ldb, c + r * ldc + column, ldc, depth, add);
  }
  if (column < columns) {
    int64_t r = 0;
    for (; r + kRowTile <= rows; r += kRowTile)
      multiply_tile<kRowTile, 1, ByColumns>(a + r * step, lda, b + column, ldb, c + r * ldc + column, ldc, depth, add);
    multiply_rest<kRowTile - 1, 1, ByColumns>(rows - r, a + r * step, lda, b + column, ldb, c + r * ldc + column, ldc, depth, add);
  }
}

}  // namespace anypool
