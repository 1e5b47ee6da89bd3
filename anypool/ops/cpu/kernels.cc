// Fused f32 operations for XLA on the CPU, called through XLA's foreign function interface.
//
// XLA:CPU multiplies a few rows by a large matrix far below what the memory or the vector units allow, and a paged
// cache costs it a gathered copy per layer. These kernels read weights and cache once, in place.
//
// One rule binds all of them: the value of an output element depends on that token's own inputs alone, in one fixed
// order of operations, whatever else is in the batch and however the work is split over threads. So a token computed
// in a batch of 32, alone, or as part of a prefill has the same bits: a stream replayed elsewhere is the same stream.
#include "common.h"

using namespace anypool;

namespace {

constexpr int kBlock = 16;       // tokens in a cache block, and query tokens in a tile
constexpr int kQueryTile = 4;    // queries that share one pass over a pair of cache blocks

// ---- linear: y_TO = x_TK @ w_OK.T, with w packed as [ceil(O / 32), K, 32] -------------------------------------------

template <int Rows>
void multiply_panel(const float* x, int64_t depth, const float* w, float* y, int64_t y_stride, int64_t columns) {
  Vec acc[Rows][2] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const Vec w0 = load(w + k * kPanel), w1 = load(w + k * kPanel + kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
      const float value = x[r * depth + k];
      acc[r][0] += w0 * value;
      acc[r][1] += w1 * value;
    }
  }
  for (int r = 0; r < Rows; ++r) {
    if (columns == kPanel) {
      store(y + r * y_stride, acc[r][0]);
      store(y + r * y_stride + kLanes, acc[r][1]);
    } else {
      for (int64_t c = 0; c < columns; ++c) y[r * y_stride + c] = acc[r][c / kLanes][c % kLanes];
    }
  }
}

template <int Rows>
void multiply_tail(int64_t rows, const float* x, int64_t depth, const float* w, float* y, int64_t stride, int64_t columns) {
  if constexpr (Rows > 0) {
    if (rows == Rows) return multiply_panel<Rows>(x, depth, w, y, stride, columns);
    multiply_tail<Rows - 1>(rows, x, depth, w, y, stride, columns);
  }
}

ffi::Error Linear(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::RemainingArgs weights, ffi::RemainingRets outputs) {
  const int64_t rows = x.dimensions()[0], depth = x.dimensions()[1];
  constexpr int kMax = 8;
  if (weights.size() > kMax || weights.size() != outputs.size())
    return ffi::Error::InvalidArgument("linear: one output for each of at most 8 weights");
  const float* w[kMax];
  float* y[kMax];
  int64_t width[kMax], first_panel[kMax + 1] = {0};
  const int count = static_cast<int>(weights.size());
  for (int i = 0; i < count; ++i) {
    auto weight = weights.get<ffi::Buffer<ffi::F32>>(i);
    auto output = outputs.get<ffi::Buffer<ffi::F32>>(i);
    if (!weight.has_value() || !output.has_value() || (*weight).dimensions()[1] != depth)
      return ffi::Error::InvalidArgument("linear: weights must be packed f32 of x's depth");
    w[i] = (*weight).typed_data();
    y[i] = (*output)->typed_data();
    width[i] = (*output)->dimensions()[1];
    first_panel[i + 1] = first_panel[i] + (width[i] + kPanel - 1) / kPanel;
  }
  const int64_t panels = first_panel[count];
  const float* x_data = x.typed_data();
  // Small pieces balance the threads; a panel is 128 * K bytes, so even one is a long sequential read.
  const int64_t grain = std::max<int64_t>(1, std::min<int64_t>(8, panels / (4 * std::max<int64_t>(1, pool.num_threads()))));
  parallel_for(pool, panels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      int i = 0;
      while (panel >= first_panel[i + 1]) ++i;
      const int64_t column = (panel - first_panel[i]) * kPanel;
      const float* panel_w = w[i] + (panel - first_panel[i]) * depth * kPanel;
      const int64_t columns = std::min<int64_t>(kPanel, width[i] - column);
      int64_t r = 0;
      for (; r + kRowTile <= rows; r += kRowTile)
        multiply_panel<kRowTile>(x_data + r * depth, depth, panel_w, y[i] + r * width[i] + column, width[i], columns);
      multiply_tail<kRowTile - 1>(rows - r, x_data + r * depth, depth, panel_w, y[i] + r * width[i] + column, width[i], columns);
    }
  });
  return ffi::Error::Success();
}

