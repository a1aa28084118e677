// The arithmetic of kernel.cpp: vectors, exp, element types, KV cache layouts, products, softmax.
//
// Both products are C[m][n] += sum_k A[m][k] * B[k][n] with B as the cache has it; A and C are
// fp32. Keys and values in 16 bits are widened in registers: on the CPUs we measured, two FMAs are
// faster than the one AVX-512 bf16 dot product that would do the same, and they round nothing.
// AMX is much faster than either; it is used where there are rows enough to fill its tiles.
//
// Vectors are the compiler's own, so that the same code runs with AVX-512, AVX2 and NEON. They are as
// long as the machine's: of longer ones GCC keeps none in registers and compares lane by lane, which
// made the AVX2 kernel 5 times slower than the AVX-512 one in decoding, and 50 times in a prefill.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#if defined(__F16C__) || defined(__AMX_BF16__)
#include <immintrin.h>
#endif
#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int COLUMNS = 16;  // of a group in vLLM's layout "amx"
constexpr int MAX_ROWS = 48;  // (query row, head) pairs of a unit: AMX holds as many
constexpr int MAX_KEYS = 128;  // keys of a tile: the logits of all rows stay in L1
constexpr int KEY_STRIDE = MAX_KEYS + 32;  // of a row of logits; the excess is zero, for AMX
constexpr int ROWS = 6;  // of a product held in registers, at most

// Floats in a vector, and how many vectors beside each other a product of `rows` rows holds in
// registers: a power of two. AVX-512 has 32 registers, the others may have no more than 16.
#if defined(__AVX512F__)
constexpr int LANES = 16;
constexpr int groups_of(int) { return 4; }
#else
#ifdef __AVX2__
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int groups_of(int rows) { return rows > 3 ? 2 : rows > 1 ? 4 : 8; }
#endif

typedef float f32 __attribute__((vector_size(LANES * 4)));
typedef int32_t i32 __attribute__((vector_size(LANES * 4)));
typedef uint32_t u32 __attribute__((vector_size(LANES * 4)));

template <class V>
inline V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
inline void store(void* p, V v) {
  std::memcpy(p, &v, sizeof v);
}
inline f32 splat(float x) { return f32{} + x; }
inline f32 max(f32 a, f32 b) { return a > b ? a : b; }

// 0, 1, 2, …
template <size_t... I>
inline i32 count(std::index_sequence<I...>) {
  return i32{(int32_t)I...};
}
inline i32 lanes() { return count(std::make_index_sequence<LANES>()); }

// Swaps lanes that are `DISTANCE`, a power of two, apart.
template <int DISTANCE, size_t... I>
inline f32 swap(f32 v, std::index_sequence<I...>) {
#ifdef __clang__
  return __builtin_shufflevector(v, v, (I ^ DISTANCE)...);
#else
  return __builtin_shuffle(v, i32{(int32_t)(I ^ DISTANCE)...});
#endif
}
template <int DISTANCE = LANES / 2, class Op>
inline float reduce(f32 v, Op op) {
  v = op(v, swap<DISTANCE>(v, std::make_index_sequence<LANES>()));
  if constexpr (DISTANCE > 1)
    return reduce<DISTANCE / 2>(v, op);
  else
    return v[0];
}
inline float reduce_max(f32 v) {
  return reduce(v, [](f32 a, f32 b) { return max(a, b); });
}
inline float reduce_sum(f32 v) {
  return reduce(v, [](f32 a, f32 b) { return a + b; });
}

// exp for x <= 0, to about 1e-7 (the polynomial is Cephes'); never below exp(-87) = 2e-38.
inline f32 exp(f32 x) {
  const float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves the integer in the low bits
  x = max(x, splat(-87.0f));
  const f32 shifted = x * 1.44269504088896341f + round;
  const f32 n = shifted - round;
  const f32 r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  f32 p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + (r + 1.0f);
  return (f32)((i32)p + ((i32)shifted << 23));
}

