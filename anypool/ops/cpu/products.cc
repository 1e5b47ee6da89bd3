// The matrix products of a training step, and the softmax over the vocabulary between two of them.
//
// A projection by w (O, D) is x w^T; on the way back come y_bar w and y_bar^T x. Here each is one pass of packed blocks:
// nothing is transposed in memory. An element is summed over the depth in one order, however the work is split.
#include "tiles.h"

using namespace anypool;

namespace {

constexpr int64_t kDepth = 192;        // of a packed block
constexpr int64_t kBlockRows = 768;    // of a, packed: 576 KiB, in the second cache
constexpr int64_t kBlockColumns = 1024;

#ifdef __clang__
#define INTERLEAVE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define INTERLEAVE(a, b, ...) __builtin_shuffle(a, b, VecI{__VA_ARGS__})
#endif

// Rows of a 16 x 16 block become its columns: in each round, row i and row i + 8 become rows 2i and 2i + 1, mixed.
inline void transpose(Vec* rows) {
#pragma GCC unroll 4
  for (int round = 0; round < 4; ++round) {
    Vec mixed[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      const Vec a = rows[i], b = rows[i + kLanes / 2];
      mixed[2 * i] = INTERLEAVE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      mixed[2 * i + 1] = INTERLEAVE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
    std::memcpy(rows, mixed, sizeof(mixed));
  }
}

// `width` neighbours (12 or 32) of a matrix, for `depth` steps, stored together: [depth][width]. What is missing is 0.
// The matrix is held with the depth along its rows (stride between neighbours), or with the neighbours along them.
// Writes up to 16 floats past the end.
template <int Width>
void pack_along_depth(const float* from, int64_t stride, int64_t present, int64_t depth, float* to) {
  for (int64_t k = 0; k < depth; k += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, depth - k);
    for (int first = 0; first < Width; first += kLanes) {
      Vec rows[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        rows[i] = Vec{};
        if (first + i >= present || first + i >= Width) continue;
        const float* row = from + (first + i) * stride + k;
        if (count == kLanes) {
          rows[i] = load(row);
        } else {
          std::memcpy(&rows[i], row, count * sizeof(float));
        }
      }
      transpose(rows);
      // Ascending, so that where a vector is wider than what is stored, the next one puts it right.
      for (int64_t i = 0; i < count; ++i) store(to + (k + i) * Width + first, rows[i]);
    }
  }
}

template <int Width>
void pack_across_depth(const float* from, int64_t stride, int64_t present, int64_t depth, float* to) {
  for (int64_t k = 0; k < depth; ++k, from += stride, to += Width) {
    if (present >= Width) {
      std::memcpy(to, from, Width * sizeof(float));
    } else {
      std::memcpy(to, from, present * sizeof(float));
      std::memset(to + present, 0, (Width - present) * sizeof(float));
    }
  }
}

struct Product {
  int64_t rows, columns, depth;
  const float *a, *b;
  bool a_by_columns, b_by_columns;
  float* c;
};

// A block of c, in steps of the depth.
void multiply_block(const Product& p, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  const int64_t row_tiles = (rows + kRowTile - 1) / kRowTile, panels = (columns + kPanel - 1) / kPanel;
  float* a_packed = scratch(row_tiles * kRowTile * kDepth + 2 * kLanes + kPanel * kDepth);
  float* b_packed = a_packed + (row_tiles * kRowTile * kDepth + 2 * kLanes - 1) / kLanes * kLanes;
  for (int64_t k = 0; k < p.depth; k += kDepth) {
    const int64_t depth = std::min(kDepth, p.depth - k);
    for (int64_t t = 0; t < row_tiles; ++t) {
      const int64_t first = row + t * kRowTile, present = std::min<int64_t>(kRowTile, row + rows - first);
      float* to = a_packed + t * kRowTile * depth;
      if (p.a_by_columns) {
        pack_across_depth<kRowTile>(p.a + k * p.rows + first, p.rows, present, depth, to);
      } else {
        pack_along_depth<kRowTile>(p.a + first * p.depth + k, p.depth, present, depth, to);
      }
    }
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t first = column + panel * kPanel, present = std::min<int64_t>(kPanel, column + columns - first);
      if (p.b_by_columns) {
        pack_along_depth<kPanel>(p.b + first * p.depth + k, p.depth, present, depth, b_packed);
      } else {
        pack_across_depth<kPanel>(p.b + k * p.columns + first, p.columns, present, depth, b_packed);
      }
      for (int64_t t = 0; t < row_tiles; ++t) {
        const int64_t top = row + t * kRowTile, count = std::min<int64_t>(kRowTile, row + rows - top);
        const float* a_tile = a_packed + t * kRowTile * depth;
        float* c = p.c + top * p.columns + first;
        if (present == kPanel) {
          multiply_rest<kRowTile, 2, true>(count, a_tile, kRowTile, b_packed, kPanel, c, p.columns, depth, k > 0);
          continue;
        }
        float edge[kRowTile * kPanel];
        for (int64_t r = 0; r < count; ++r) std::memcpy(edge + r * kPanel, c + r * p.columns, present * sizeof(float));
        multiply_rest<kRowTile, 2, true>(count, a_tile, kRowTile, b_packed, kPanel, edge, kPanel, depth, k > 0);
        for (int64_t r = 0; r < count; ++r) std::memcpy(c + r * p.columns, edge + r * kPanel, present * sizeof(float));
      }
    }
  }
}