// ---- rms_norm: x / sqrt(mean(x^2) + eps) * scale, over the last axis ------------------------------------------------

ffi::Error RmsNorm(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> scale,
                   ffi::ResultBuffer<ffi::F32> out, float eps) {
  const int64_t width = scale.dimensions()[0];
  const int64_t rows = width == 0 ? 0 : static_cast<int64_t>(x.element_count()) / width;
  const float *xs = x.typed_data(), *g = scale.typed_data();
  float* ys = out->typed_data();
  parallel_for(pool, rows, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, width)), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float* row = xs + r * width;
      Vec sum = {};
      int64_t i = 0;
      for (; i + kLanes <= width; i += kLanes) {
        const Vec v = load(row + i);
        sum += v * v;
      }
      float total = lane_sum(sum);
      for (; i < width; ++i) total += row[i] * row[i];
      const float inv = 1.0f / std::sqrt(total / static_cast<float>(width) + eps);
      for (i = 0; i + kLanes <= width; i += kLanes) store(ys + r * width + i, load(row + i) * inv * load(g + i));
      for (; i < width; ++i) ys[r * width + i] = row[i] * inv * g[i];
    }
  });
  return ffi::Error::Success();
}

// ---- silu_mul: silu(gate) * up ---------------------------------------------------------------------------------------

ffi::Error SiluMul(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> gate, ffi::Buffer<ffi::F32> up, ffi::ResultBuffer<ffi::F32> out) {
  const int64_t n = static_cast<int64_t>(gate.element_count());
  const float *g = gate.typed_data(), *u = up.typed_data();
  float* y = out->typed_data();
  const auto silu_mul = [](Vec a, Vec b) {
    const Vec magnitude = a < Vec{} ? a : -a;       // -|a|: the exponential never overflows
    const Vec e = vexp(magnitude);
    const Vec sigmoid = (a < Vec{} ? e : splat(1.0f)) / (1.0f + e);
    return a * sigmoid * b;
  };
  parallel_for(pool, (n + kLanes - 1) / kLanes, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t i = block * kLanes, left = std::min<int64_t>(kLanes, n - i);
      if (left == kLanes) {
        store(y + i, silu_mul(load(g + i), load(u + i)));
      } else {
        Vec a = {}, b = {};
        std::memcpy(&a, g + i, left * sizeof(float));
        std::memcpy(&b, u + i, left * sizeof(float));
        const Vec result = silu_mul(a, b);
        std::memcpy(y + i, &result, left * sizeof(float));
      }
    }
  });
  return ffi::Error::Success();
}

// ---- blank: memory as the allocator gives it ------------------------------------------------------------------------
//
// Large allocations are fresh pages, which cost nothing until a block is first used. Paged attention never lets what it
// has not written reach a result, so the cache needs no zeros.

ffi::Error Blank(ffi::ResultBuffer<ffi::F32>) { return ffi::Error::Success(); }

// ---- paged attention: append this step's keys and values to the cache, then attend ----------------------------------
//
// A cache block holds, for each key-value head, the keys of 16 tokens transposed, [H, 16], and their values, [16, H].
// Scores of 16 keys are one vector and no sum crosses lanes; keys are always taken from position 0 upwards, 32 at a
// time from a multiple of 32, so a token's result does not depend on who asks for it. Slots that no token of the
// sequence has written are never read as values, and as keys only to be masked: a new cache may hold anything.

struct Cache {
  float* data;
  int64_t kv_heads, head_dim;
  float* keys(int64_t block, int64_t head) const { return data + (block * kv_heads + head) * 2 * kBlock * head_dim; }
  float* values(int64_t block, int64_t head) const { return keys(block, head) + kBlock * head_dim; }
};

constexpr int kMaxHeadVectors = 16;  // head_dim up to 256

