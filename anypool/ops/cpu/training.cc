// Fused f32 operations of a training step, each with what it gives back on the way back.
//
// XLA:CPU writes every score of attention to memory several times over, and norms and gates in as many passes as they
// have operations. Here a tile of queries keeps its scores in the cache, and a row is read once.
//
// Sums are in one fixed order however the work is split over threads: the same step twice has the same bits.
#include <vector>

#include "tiles.h"

using namespace anypool;

namespace {

// ---- packed attention -----------------------------------------------------------------------------------------------
//
// One task is a row of the batch and a head: keys transposed in panels of 32, [S / 32][H][32], so that the scores of 32
// keys are two vectors and no sum crosses lanes. Panels of which no query of the tile sees a key are left out.

constexpr int kQueries = 2 * 12;  // in a tile: two of the products' own

struct Shape {
  int64_t rows, queries, keys, heads, kv_heads, dim, window;
  const int32_t *q_segments, *q_positions, *k_segments, *k_positions;
  float scale;
  int64_t padded_keys() const { return (keys + kPanel - 1) / kPanel * kPanel; }
  int64_t stride() const { return padded_keys() + kLanes; }  // of scores: never a power of two, which would share cache sets
  int64_t query_at(int64_t row, int64_t t, int64_t head) const { return ((row * queries + t) * heads + head) * dim; }
  int64_t key_at(int64_t row, int64_t s, int64_t head) const { return ((row * keys + s) * kv_heads + head) * dim; }
};

void pack_panels(const Shape& s, const float* keys, int64_t row, int64_t head, float* panels) {
  for (int64_t first = 0; first < s.padded_keys(); first += kPanel, panels += s.dim * kPanel) {
    for (int64_t i = 0; i < kPanel; ++i) {
      if (first + i < s.keys) {
        const float* key = keys + s.key_at(row, first + i, head);
        for (int64_t d = 0; d < s.dim; ++d) panels[d * kPanel + i] = key[d];
      } else {
        for (int64_t d = 0; d < s.dim; ++d) panels[d * kPanel + i] = 0.0f;
      }
    }
  }
}

void pack_rows(const Shape& s, const float* values, int64_t row, int64_t head, float* rows) {
  for (int64_t i = 0; i < s.keys; ++i) std::memcpy(rows + i * s.dim, values + s.key_at(row, i, head), s.dim * sizeof(float));
  std::memset(rows + s.keys * s.dim, 0, (s.padded_keys() - s.keys) * s.dim * sizeof(float));
}

struct Run {
  int64_t first, count;  // panels
};

// Sets the scores of a tile to 0 where a key is seen and to minus infinity elsewhere, in panels that any query sees.
void mask(const Shape& s, int64_t row, int64_t first_query, int64_t count, float* scores, std::vector<Run>& runs) {
  const int32_t *segments = s.k_segments + row * s.keys, *positions = s.k_positions + row * s.keys;
  const VecI lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const int32_t window = s.window > 0 ? static_cast<int32_t>(std::min<int64_t>(s.window, INT32_MAX)) : INT32_MAX;
  runs.clear();
  for (int64_t first = 0; first < s.padded_keys(); first += kPanel) {
    VecI any = {};
    for (int64_t half = first; half < first + kPanel; half += kLanes) {
      const int64_t left = std::min<int64_t>(kLanes, s.keys - half);
      VecI segment = {}, position = {};
      if (left > 0) {
        std::memcpy(&segment, segments + half, left * sizeof(int32_t));
        std::memcpy(&position, positions + half, left * sizeof(int32_t));
      }
      for (int64_t i = 0; i < count; ++i) {
        const int64_t t = row * s.queries + first_query + i;
        const VecI distance = s.q_positions[t] - position;
        const VecI seen = (segment == s.q_segments[t]) & (distance >= 0) & (distance < window) & (lane < static_cast<int32_t>(left));
        any |= seen;
        store(scores + i * s.stride() + half, seen ? Vec{} : splat(-INFINITY));
      }
    }
    bool live = false;
    for (int i = 0; i < kLanes; ++i) live |= any[i] != 0;
    if (!live) continue;
    const int64_t panel = first / kPanel;
    if (!runs.empty() && runs.back().first + runs.back().count == panel) {
      ++runs.back().count;
    } else {
      runs.push_back({panel, 1});
    }
  }
}

void pack_queries(const Shape& s, const float* queries, int64_t row, int64_t first, int64_t count, int64_t head, float scale, float* tile) {
  for (int64_t i = 0; i < count; ++i) {
    const float* query = queries + s.query_at(row, first + i, head);
    for (int64_t d = 0; d < s.dim; d += kLanes) store(tile + i * s.dim + d, load(query + d) * scale);
  }
}

// scores (count, keys) = or += queries (count, dim) by panels.
void score(const Shape& s, int64_t count, const float* tile, const float* panels, float* scores, const std::vector<Run>& runs, bool add) {
  for (const Run& run : runs)
    for (int64_t p = run.first; p < run.first + run.count; ++p)
      multiply<false>(count, kPanel, s.dim, tile, s.dim, panels + p * s.dim * kPanel, kPanel, scores + p * kPanel, s.stride(), add);
}

// out (count, dim) = weights (count, keys) by rows (keys, dim).
void weigh(const Shape& s, int64_t count, const float* weights, const float* rows, float* out, const std::vector<Run>& runs) {
  bool add = false;
  for (const Run& run : runs) {
    const int64_t first = run.first * kPanel;
    multiply<false>(count, s.dim, run.count * kPanel, weights + first, s.stride(), rows + first * s.dim, s.dim, out, s.dim, add);
    add = true;
  }
  if (!add) std::memset(out, 0, count * s.dim * sizeof(float));
}

// out (keys, dim) += weights (count, keys) transposed, by rows (count, dim).
void gather(const Shape& s, int64_t count, const float* weights, const float* rows, float* out, const std::vector<Run>& runs) {
  for (const Run& run : runs) {
    const int64_t first = run.first * kPanel;
    multiply<true>(run.count * kPanel, s.dim, count, weights + first, s.stride(), rows, s.dim, out + first * s.dim, s.dim, true);
  }
}

void attend(const Shape& s, int64_t row, int64_t head, const float* q, const float* k, const float* v, float* out, float* peaks) {
  const int64_t kv_head = head / (s.heads / s.kv_heads), padded = s.padded_keys();
  float* panels = scratch(2 * padded * s.dim + kQueries * (2 * s.dim + s.stride()));
  float* values = panels + padded * s.dim;
  float* tile = values + padded * s.dim;
  float* sums = tile + kQueries * s.dim;
  float* scores = sums + kQueries * s.dim;
  std::vector<Run> runs;
  pack_panels(s, k, row, kv_head, panels);
  pack_rows(s, v, row, kv_head, values);
  for (int64_t first = 0; first < s.queries; first += kQueries) {
    const int64_t count = std::min<int64_t>(kQueries, s.queries - first);
    mask(s, row, first, count, scores, runs);
    pack_queries(s, q, row, first, count, head, s.scale, tile);
    score(s, count, tile, panels, scores, runs, true);
    float inverse[kQueries];
    for (int64_t i = 0; i < count; ++i) {
      float* line = scores + i * s.stride();
      Vec peak = splat(-INFINITY), sum = {};
      for (const Run& run : runs)
        for (int64_t j = run.first * kPanel; j < (run.first + run.count) * kPanel; j += kLanes) peak = vmax(peak, load(line + j));
      const float top = lane_max(peak), zero = top == -INFINITY ? 0.0f : top;  // a query that sees nothing
      for (const Run& run : runs)
        for (int64_t j = run.first * kPanel; j < (run.first + run.count) * kPanel; j += kLanes) {
          const Vec weight = vexp(load(line + j) - zero);
          sum += weight;
          store(line + j, weight);
        }
      const float total = lane_sum(sum);
      inverse[i] = total > 0 ? 1.0f / total : 0.0f;
      peaks[(row * s.heads + head) * s.queries + first + i] = total > 0 ? zero + std::log(total) : 0.0f;
    }
    weigh(s, count, scores, values, sums, runs);
    for (int64_t i = 0; i < count; ++i) {
      float* result = out + s.query_at(row, first + i, head);
      for (int64_t d = 0; d < s.dim; d += kLanes) store(result + d, load(sums + i * s.dim + d) * inverse[i]);
    }
  }
}

void attend_back(const Shape& s, int64_t row, int64_t kv_head, const float* q, const float* k, const float* v, const float* out,
                 const float* peaks, const float* out_bar, float* q_bar, float* k_bar, float* v_bar) {
  const int64_t group = s.heads / s.kv_heads, size = s.padded_keys() * s.dim;
  float* panels = scratch(5 * size + kQueries * (3 * s.dim + 2 * s.stride()));
  float* value_panels = panels + size;
  float* keys = value_panels + size;
  float* key_sums = keys + size;
  float* value_sums = key_sums + size;
  float* tile = value_sums + size;
  float* bars = tile + kQueries * s.dim;
  float* sums = bars + kQueries * s.dim;
  float* scores = sums + kQueries * s.dim;
  float* score_bars = scores + kQueries * s.stride();
  std::vector<Run> runs;
  pack_panels(s, k, row, kv_head, panels);
  pack_panels(s, v, row, kv_head, value_panels);
  pack_rows(s, k, row, kv_head, keys);
  std::memset(key_sums, 0, 2 * size * sizeof(float));
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    for (int64_t first = 0; first < s.queries; first += kQueries) {
      const int64_t count = std::min<int64_t>(kQueries, s.queries - first);
      mask(s, row, first, count, scores, runs);
      pack_queries(s, q, row, first, count, head, s.scale, tile);
      pack_queries(s, out_bar, row, first, count, head, 1.0f, bars);
      score(s, count, tile, panels, scores, runs, true);
      score(s, count, bars, value_panels, score_bars, runs, false);
      for (int64_t i = 0; i < count; ++i) {
        const float* result = out + s.query_at(row, first + i, head);
        Vec product = {};
        for (int64_t d = 0; d < s.dim; d += kLanes) product += load(result + d) * load(bars + i * s.dim + d);
        const float mean = lane_sum(product), peak = peaks[(row * s.heads + head) * s.queries + first + i];
        for (const Run& run : runs)
          for (int64_t j = run.first * kPanel; j < (run.first + run.count) * kPanel; j += kLanes) {
            const int64_t at = i * s.stride() + j;
            const Vec weight = vexp(load(scores + at) - peak);
            store(scores + at, weight);
            store(score_bars + at, weight * (load(score_bars + at) - mean));
          }
      }
      gather(s, count, scores, bars, value_sums, runs);
      gather(s, count, score_bars, tile, key_sums, runs);
      weigh(s, count, score_bars, keys, sums, runs);
      for (int64_t i = 0; i < count; ++i) {
        float* result = q_bar + s.query_at(row, first + i, head);
        for (int64_t d = 0; d < s.dim; d += kLanes) store(result + d, load(sums + i * s.dim + d) * s.scale);
      }
    }
  }
  for (int64_t i = 0; i < s.keys; ++i) {
    std::memcpy(k_bar + s.key_at(row, i, kv_head), key_sums + i * s.dim, s.dim * sizeof(float));
    std::memcpy(v_bar + s.key_at(row, i, kv_head), value_sums + i * s.dim, s.dim * sizeof(float));
  }
}