// tanh, to about 1e-7 of its value (the polynomial is Cephes').
inline f32 tanh(f32 x) {
  const f32 size = (f32)((i32)x & 0x7fffffff), square = x * x;
  const f32 e = exp(size * -2.0f), far = (1.0f - e) / (1.0f + e);
  f32 p = splat(-5.70498872745e-3f);
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  return size < 0.625f ? p * square * x + x : x < 0.0f ? -far : far;
}

// ---- Element types: a vector of them to floats and back ---------------------------------------

struct Float {
  using T = float;
  static f32 widen(const T* p) { return load<f32>(p); }
  static void narrow(f32 v, T* p) { store(p, v); }
};

struct BFloat16 {
  using T = uint16_t;
  typedef T u16 __attribute__((vector_size(LANES * 2)));
  static f32 widen(const T* p) { return (f32)(__builtin_convertvector(load<u16>(p), u32) << 16); }
  static void narrow(f32 v, T* p) {  // to nearest, ties to even, as torch does
    const u32 bits = (u32)v;
    const u32 rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    store(p, __builtin_convertvector(v == v ? rounded : u32{} + 0x7fc0, u16));
  }
};

#if defined(__F16C__) && defined(__AVX2__)
struct Half {
  using T = uint16_t;
  static f32 widen(const T* p) {
    __m256 parts[LANES / 8];
    for (int i = 0; i < LANES / 8; ++i) parts[i] = _mm256_cvtph_ps(load<__m128i>(p + 8 * i));
    return load<f32>(parts);
  }
  static void narrow(f32 v, T* p) {
    __m256 parts[LANES / 8];
    store(parts, v);
    for (int i = 0; i < LANES / 8; ++i)
      store(p + 8 * i, _mm256_cvtps_ph(parts[i], _MM_FROUND_TO_NEAREST_INT));
  }
};
#else
struct Half {
  using T = _Float16;
  typedef T f16 __attribute__((vector_size(LANES * 2)));
  static f32 widen(const T* p) { return __builtin_convertvector(load<f16>(p), f32); }
  static void narrow(f32 v, T* p) { store(p, __builtin_convertvector(v, f16)); }
};
#endif

// ---- KV cache layouts -------------------------------------------------------------------------
//
// A block holds its keys and then its values. As matrix B of a product, either is cut into groups
// of columns, one for each lane; two consecutive k at a time are loaded.

struct Strides {
  long group, pair, second;  // elements: to the next group, next two k, the second k of two
};

// K as [head_size, block_size], V as [block_size, head_size]: vLLM's "vec" and "vec16".
template <class E>
struct Plain {
  static constexpr bool AMX = false;
  using Element = E;
  using T = typename E::T;
  static f32 first(const T* p) { return E::widen(p); }
  static f32 second(const T* p, const Strides& s) { return E::widen(p + s.second); }
  static const T* keys(const T* block, long token) { return block + token; }
  static Strides key_strides(long, long block_size) { return {LANES, 2 * block_size, block_size}; }
  static const T* values(const T* block, long token, long head_size, long block_size) {
    return block + block_size * head_size + token * head_size;
  }
  static Strides value_strides(long head_size, long) { return {LANES, 2 * head_size, head_size}; }
  static long key_offset(long token, long) { return token; }
  static long offset(long group, const Strides& s) { return group * s.group; }
};

// K as [block_size/16, head_size/2, 16 tokens, 2 dims], V as [head_size/16, block_size/2, 16 dims,
// 2 tokens]: vLLM's "amx". A 32-bit lane holds both k of a pair. A stride's group is one of 16
// columns, which may be several groups of lanes.
struct Paired {
  static constexpr bool AMX = true;
  using Element = BFloat16;
  using T = uint16_t;
  static f32 first(const T* p) { return (f32)(load<u32>(p) << 16); }
  static f32 second(const T* p, const Strides&) { return (f32)(load<u32>(p) & 0xffff0000u); }
  static Strides key_strides(long head_size, long) { return {COLUMNS * head_size, 2 * COLUMNS, 0}; }
  static const T* values(const T* block, long token, long head_size, long block_size) {
    return block + block_size * head_size + token * COLUMNS;
  }
  static Strides value_strides(long, long block_size) {
    return {COLUMNS * block_size, 2 * COLUMNS, 0};
  }
  static long key_offset(long token, long head_size) { return token * head_size; }
  static long offset(long group, const Strides& s) {
    constexpr long PARTS = COLUMNS / LANES;
    return group / PARTS * s.group + group % PARTS * 2 * LANES;
  }
};