template <int Queries>
void attend(const float* const* q, float* const* out, const int64_t* position, const Cache& cache, int64_t head,
            const int32_t* table, float scale, int64_t window) {
  const int64_t dim = cache.head_dim, dim_vectors = dim / kLanes;
  Vec acc[Queries][kMaxHeadVectors];
  float peak[Queries], denominator[Queries];
  int64_t first_key = INT64_MAX, last = 0, oldest[Queries];  // the first key each query may see
  for (int i = 0; i < Queries; ++i) {
    oldest[i] = window > 0 ? std::max<int64_t>(0, position[i] - window + 1) : 0;
    first_key = std::min(first_key, oldest[i]);
    for (int64_t d = 0; d < dim_vectors; ++d) acc[i][d] = Vec{};
    peak[i] = -INFINITY;
    denominator[i] = 0.0f;
    last = std::max(last, position[i]);
  }
  const VecI lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int64_t first = first_key / (2 * kBlock) * (2 * kBlock); first <= last; first += 2 * kBlock) {
    const bool second = first + kBlock <= last;
    const int32_t block0 = table[first / kBlock], block1 = second ? table[first / kBlock + 1] : block0;
    const float *k0 = cache.keys(block0, head), *k1 = cache.keys(block1, head);
    Vec s[Queries][2] = {};
    for (int64_t d = 0; d < dim; ++d) {
      const Vec key0 = load(k0 + d * kBlock), key1 = load(k1 + d * kBlock);
#pragma GCC unroll 4
      for (int i = 0; i < Queries; ++i) {
        s[i][0] += key0 * q[i][d];
        s[i][1] += key1 * q[i][d];
      }
    }
    float weight[Queries][2 * kBlock];
    for (int i = 0; i < Queries; ++i) {
      if (first > position[i] || first + 2 * kBlock <= oldest[i]) {
        std::memset(weight[i], 0, sizeof(weight[i]));
        continue;
      }
      const int32_t visible = static_cast<int32_t>(std::min<int64_t>(position[i] - first + 1, 2 * kBlock));
      const int32_t too_old = static_cast<int32_t>(std::max<int64_t>(oldest[i] - first, 0));
      const Vec hidden = splat(-INFINITY);
      const Vec s0 = (lane < visible) & (lane >= too_old) ? s[i][0] * scale : hidden;
      const Vec s1 = (lane + kBlock < visible) & (lane + kBlock >= too_old) ? s[i][1] * scale : hidden;
      const float new_peak = std::max(peak[i], lane_max(vmax(s0, s1)));
      const Vec p0 = vexp(s0 - new_peak), p1 = vexp(s1 - new_peak);
      const Vec shrink = vexp(splat(peak[i] - new_peak));
      denominator[i] = denominator[i] * shrink[0] + lane_sum(p0 + p1);
      peak[i] = new_peak;
      for (int64_t d = 0; d < dim_vectors; ++d) acc[i][d] *= shrink;
      store(weight[i], p0);
      store(weight[i] + kBlock, p1);
    }
    const float *v0 = cache.values(block0, head), *v1 = cache.values(block1, head);
    const int64_t keys = std::min<int64_t>(last - first + 1, 2 * kBlock);
    for (int64_t d = 0; d < dim_vectors; ++d) {
      Vec sum[Queries];
      for (int i = 0; i < Queries; ++i) sum[i] = acc[i][d];
      for (int64_t j = 0; j < keys; ++j) {
        const Vec value = load((j < kBlock ? v0 + j * dim : v1 + (j - kBlock) * dim) + d * kLanes);
#pragma GCC unroll 4
        for (int i = 0; i < Queries; ++i) sum[i] += value * weight[i][j];
      }
      for (int i = 0; i < Queries; ++i) acc[i][d] = sum[i];
    }
  }
  for (int i = 0; i < Queries; ++i) {
    const float inverse = 1.0f / denominator[i];
    for (int64_t d = 0; d < dim_vectors; ++d) store(out[i] + d * kLanes, acc[i][d] * inverse);
  }
}