// a (M, K), or (K, M) if by columns; b (K, N), or (N, K) if by columns; c (M, N).
ffi::Error Multiply(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> a, ffi::Buffer<ffi::F32> b, ffi::ResultBuffer<ffi::F32> c,
                    bool a_by_columns, bool b_by_columns) {
  const int64_t rows = c->dimensions()[0], columns = c->dimensions()[1], depth = a.dimensions()[a_by_columns ? 0 : 1];
  if (b.dimensions()[b_by_columns ? 1 : 0] != depth) return ffi::Error::InvalidArgument("product: the depths differ");
  if (rows == 0 || columns == 0) return ffi::Error::Success();
  if (depth == 0) {
    std::memset(c->typed_data(), 0, rows * columns * sizeof(float));
    return ffi::Error::Success();
  }
  const Product p{rows, columns, depth, a.typed_data(), b.typed_data(), a_by_columns, b_by_columns, c->typed_data()};
  // Enough blocks that all threads end together, yet large ones: the smaller, the more often each side is packed.
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  const auto pieces = [](int64_t n, int64_t size) { return (n + size - 1) / size; };
  int64_t down = pieces(rows, kBlockRows), across = pieces(columns, kBlockColumns);
  while (down * across % threads != 0 && down * across < 16 * threads) ++down;
  while (down * across < 2 * threads && columns / (2 * across) >= 2 * kPanel) across *= 2;
  const int64_t height = pieces(pieces(rows, down), kRowTile) * kRowTile, width = pieces(pieces(columns, across), kPanel) * kPanel;
  down = pieces(rows, height);
  across = pieces(columns, width);
  parallel_for(pool, down * across, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t row = block / across * height, column = block % across * width;
      multiply_block(p, row, std::min(height, rows - row), column, std::min(width, columns - column));
    }
  });
  return ffi::Error::Success();
}

// ---- cross-entropy --------------------------------------------------------------------------------------------------
//
// For logits x with log-sum-exp z, the loss of a token is  z - x[target] + c z^2; its gradient in x, which takes the
// place of x, is  (1 + 2 c z) softmax(x) - onehot(target).  Both times the token's weight.

ffi::Error CrossEntropy(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> logits, ffi::Buffer<ffi::S32> targets, ffi::Buffer<ffi::F32> weights,
                        ffi::ResultBuffer<ffi::F32> bar, ffi::ResultBuffer<ffi::F32> entropy, ffi::ResultBuffer<ffi::F32> z_loss, float c) {
  const int64_t rows = logits.dimensions()[0], width = logits.dimensions()[1], whole = width / kLanes * kLanes;
  const float *from = logits.typed_data(), *weight = weights.typed_data();
  const int32_t* target = targets.typed_data();
  float *to = bar->typed_data(), *of_entropy = entropy->typed_data(), *of_z = z_loss->typed_data();
  parallel_for(pool, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float* x = from + r * width;
      float* y = to + r * width;
      if (weight[r] == 0.0f) {
        std::memset(y, 0, width * sizeof(float));
        of_entropy[r] = of_z[r] = 0.0f;
        continue;
      }
      const int64_t chosen = target[r];
      const bool known = chosen >= 0 && chosen < width;
      const float score = known ? x[chosen] : 0.0f;
      Vec peaks = splat(-INFINITY), sums = {};
      int64_t i = 0;
      for (; i < whole; i += kLanes) peaks = vmax(peaks, load(x + i));
      float peak = lane_max(peaks);
      for (; i < width; ++i) peak = std::max(peak, x[i]);
      // Parts of a few hundred first: a sum of tens of thousands in one go would lose digits.
      for (i = 0; i < whole;) {
        Vec part = {};
        for (const int64_t end = std::min(whole, i + 32 * kLanes); i < end; i += kLanes) {
          const Vec power = vexp(load(x + i) - peak);
          part += power;
          store(y + i, power);
        }
        sums += part;
      }
      float total = lane_sum(sums);
      for (; i < width; ++i) {
        y[i] = vexp(splat(x[i] - peak))[0];
        total += y[i];
      }
      const float z = std::log(total) + peak, factor = (1.0f + 2.0f * c * z) / total * weight[r];
      for (i = 0; i < whole; i += kLanes) store(y + i, load(y + i) * factor);
      for (; i < width; ++i) y[i] *= factor;
      if (known) y[chosen] -= weight[r];
      of_entropy[r] = weight[r] * (z - score);
      of_z[r] = weight[r] * c * z * z;
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(anypool_multiply, Multiply,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<bool>("a_by_columns")
                                  .Attr<bool>("b_by_columns"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(anypool_cross_entropy, CrossEntropy,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("c"));