// ---- C = C * rescale + A B --------------------------------------------------------------------

struct Product {
  const float* a;
  long lda;
  Strides strides;  // of B
  long k;  // an odd k is read without its partner, which may be garbage
  const float* rescale;  // per row of C; null means C's old content is ignored
  float* c;
  long ldc;
  long ahead = 0;  // bytes from B to what will be read next, to be fetched meanwhile
};

// M rows by N groups of columns, held in registers.
template <class Layout, int M, int N>
inline void multiply_tile(const Product& p, long row, long group, const typename Layout::T* b) {
  // Few accumulators would wait for each other: give the second k of a pair its own.
  constexpr int CHAINS = M * N <= 4 ? 2 : 1;
  const float* a = p.a + row * p.lda;
  b += Layout::offset(group, p.strides);
  f32 acc[CHAINS][M][N] = {};
  for (long k = 0; k + 1 < p.k; k += 2, b += p.strides.pair) {
    for (int n = 0; n < N; ++n) {
      const auto* column = b + Layout::offset(n, p.strides);
      __builtin_prefetch(reinterpret_cast<const char*>(column) + p.ahead, 0, 2);
      const f32 first = Layout::first(column), second = Layout::second(column, p.strides);
      for (int m = 0; m < M; ++m) {
        acc[0][m][n] += a[m * p.lda + k] * first;
        acc[CHAINS - 1][m][n] += a[m * p.lda + k + 1] * second;
      }
    }
  }
  if (p.k & 1)
    for (int n = 0; n < N; ++n) {
      const f32 first = Layout::first(b + Layout::offset(n, p.strides));
      for (int m = 0; m < M; ++m) acc[0][m][n] += a[m * p.lda + p.k - 1] * first;
    }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) {
      float* c = p.c + (row + m) * p.ldc + (group + n) * LANES;
      f32 sum = acc[0][m][n];
      if (CHAINS == 2) sum += acc[1][m][n];
      store(c, p.rescale ? load<f32>(c) * p.rescale[row + m] + sum : sum);
    }
}

template <class Layout, int M, int N>
inline void multiply_rows(const Product& p, long row, long groups, const typename Layout::T* b) {
  long group = 0;
  for (; group + N <= groups; group += N) multiply_tile<Layout, M, N>(p, row, group, b);
  if constexpr (N > 1)
    if (group < groups) {
      Product rest = p;
      rest.c += group * LANES;
      multiply_rows<Layout, M, N / 2>(rest, row, groups - group,
                                      b + Layout::offset(group, p.strides));
    }
}

template <class Layout, int M>
inline void multiply_rest(const Product& p, long row, long rows, long groups,
                          const typename Layout::T* b) {
  if constexpr (M > 0) {
    if (rows == M)
      multiply_rows<Layout, M, groups_of(M)>(p, row, groups, b);
    else
      multiply_rest<Layout, M - 1>(p, row, rows, groups, b);
  }
}

// noinline: called twice, and large.
template <class Layout>
__attribute__((noinline)) void multiply(const Product& p, long rows, long groups,
                                        const typename Layout::T* b) {
  // Columns outside, rows inside, so that the columns of B in use stay in L1.
  if (rows > ROWS) {
    constexpr int GROUPS = groups_of(ROWS);
    for (long group = 0; group < groups; group += GROUPS) {
      const long n = std::min<long>(GROUPS, groups - group);
      Product part = p;
      part.c += group * LANES;
      const auto* columns = b + Layout::offset(group, p.strides);
      long row = 0;
      for (; row + ROWS <= rows; row += ROWS)
        multiply_rows<Layout, ROWS, GROUPS>(part, row, n, columns);
      multiply_rest<Layout, ROWS - 1>(part, row, rows - row, n, columns);
    }
  } else {
    multiply_rest<Layout, ROWS>(p, 0, rows, groups, b);
  }
}