// q [T, N, H]; k, v [T, K, H]; cache [blocks, K, 2, 16 * H]; start, count [R]; table [R, M]; T = decode + 16 * (R - decode).
ffi::Error PagedAttention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::F32> k, ffi::Buffer<ffi::F32> v,
                          ffi::Buffer<ffi::F32> cache_in, ffi::Buffer<ffi::S32> start, ffi::Buffer<ffi::S32> count,
                          ffi::Buffer<ffi::S32> table, ffi::ResultBuffer<ffi::F32> out, ffi::ResultBuffer<ffi::F32> cache_out,
                          int64_t decode, float scale, int64_t window) {
  const int64_t heads = q.dimensions()[1], dim = q.dimensions()[2], kv_heads = k.dimensions()[1];
  const int64_t rows = start.dimensions()[0], table_width = table.dimensions()[1];
  if (dim % kLanes != 0 || dim > kMaxHeadVectors * kLanes || heads % kv_heads != 0)
    return ffi::Error::InvalidArgument("paged_attention: head_dim must be a multiple of 16, at most 256");
  if (cache_in.typed_data() != cache_out->typed_data())
    std::memcpy(cache_out->typed_data(), cache_in.typed_data(), cache_in.size_bytes());
  const Cache cache{cache_out->typed_data(), kv_heads, dim};
  const float *qs = q.typed_data(), *ks = k.typed_data(), *vs = v.typed_data();
  float* outs = out->typed_data();
  const int32_t *starts = start.typed_data(), *counts = count.typed_data(), *tables = table.typed_data();
  const auto first_token = [decode](int64_t row) { return row < decode ? row : decode + (row - decode) * kBlock; };
  const auto row_tokens = [decode](int64_t row) { return row < decode ? int64_t{1} : int64_t{kBlock}; };

  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < counts[row]; ++i) {
      const int64_t token = first_token(row) + i, position = starts[row] + i, slot = position % kBlock;
      const int64_t block = tables[row * table_width + position / kBlock];
      for (int64_t head = 0; head < kv_heads; ++head) {
        const float* key = ks + (token * kv_heads + head) * dim;
        float* keys = cache.keys(block, head);
        for (int64_t d = 0; d < dim; ++d) keys[d * kBlock + slot] = key[d];
        std::memcpy(cache.values(block, head) + slot * dim, vs + (token * kv_heads + head) * dim, dim * sizeof(float));
      }
    }
  }

  const int64_t group = heads / kv_heads;
  parallel_for(pool, rows * kv_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row = item / kv_heads, head = item % kv_heads;
      const int64_t base = first_token(row), total = row_tokens(row) * group, live = counts[row] * group;
      const float* query[kQueryTile];
      float* result[kQueryTile];
      int64_t position[kQueryTile];
      for (int64_t next = 0; next < live; next += kQueryTile) {
        const int64_t n = std::min<int64_t>(kQueryTile, live - next);
        for (int64_t i = 0; i < n; ++i) {
          const int64_t token = (next + i) / group;
          const int64_t offset = ((base + token) * heads + head * group + (next + i) % group) * dim;
          query[i] = qs + offset;
          result[i] = outs + offset;
          position[i] = starts[row] + token;
        }
        const int32_t* row_table = tables + row * table_width;
        switch (n) {
          case 1: attend<1>(query, result, position, cache, head, row_table, scale, window); break;
          case 2: attend<2>(query, result, position, cache, head, row_table, scale, window); break;
          case 3: attend<3>(query, result, position, cache, head, row_table, scale, window); break;
          default: attend<4>(query, result, position, cache, head, row_table, scale, window);
        }
      }
      for (int64_t next = live; next < total; ++next)  // padding: defined, and never read
        std::memset(outs + ((base + next / group) * heads + head * group + next % group) * dim, 0, dim * sizeof(float));
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(anypool_linear, Linear,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::F32>>().RemainingArgs().RemainingRets());
XLA_FFI_DEFINE_HANDLER_SYMBOL(anypool_rms_norm, RmsNorm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("eps"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(anypool_silu_mul, SiluMul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(anypool_blank, Blank, ffi::Ffi::Bind().Ret<ffi::Buffer<ffi::F32>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(anypool_paged_attention, PagedAttention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("decode")
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("window"));