using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;
using Result = ffi::ResultBuffer<ffi::F32>;

Shape shape_of(const F32& q, const F32& k, const S32& q_segments, const S32& q_positions, const S32& k_segments,
               const S32& k_positions, float scale, int64_t window) {
  const auto of_q = q.dimensions(), of_k = k.dimensions();
  return {of_q[0], of_q[1], of_k[1], of_q[2], of_k[2], of_q[3], window, q_segments.typed_data(), q_positions.typed_data(),
          k_segments.typed_data(), k_positions.typed_data(), scale};
}

// q, out [B, T, N, H]; k, v [B, S, K, H]; segments and positions [B, T] and [B, S]; peaks [B, N, T].
ffi::Error PackedAttention(ffi::ThreadPool pool, F32 q, F32 k, F32 v, S32 q_segments, S32 q_positions, S32 k_segments,
                           S32 k_positions, Result out, Result peaks, float scale, int64_t window) {
  const Shape s = shape_of(q, k, q_segments, q_positions, k_segments, k_positions, scale, window);
  if (s.dim % kLanes != 0 || s.heads % s.kv_heads != 0)
    return ffi::Error::InvalidArgument("packed_attention: head_dim must be a multiple of 16");
  parallel_for(pool, s.rows * s.heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task)
      attend(s, task / s.heads, task % s.heads, q.typed_data(), k.typed_data(), v.typed_data(), out->typed_data(), peaks->typed_data());
  });
  return ffi::Error::Success();
}