// ---- The same with AMX, for the paired layout: A in bf16, k a multiple of 32 -------------------

#ifdef __AMX_BF16__

static_assert(LANES == COLUMNS, "a CPU with AMX has AVX-512");

inline bool has_amx() {  // Linux has every process ask before it uses tiles
  static const bool granted = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18) == 0;
  return granted;
}

// Eight tiles of 16 rows of 64 bytes. Others in this thread (oneDNN, vLLM) have their own shapes.
class TileShapes {
 public:
  TileShapes() {
    alignas(64) uint8_t ours[64] = {1};
    for (int i = 0; i < 8; ++i) {
      ours[16 + 2 * i] = 64;
      ours[48 + i] = 16;
    }
    _tile_storeconfig(theirs_);
    _tile_loadconfig(ours);
  }
  ~TileShapes() { _tile_loadconfig(theirs_); }

 private:
  alignas(64) uint8_t theirs_[64];
};

// Up to 48 rows of A by one group of 16 columns. C = C + A B, or A B.
inline void multiply_amx(const uint16_t* a, long lda, const uint16_t* b, long k, float* c, long ldc,
                         long rows, bool add) {
  const bool second = rows > 16, third = rows > 32;
  const auto row = [ldc](float* c, long m) { return c + m * ldc; };
  if (add) {
    _tile_loadd(0, c, ldc * 4);
    if (second) _tile_loadd(1, row(c, 16), ldc * 4);
    if (third) _tile_loadd(2, row(c, 32), ldc * 4);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
  }
  for (long i = 0; i < k; i += 32, a += 32, b += 16 * 32) {
    _tile_loadd(6, b, 64);
    _tile_loadd(3, a, lda * 2);
    _tile_dpbf16ps(0, 3, 6);
    if (second) {
      _tile_loadd(4, a + 16 * lda, lda * 2);
      _tile_dpbf16ps(1, 4, 6);
    }
    if (third) {
      _tile_loadd(5, a + 32 * lda, lda * 2);
      _tile_dpbf16ps(2, 5, 6);
    }
  }
  _tile_stored(0, c, ldc * 4);
  if (second) _tile_stored(1, row(c, 16), ldc * 4);
  if (third) _tile_stored(2, row(c, 32), ldc * 4);
}

// Row-major bf16 `query` [rows, head_size] times the keys: logits.
inline void multiply_keys_amx(const void* query, const void* keys, const Strides& strides,
                              long head_size, long groups, long rows, float* logits) {
  for (long group = 0; group < groups; ++group)
    multiply_amx(static_cast<const uint16_t*>(query), head_size,
                 static_cast<const uint16_t*>(keys) + group * strides.group, head_size,
                 logits + group * COLUMNS, KEY_STRIDE, rows, false);
}

// sums = sums * rescale + weights * values, for n values of which `valid` may be read. The weights
// are rounded to bf16 first; `weights16` is room for that.
inline void add_values_amx(const float* weights, void* weights16, const void* values,
                           const Strides& strides, long n, long valid, const float* rescale,
                           float* sums, long head_size, long rows) {
  auto* a = static_cast<uint16_t*>(weights16);
  const long padded = (n + 31) / 32 * 32, whole = std::min(padded, valid) / 32 * 32;
  for (long m = 0; m < rows; ++m) {
    for (long j = 0; j < padded; j += LANES)
      BFloat16::narrow(load<f32>(weights + m * KEY_STRIDE + j), a + m * KEY_STRIDE + j);
    for (long d = 0; d < head_size; d += LANES)
      store(sums + m * head_size + d, load<f32>(sums + m * head_size + d) * rescale[m]);
  }
  for (long group = 0; group * COLUMNS < head_size; ++group) {
    const auto* column = static_cast<const uint16_t*>(values) + group * strides.group;
    float* c = sums + group * COLUMNS;
    multiply_amx(a, KEY_STRIDE, column, whole, c, head_size, rows, true);
    if (whole < n) {  // what follows the last token may be NaN, which no zero weight mends
      alignas(64) uint16_t rest[16 * 32] = {};
      for (long i = 0; i < valid - whole; ++i)
        for (long d = 0; d < COLUMNS; ++d)
          rest[i / 2 * 32 + d * 2 + i % 2] = column[(whole + i) / 2 * 32 + d * 2 + i % 2];
      multiply_amx(a + whole, KEY_STRIDE, rest, 32, c, head_size, rows, true);
    }
  }
}

