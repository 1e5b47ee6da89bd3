// What all kernels here are made of: vectors, sums over their lanes, the exponential, and the work split over threads.
//
// Vectors are GCC/Clang vector extensions of 16 floats: one AVX-512 register, two AVX2 or four NEON ones.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace anypool {

constexpr int kLanes = 16;
constexpr int kPanel = 32;       // columns stored together in what is packed
#ifdef __AVX512F__
constexpr int kRowTile = 12;     // 12 x 2 accumulators + 2 weights fill 32 registers
#else
constexpr int kRowTile = 3;
#endif

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef float VecU __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));
typedef int32_t VecI __attribute__((vector_size(kLanes * sizeof(int32_t))));

inline Vec load(const float* p) { return *reinterpret_cast<const VecU*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<VecU*>(p) = v; }
inline Vec splat(float x) { return Vec{} + x; }
inline Vec vmax(Vec a, Vec b) { return a > b ? a : b; }

// e^x for x <= 0 by 2^n * polynomial (Cephes expf, about 2 ulp); below -87 it is 0.
inline Vec vexp(Vec x) {
  const Vec floor_x = vmax(splat(-87.0f), x);  // in this order, NaN stays
  Vec n = floor_x * 1.44269504088896341f;
  const Vec magic = splat(12582912.0f);  // adding 1.5 * 2^23 rounds to the nearest integer
  n = (n + magic) - magic;
  Vec r = floor_x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const VecI bits = (__builtin_convertvector(n, VecI) + 127) << 23;
  Vec scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  return x < splat(-87.0f) ? Vec{} : p * scale;
}

inline float lane_max(Vec v) {
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = std::max(m, v[i]);
  return m;
}

inline float lane_sum(Vec v) {  // pairwise, always in this order
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) v[i] += v[i + width];
  return v[0];
}

// Runs f(begin, end) over [0, n) in pieces of `grain`, on the calling thread and XLA's own pool. Pieces are claimed
// from a counter, so a helper that starts late finds nothing to do and nobody waits for it.
template <typename F>
void parallel_for(ffi::ThreadPool& pool, int64_t n, int64_t grain, const F& f) {
  const int64_t helpers = std::min<int64_t>(pool.num_threads() - 1, (n + grain - 1) / grain - 1);
  if (helpers <= 0) {
    if (n > 0) f(int64_t{0}, n);
    return;
  }
  struct Job {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto job = std::make_shared<Job>();
  auto work = [n, grain](Job& j, const F& body) {
    for (;;) {
      const int64_t begin = j.next.fetch_add(grain);
      if (begin >= n) return;
      const int64_t end = std::min(begin + grain, n);
      body(begin, end);
      j.done.fetch_add(end - begin, std::memory_order_acq_rel);
    }
  };
  // `f` outlives every helper that claims a piece: this function returns only when all pieces are done.
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([job, work, &f] { work(*job, f); });
  work(*job, f);
  for (int spins = 0; job->done.load(std::memory_order_acquire) < n; ++spins)
    if (spins > 2000) std::this_thread::yield();
}

}  // namespace anypool