ffi::Error PackedAttentionBack(ffi::ThreadPool pool, F32 q, F32 k, F32 v, S32 q_segments, S32 q_positions, S32 k_segments,
                               S32 k_positions, F32 out, F32 peaks, F32 out_bar, Result q_bar, Result k_bar, Result v_bar,
                               float scale, int64_t window) {
  const Shape s = shape_of(q, k, q_segments, q_positions, k_segments, k_positions, scale, window);
  parallel_for(pool, s.rows * s.kv_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task)
      attend_back(s, task / s.kv_heads, task % s.kv_heads, q.typed_data(), k.typed_data(), v.typed_data(), out.typed_data(),
                  peaks.typed_data(), out_bar.typed_data(), q_bar->typed_data(), k_bar->typed_data(), v_bar->typed_data());
  });
  return ffi::Error::Success();
}

// ---- rms_norm, on the way back --------------------------------------------------------------------------------------
//
// With y = x r g, r = 1 / sqrt(mean(x^2) + eps):  x_bar = r (g y_bar - x r^2 mean(x g y_bar)),  g_bar = sum of x r y_bar.

constexpr int64_t kNormRows = 64;  // whose g_bar is summed first; the same on every machine

ffi::Error RmsNormBack(ffi::ThreadPool pool, F32 x, F32 scale, F32 y_bar, Result x_bar, Result scale_bar, float eps) {
  const int64_t width = scale.dimensions()[0];
  const int64_t rows = width == 0 ? 0 : static_cast<int64_t>(x.element_count()) / width;
  const int64_t pieces = (rows + kNormRows - 1) / kNormRows;
  const float *xs = x.typed_data(), *g = scale.typed_data(), *ys = y_bar.typed_data();
  float* result = x_bar->typed_data();
  std::vector<float> partial(pieces * width, 0.0f);
  parallel_for(pool, pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      float* sums = partial.data() + piece * width;
      for (int64_t r = piece * kNormRows; r < std::min(rows, (piece + 1) * kNormRows); ++r) {
        const float *row = xs + r * width, *bar = ys + r * width;
        Vec squares = {}, products = {};
        int64_t i = 0;
        for (; i + kLanes <= width; i += kLanes) {
          const Vec a = load(row + i);
          squares += a * a;
          products += a * load(g + i) * load(bar + i);
        }
        float square = lane_sum(squares), product = lane_sum(products);
        for (; i < width; ++i) {
          square += row[i] * row[i];
          product += row[i] * g[i] * bar[i];
        }
        const float inverse = 1.0f / std::sqrt(square / static_cast<float>(width) + eps);
        const float back = inverse * inverse * inverse * product / static_cast<float>(width);
        for (i = 0; i + kLanes <= width; i += kLanes) {
          const Vec a = load(row + i), b = load(bar + i);
          store(result + r * width + i, load(g + i) * b * inverse - a * back);
          store(sums + i, load(sums + i) + a * inverse * b);
        }
        for (; i < width; ++i) {
          result[r * width + i] = g[i] * bar[i] * inverse - row[i] * back;
          sums[i] += row[i] * inverse * bar[i];
        }
      }
    }
  });
  float* total = scale_bar->typed_data();
  std::memset(total, 0, width * sizeof(float));
  for (int64_t piece = 0; piece < pieces; ++piece)
    for (int64_t i = 0; i < width; ++i) total[i] += partial[piece * width + i];
  return ffi::Error::Success();
}