#else

inline bool has_amx() { return false; }
struct TileShapes {};
inline void multiply_keys_amx(const void*, const void*, const Strides&, long, long, long, float*) {}
inline void add_values_amx(const float*, void*, const void*, const Strides&, long, long,
                           const float*, float*, long, long) {}

#endif

// ---- Softmax ----------------------------------------------------------------------------------

struct RowState {
  f32 sum, kept, marked;  // of all weights, of those whose values are added up, and of the marked
  // keys' where there is a share; a sum for each lane
  float max;
};

// Of a tile's keys, those whose values are added up; MARKED: some, and marked keys are among them.
enum class Keep { NONE, SOME, ALL, MARKED };

// Turns a row's products into weights exp(logit - max) of its `visible` first keys, times `keep`
// where some are kept, with zeros on to the row's end. Returns the factor that brings what was summed
// before to the new maximum.
template <Keep KEEP>
inline float softmax(float* row, long n, long visible, const float* bias, const float* keep,
                     const float* marks, float scale, RowState& state) {
  const i32 lane = lanes();
  const float infinity = std::numeric_limits<float>::infinity();
  visible = std::clamp<long>(visible, 0, n);
  f32 top = splat(state.max);
  long end = 0;
  for (; end + LANES <= visible; end += LANES) {
    const f32 x = load<f32>(row + end) * scale + load<f32>(bias + end);
    top = max(top, x);
    store(row + end, x);
  }
  if (end < visible) {
    const f32 x = load<f32>(row + end) * scale + load<f32>(bias + end);
    const f32 masked = lane < (int32_t)(visible - end) ? x : splat(-infinity);
    top = max(top, masked);
    store(row + end, masked);
    end += LANES;
  }
  const float new_max = reduce_max(top);
  const float rescale = new_max == state.max ? 1.0f : exp(splat(state.max - new_max))[0];
  f32 sum = state.sum * rescale, kept = state.kept * rescale, marked = state.marked * rescale;
  for (long j = 0; j < end; j += LANES) {
    f32 weight = exp(load<f32>(row + j) - new_max);
    sum += weight;
    if (KEEP == Keep::NONE) continue;
    if (KEEP == Keep::MARKED) marked += weight * load<f32>(marks + j);
    if (KEEP == Keep::SOME || KEEP == Keep::MARKED) weight *= load<f32>(keep + j);
    kept += weight;
    store(row + j, weight);
  }
  if (KEEP != Keep::NONE)
    for (long j = end; j < KEY_STRIDE; j += LANES) store(row + j, f32{});
  state = {sum, kept, marked, new_max};
  return rescale;
}

template <Keep KEEP>
inline void softmax_rows(float* rows, const float* bias, const float* keep, const float* marks,
                         uint64_t steered, long n, long visible, long num_heads, long num_rows,
                         float scale, RowState* state, float* rescale) {
  static const float none[MAX_KEYS] = {};
  for (long m = 0; m < num_rows; ++m)
    rescale[m] *=
        softmax<KEEP>(rows + m * KEY_STRIDE, n, visible + m / num_heads,
                      steered >> m % num_heads & 1 ? bias : none, keep, marks, scale, state[m]);
}

}  // namespace