// ---- silu(gate) * up, on the way back -------------------------------------------------------------------------------

ffi::Error SiluMulBack(ffi::ThreadPool pool, F32 gate, F32 up, F32 bar, Result gate_bar, Result up_bar) {
  const int64_t n = static_cast<int64_t>(gate.element_count());
  const float *gs = gate.typed_data(), *us = up.typed_data(), *bs = bar.typed_data();
  float *of_gate = gate_bar->typed_data(), *of_up = up_bar->typed_data();
  const auto one = [](Vec g, Vec u, Vec b, Vec& g_bar, Vec& u_bar) {
    const Vec e = vexp(g < Vec{} ? g : -g);  // of -|g|: never overflows
    const Vec sigmoid = (g < Vec{} ? e : splat(1.0f)) / (1.0f + e);
    u_bar = b * g * sigmoid;
    g_bar = b * u * sigmoid * (1.0f + g * (1.0f - sigmoid));
  };
  parallel_for(pool, (n + kLanes - 1) / kLanes, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t i = block * kLanes, left = std::min<int64_t>(kLanes, n - i);
      Vec g = {}, u = {}, b = {}, g_bar, u_bar;
      if (left == kLanes) {
        one(load(gs + i), load(us + i), load(bs + i), g_bar, u_bar);
        store(of_gate + i, g_bar);
        store(of_up + i, u_bar);
      } else {
        std::memcpy(&g, gs + i, left * sizeof(float));
        std::memcpy(&u, us + i, left * sizeof(float));
        std::memcpy(&b, bs + i, left * sizeof(float));
        one(g, u, b, g_bar, u_bar);
        std::memcpy(of_gate + i, &g_bar, left * sizeof(float));
        std::memcpy(of_up + i, &u_bar, left * sizeof(float));
      }
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(anypool_packed_attention, PackedAttention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<S32>()
                                  .Arg<S32>()
                                  .Arg<S32>()
                                  .Arg<S32>()
                                  .Ret<F32>()
                                  .Ret<F32>()
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("window"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(anypool_packed_attention_back, PackedAttentionBack,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<S32>()
                                  .Arg<S32>()
                                  .Arg<S32>()
                                  .Arg<S32>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Ret<F32>()
                                  .Ret<F32>()
                                  .Ret<F32>()
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("window"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(anypool_rms_norm_back, RmsNormBack,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Ret<F32>()
                                  .Ret<F32>()
                                  .Attr<float>("eps"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(anypool_silu_mul_back, SiluMulBack,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Arg<F32>().Arg<F32>().Ret<F32>().Ret<F32>());
