// Steered attention on the CPU: one pass over the keys with an online softmax (FlashAttention), a
// per-key bias (the log of its factor), and vLLM's paged KV cache read in place.
//
// With a key's bias log f, let w be its weight exp(logit + bias), Z the sum of weights, and a the
// factor of the request's unmarked keys. The steered output is (sum of w v) / Z. The plain output P,
// which the caller provides, gives the sums over the unmarked keys without their values being read.
// So where no factor is below a, and a is below 1,
//
//     steered = (P * (Z - K + b K) + (1 - b) * (sum of g w v)) / Z,     K = sum of g w
//
// with b = a / (the largest factor) and a key's merge weight g = (1 - a / f) / (1 - b): 0 for an
// unmarked key, 1 for the largest factor. There is no difference of large numbers in it. That saves
// the memory traffic of most values, which is what bounds decoding, and half of the arithmetic of a
// prefill. Elsewhere the request is computed from all keys, as if all g were 1 and b were 0.
//
// With a share, a row's factor a is known only when its keys have been gone over. Then no key has a
// bias, and a row adds up its weights in three sums: all, Z; the marked and the generated keys', K,
// whose values are read; the marked keys', M. Of the others' sum R = Z - K, the factor
//
//     a = odds * M / R, bounded to [exp(merge base), 1],
//
// leaves odds = (1 - share) / share times as much as the marked keys have, and
//
//     steered = (a Z P + (1 - a) (sum of w v over K)) / (a Z + (1 - a) K).
//
// No weight is negative here either. A row that sees no marked key keeps the plain output.
//
// Where the caller wants the whole layer, there is no plain output: every head of every request is
// computed from all keys, the steered ones with the bias and the others without. With a share, the
// values are added up twice: all, which is Z P, and those of K.
//
// A sliding window bounds a row's keys from below. A sink is one more key of factor 1, without a
// value.
//
// Work is cut into units: one request, one KV head with its steered query heads, some query rows,
// some keys. A unit's rows are (query row, head) pairs, so a tile of K and V, once read, serves
// every steered head of its group and every query row of the unit.

#include <omp.h>

#include <cmath>
#include <new>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "math.hpp"

// ---- Interface: the structs are mirrored in launch.py ---------------------------------------------

extern "C" {

struct Batch {  // plan.StepPlan
  int64_t num_requests, max_blocks;
  const int32_t *query_start, *query_len, *seq_len, *block_table;
  const int32_t *first, *segment_offsets, *ends;
  const float *biases, *merge_weights, *merge_bases;
  const float* odds;  // per request; 0: no share
};

struct Shape {  // of one layer's tensors; strides in elements
  int64_t num_heads, num_kv_heads, head_size, block_size;
  int64_t query_row, query_head, output_row, output_head, kv_block, kv_head;
  int64_t format;  // Format
  int64_t window;  // keys that a row sees, its own included; more than any context if unbounded
  float scale, soft_cap;  // soft_cap 0: none
};

struct Layer {
  const int32_t *head_offsets, *heads;
  const void *query, *kv_cache;
  void* output;
  int64_t num_tokens, num_blocks;
  int64_t whole;  // bool: also the heads that are not steered
  const float *alibi_slopes, *sinks;  // per query head; null if none
};

}  // extern "C"

namespace {

constexpr int MIN_AMX_ROWS = 9;  // with fewer, AMX's tiles of 16 rows are mostly empty
constexpr long MAX_DEPTH = 128;  // products that are added up one by one: more would lose digits
constexpr int MIN_SPLIT = 512;  // fewer keys are not worth a unit of their own

enum Format { FLOAT_PLAIN, BFLOAT16_PLAIN, HALF_PLAIN, BFLOAT16_PAIRED };
enum Status { OK, BAD_FORMAT, BAD_HEAD, BAD_BLOCK, BAD_ROW, NO_MEMORY };

struct Unit {
  int request;
  long kv_head;
  const int32_t* heads;
  long num_heads;
  uint64_t steered;  // one bit for each of the heads
  long row, rows;  // query rows, counted from the request's first in this step
  long key_begin, key_end;
  long partial;  // where its sums go if the keys are split, else -1
};

struct Merge {  // the units that share query rows and have different keys
  long unit, count;
};

struct alignas(64) CacheLine {
  float values[16];
};
using Buffer = std::vector<CacheLine>;

struct Scratch {  // one thread's
  Buffer query, query16, logits, weights16, bias, keep, marks;  // 16: in bf16, for AMX
  Buffer sums;  // of all values that are wanted; behind them, where it is twice, of those of K
  void resize(long head_size) {
    query.resize(MAX_ROWS * head_size / 16);
    query16.resize(MAX_ROWS * head_size / 32);
    logits.resize(MAX_ROWS * KEY_STRIDE / 16);
    weights16.resize(MAX_ROWS * KEY_STRIDE / 32);
    sums.resize(2 * MAX_ROWS * head_size / 16);
    bias.resize(MAX_KEYS / 16);
    keep.resize(MAX_KEYS / 16);
    marks.resize(MAX_KEYS / 16);
  }
};

template <class T>
T* as(Buffer& buffer) {
  return reinterpret_cast<T*>(buffer.data());
}

// One unit's result for a row, where the keys are split.
struct PartState {
  float max, sum, kept, marked;
};

// Of a unit's rows, sums over the keys whose values are added up a second time.
struct Kept {
  float sum[MAX_ROWS], marked[MAX_ROWS];
  float rescale[MAX_ROWS];  // what the sums of values are still to be multiplied by

  void begin() {
    std::fill(sum, sum + MAX_ROWS, 0.0f);
    std::fill(marked, marked + MAX_ROWS, 0.0f);
    std::fill(rescale, rescale + MAX_ROWS, 1.0f);
  }

  void rescale_by(const float* factors, long rows) {
    for (long m = 0; m < rows; ++m) {
      sum[m] *= factors[m];
      marked[m] *= factors[m];
      rescale[m] *= factors[m];
    }
  }

  // Counts a tile's n weights in, and multiplies them by `keep`; `marks` may be null: none is.
  void take(float* weights, const float* keep, const float* marks, long n, long rows) {
    for (long m = 0; m < rows; ++m, weights += KEY_STRIDE) {
      f32 all{}, of_marks{};
      for (long j = 0; j < n; j += LANES) {
        const f32 weight = load<f32>(weights + j) * load<f32>(keep + j);
        if (marks) of_marks += weight * load<f32>(marks + j);
        all += weight;
        store(weights + j, weight);
      }
      sum[m] += reduce_sum(all);
      marked[m] += reduce_sum(of_marks);
    }
  }
};

// Index of the segment that holds a request's key.
long segment_of(const Batch& batch, int r, long key) {
  return std::upper_bound(batch.ends + batch.segment_offsets[r],
                          batch.ends + batch.segment_offsets[r + 1], key) -
         batch.ends;
}

// Whether rows that see keys among [begin, end) alone are plain: all keys have the same factor.
bool is_plain(const Batch& batch, const Layer& layer, int r, long begin, long end) {
  const long first = segment_of(batch, r, begin), last = segment_of(batch, r, end - 1);
  for (long i = first; i < last; ++i)
    if (batch.biases[i] != batch.biases[i + 1] ||
        batch.merge_weights[i] != batch.merge_weights[i + 1])
      return false;
  return batch.biases[first] == 0.0f || !layer.sinks;
}

// Cuts the layer's work into units, none much larger than a thread's share.
Status plan(const Batch& batch, const Shape& shape, const Layer& layer, std::vector<Unit>& units,
            std::vector<Merge>& merges, std::vector<int32_t>& all_heads) {
  const long group_size = shape.num_heads / shape.num_kv_heads;
  all_heads.resize(shape.num_heads);
  std::iota(all_heads.begin(), all_heads.end(), 0);
  units.clear();
  merges.clear();
  long total = 0;
  for (int r = 0; r < batch.num_requests; ++r) {
    const int32_t* heads = layer.heads + layer.head_offsets[r];
    const int32_t* heads_end = layer.heads + layer.head_offsets[r + 1];
    const long computed = batch.seq_len[r] - batch.query_len[r];
    const long skip = layer.whole ? 0 : std::max<long>(0, batch.first[r] - computed);
    if ((heads == heads_end && !layer.whole) || skip >= batch.query_len[r]) continue;
    if (batch.query_start[r] < 0 || batch.query_start[r] + batch.query_len[r] > layer.num_tokens)
      return BAD_ROW;
    const auto window_begin = [&](long row) {
      return std::max<long>(0, computed + row + 1 - shape.window);
    };
    const long blocks = (batch.seq_len[r] + shape.block_size - 1) / shape.block_size;
    if (blocks > batch.max_blocks) return BAD_BLOCK;
    // Blocks before the window may have been given away: they are not read.
    for (long i = window_begin(skip) / shape.block_size; i < blocks; ++i) {
      const int32_t block = batch.block_table[r * batch.max_blocks + i];
      if (block < 0 || block >= layer.num_blocks) return BAD_BLOCK;
    }
    for (const int32_t* head = heads; head < heads_end; ++head)
      if (*head < 0 || *head >= shape.num_heads) return BAD_HEAD;
    const int32_t *steered = heads, *steered_end = heads_end;
    if (layer.whole) heads = all_heads.data(), heads_end = heads + shape.num_heads;
    while (heads < heads_end) {
      const long kv_head = *heads / group_size;
      long n = 1;
      while (heads + n < heads_end && heads[n] / group_size == kv_head && n < MAX_ROWS) ++n;
      uint64_t mask = 0;
      for (long i = 0; i < n; ++i)
        if (steered < steered_end && heads[i] == *steered) mask |= uint64_t{1} << i, ++steered;
      const long rows = MAX_ROWS / n;
      for (long row = skip; row < batch.query_len[r]; row += rows) {
        const long m = std::min(rows, batch.query_len[r] - row);
        const long begin = window_begin(row), end = computed + row + m;
        if (begin > 0 && !layer.whole && is_plain(batch, layer, r, begin, end)) continue;
        const long aligned = begin - begin % shape.block_size % 32;  // as AMX wants it
        units.push_back({r, kv_head, heads, n, mask, row, m, aligned, end, -1});
        total += m * n * (end - aligned);
      }
      heads += n;
    }
  }

  // Split what is too large along the keys, and put the parts' results together afterwards.
  const long share = std::max<long>(1, total / (4 * omp_get_max_threads()));
  long partials = 0;
  for (size_t i = 0, whole = units.size(); i < whole; ++i) {
    const Unit unit = units[i];
    const long all_keys = unit.key_end - unit.key_begin;
    const long cost = unit.rows * unit.num_heads * all_keys;
    const long parts = std::min((cost + share - 1) / share, all_keys / MIN_SPLIT);
    if (parts < 2 || omp_get_max_threads() == 1) continue;
    const long keys = ((all_keys + parts - 1) / parts + MAX_KEYS - 1) / MAX_KEYS * MAX_KEYS;
    merges.push_back({(long)units.size(), 0});
    for (long begin = unit.key_begin; begin < unit.key_end; begin += keys) {
      Unit part = unit;
      part.key_begin = begin;
      part.key_end = std::min(begin + keys, unit.key_end);
      part.partial = partials++;
      units.push_back(part);
      ++merges.back().count;
    }
    units[i].rows = 0;  // done by its parts
  }
  return OK;
}

template <class Layout>
struct Kernel {
  using Element = typename Layout::Element;
  using T = typename Layout::T;
  const Batch& batch;
  const Shape& shape;
  const Layer& layer;

  static constexpr long STATE = sizeof(PartState) / sizeof(float);
  long partial_size() const { return MAX_ROWS * (2 * shape.head_size + STATE); }

  bool has_share(int request) const { return batch.odds[request] > 0.0f; }

  bool adds_twice(int request) const { return layer.whole && has_share(request); }

  bool reuses_plain(int request) const { return !layer.whole && batch.merge_bases[request] < 0.0f; }

  // The bias of keys [key, key + n), and their merge weights. Returns the least range that holds
  // all whose merge weight is not 0, from a multiple of 32 on.
  std::pair<long, long> fill_bias(int r, long key, long n, float* bias, float* keep) const {
    long first = n, last = 0;
    for (long i = segment_of(batch, r, key), from = 0; from < n; ++i) {
      const long to = std::min<long>(batch.ends[i] - key, n);
      std::fill(bias + from, bias + to, batch.biases[i]);
      std::fill(keep + from, keep + to, batch.merge_weights[i]);
      if (batch.merge_weights[i] != 0.0f) {
        first = std::min(first, from);
        last = to;
      }
      from = to;
    }
    std::fill(bias + n, bias + MAX_KEYS, 0.0f);
    std::fill(keep + n, keep + MAX_KEYS, 1.0f);
    return {first / 32 * 32, last};
  }

  // Which of keys [key, key + n) are marked, as 1 and 0. Returns whether any is.
  bool fill_marks(int r, long key, long n, float* marks) const {
    const long generated = batch.segment_offsets[r + 1] - 1;
    bool any = false;
    for (long i = segment_of(batch, r, key), from = 0; from < n; ++i) {
      const long to = std::min<long>(batch.ends[i] - key, n);
      const bool marked = batch.merge_weights[i] != 0.0f && i != generated;
      std::fill(marks + from, marks + to, marked ? 1.0f : 0.0f);
      any |= marked;
      from = to;
    }
    std::fill(marks + n, marks + MAX_KEYS, 0.0f);
    return any;
  }

  // Whether the row at `position` sees a marked key. Not by the marked keys' weight, of which nothing
  // may be left beside the largest: then the row has the least factor.
  bool sees_mark(int r, long position) const {
    const long begin = std::max<long>(0, position + 1 - shape.window);
    const long generated = batch.segment_offsets[r + 1] - 1, first = segment_of(batch, r, begin);
    for (long i = first; i < generated && (i == first || batch.ends[i - 1] <= position); ++i)
      if (batch.merge_weights[i] != 0.0f) return true;
    return false;
  }

  bool shapes_logits() const { return shape.soft_cap > 0.0f || layer.alibi_slopes; }

  // Products of the tile at `key` to logits, before the bias.
  void shape_logits(const Unit& unit, long first_position, long key, long n, float* logits) const {
    const f32 lane = __builtin_convertvector(lanes(), f32);
    for (long m = 0; m < unit.rows * unit.num_heads; ++m, logits += KEY_STRIDE) {
      const long position = first_position + m / unit.num_heads;
      const int32_t head = unit.heads[m % unit.num_heads];
      for (long j = 0; j < n; j += LANES) {
        f32 x = load<f32>(logits + j) * shape.scale;
        if (shape.soft_cap > 0.0f) x = shape.soft_cap * tanh(x / shape.soft_cap);
        if (layer.alibi_slopes)
          x += layer.alibi_slopes[head] * (lane + (float)(key + j - position));
        store(logits + j, x);
      }
    }
  }

  // Of the tile at `key`, hides what lies before the rows' windows.
  void hide_before_window(const Unit& unit, long first_position, long key, long n,
                          float* logits) const {
    for (long m = 0; m < unit.rows * unit.num_heads; ++m) {
      const long begin = first_position + m / unit.num_heads + 1 - shape.window;
      float* row = logits + m * KEY_STRIDE;
      std::fill(row, row + std::clamp<long>(begin - key, 0, n),
                -std::numeric_limits<float>::infinity());
    }
  }

  const T* block_of(const Unit& unit, long key) const {
    const int32_t block =
        batch.block_table[unit.request * batch.max_blocks + key / shape.block_size];
    return static_cast<const T*>(layer.kv_cache) + block * shape.kv_block +
           unit.kv_head * shape.kv_head;
  }

  const T* keys_of(const Unit& unit, long key) const {
    return block_of(unit, key) + Layout::key_offset(key % shape.block_size, shape.head_size);
  }

  // `next` is what this thread will probably run next, or null.
  void run(const Unit& unit, const Unit* next, Scratch& scratch, float* partials) const {
    const long head_size = shape.head_size, block_size = shape.block_size;
    const long rows = unit.rows * unit.num_heads;
    const int r = unit.request;
    const long first_row = batch.query_start[r] + unit.row;
    const long first_position = batch.seq_len[r] - batch.query_len[r] + unit.row;
    RowState state[MAX_ROWS];
    float rescale[MAX_ROWS];  // what the sums are still to be multiplied by
    float ones[MAX_ROWS];
    std::fill(ones, ones + MAX_ROWS, 1.0f);
    float *query = as<float>(scratch.query), *logits = as<float>(scratch.logits);
    float *sums = as<float>(scratch.sums), *kept_sums = sums + MAX_ROWS * head_size;
    float *bias = as<float>(scratch.bias), *keep = as<float>(scratch.keep);
    float* marks = as<float>(scratch.marks);
    T *query16 = as<T>(scratch.query16), *weights16 = as<T>(scratch.weights16);
    for (long m = 0; m < rows; ++m) {
      const T* source = static_cast<const T*>(layer.query) +
                        (first_row + m / unit.num_heads) * shape.query_row +
                        unit.heads[m % unit.num_heads] * shape.query_head;
      for (long d = 0; d < head_size; d += LANES)
        store(query + m * head_size + d, Element::widen(source + d));
      if (Layout::AMX) std::memcpy(query16 + m * head_size, source, head_size * sizeof(T));
      // The maximum is finite, so that a row that sees no key yet has no NaN.
      state[m] = {f32{}, f32{}, f32{}, -1e30f};
      rescale[m] = 1.0f;
    }
    std::fill(sums, sums + rows * head_size, 0.0f);
    const bool twice = adds_twice(r);
    Kept kept;
    if (twice) {
      kept.begin();
      std::fill(kept_sums, kept_sums + rows * head_size, 0.0f);
    }
    const bool amx = Layout::AMX && rows >= MIN_AMX_ROWS && has_amx();
    std::optional<TileShapes> shapes;
    if (amx) shapes.emplace();

    for (long key = unit.key_begin, n; key < unit.key_end; key += n) {
      const long token = key % block_size;
      n = std::min({(long)MAX_KEYS, block_size - token, unit.key_end - key});
      const T* keys = keys_of(unit, key);
      const T* values = Layout::values(block_of(unit, key), token, head_size, block_size);
      const Strides key_strides = Layout::key_strides(head_size, block_size);
      const Strides value_strides = Layout::value_strides(head_size, block_size);
      const long groups = (n + LANES - 1) / LANES;
      // With few rows, memory is the limit, and the hardware does not foresee the next block.
      const T* then = rows > ROWS              ? keys
                      : key + n < unit.key_end ? keys_of(unit, key + n)
                      : next && next->rows > 0 ? keys_of(*next, next->key_begin)
                                               : keys;
      const long ahead = reinterpret_cast<intptr_t>(then) - reinterpret_cast<intptr_t>(keys);
      if (amx)
        multiply_keys_amx(query16, keys, key_strides, head_size, groups, rows, logits);
      else
        for (long d = 0; d < head_size; d += MAX_DEPTH)
          multiply<Layout>({query + d, head_size, key_strides, std::min(MAX_DEPTH, head_size - d),
                            d ? ones : nullptr, logits, KEY_STRIDE, ahead},
                           rows, groups, keys + d / 2 * key_strides.pair);

      if (shapes_logits()) shape_logits(unit, first_position, key, n, logits);
      if (key < first_position + unit.rows - shape.window)
        hide_before_window(unit, first_position, key, n, logits);

      auto [first, last] = fill_bias(r, key, n, bias, keep);
      const long kept_first = first, kept_last = last;
      if (!reuses_plain(r)) first = 0, last = n;
      const bool marked = has_share(r) && first < last && fill_marks(r, key, n, marks);
      const auto weigh = !reuses_plain(r) ? softmax_rows<Keep::ALL>
                         : marked         ? softmax_rows<Keep::MARKED>
                         : first < last   ? softmax_rows<Keep::SOME>
                                          : softmax_rows<Keep::NONE>;
      weigh(logits, bias, keep, marks, unit.steered, n, first_position + 1 - key, unit.num_heads,
            rows, shapes_logits() ? 1.0f : shape.scale, state, rescale);
      if (first >= last) continue;
      const auto add_values = [&](long first, long last, const float* rescale, float* sums) {
        const T* from = values + first / 2 * value_strides.pair;
        if (amx)
          add_values_amx(logits + first, weights16, from, value_strides, last - first, n - first,
                         rescale, sums, head_size, rows);
        else
          multiply<Layout>(
              {logits + first, KEY_STRIDE, value_strides, last - first, rescale, sums, head_size},
              rows, head_size / LANES, from);
      };
      add_values(first, last, rescale, sums);
      if (twice) {
        kept.rescale_by(rescale, rows);
        if (kept_first < kept_last) {
          kept.take(logits, keep, fill_marks(r, key, n, marks) ? marks : nullptr, n, rows);
          add_values(kept_first, kept_last, kept.rescale, kept_sums);
          std::fill(kept.rescale, kept.rescale + rows, 1.0f);
        }
      }
      std::fill(rescale, rescale + rows, 1.0f);
    }

    const auto total = [&](long m) -> PartState {
      const RowState& row = state[m];
      if (twice) return {row.max, reduce_sum(row.sum), kept.sum[m], kept.marked[m]};
      return {row.max, reduce_sum(row.sum), reduce_sum(row.kept), reduce_sum(row.marked)};
    };
    for (long m = 0; m < rows; ++m)
      for (long d = 0; d < head_size; ++d) {
        sums[m * head_size + d] *= rescale[m];
        if (twice) kept_sums[m * head_size + d] *= kept.rescale[m];
      }
    if (unit.partial < 0) {
      for (long m = 0; m < rows; ++m)
        write(unit, m, sums + m * head_size, kept_sums + m * head_size, total(m));
    } else {
      float* partial = partials + unit.partial * partial_size();
      std::copy(sums, sums + rows * head_size, partial);
      if (twice) std::copy(kept_sums, kept_sums + rows * head_size, partial + MAX_ROWS * head_size);
      for (long m = 0; m < rows; ++m)
        store(partial + 2 * MAX_ROWS * head_size + STATE * m, total(m));
    }
  }

  void merge(const Unit* parts, long count, Scratch& scratch, const float* partials) const {
    const long head_size = shape.head_size;
    const bool twice = adds_twice(parts->request);
    float *sums = as<float>(scratch.sums), *kept_sums = sums + head_size;
    for (long m = 0; m < parts->rows * parts->num_heads; ++m) {
      const auto state = [&](long i) {
        return load<PartState>(partials + parts[i].partial * partial_size() +
                               2 * MAX_ROWS * head_size + STATE * m);
      };
      PartState all = {state(0).max, 0.0f, 0.0f, 0.0f};
      for (long i = 1; i < count; ++i) all.max = std::max(all.max, state(i).max);
      std::fill(sums, sums + 2 * head_size, 0.0f);
      for (long i = 0; i < count; ++i) {
        const float weight = std::exp(state(i).max - all.max);
        const float* partial = partials + parts[i].partial * partial_size() + m * head_size;
        all.sum += weight * state(i).sum;
        all.kept += weight * state(i).kept;
        all.marked += weight * state(i).marked;
        for (long d = 0; d < head_size; ++d) sums[d] += weight * partial[d];
        if (twice)
          for (long d = 0; d < head_size; ++d)
            kept_sums[d] += weight * partial[MAX_ROWS * head_size + d];
      }
      write(*parts, m, sums, kept_sums, all);
    }
  }

  void write(const Unit& unit, long m, const float* sums, const float* kept_sums,
             PartState state) const {
    const int32_t head = unit.heads[m % unit.num_heads];
    const long row = unit.row + m / unit.num_heads;
    const long position = batch.seq_len[unit.request] - batch.query_len[unit.request] + row;
    T* target = static_cast<T*>(layer.output) +
                (batch.query_start[unit.request] + row) * shape.output_row +
                head * shape.output_head;
    float rescale = 1.0f;
    if (layer.sinks) {
      const float max = std::max(state.max, layer.sinks[head]);
      const float sink = std::exp(layer.sinks[head] - max);
      rescale = std::exp(state.max - max);
      const float keep = batch.merge_weights[batch.segment_offsets[unit.request + 1] - 1];
      state = {max, state.sum * rescale + sink, state.kept * rescale + keep * sink,
               state.marked * rescale};
    }
    float base = std::exp(batch.merge_bases[unit.request]);
    float plain_share = (state.sum - state.kept + base * state.kept) / state.sum;
    const bool reuse = reuses_plain(unit.request);
    float factor = (reuse ? 1.0f - base : 1.0f) * rescale / state.sum;
    float kept_factor = 0.0f;
    if (has_share(unit.request) && unit.steered >> m % unit.num_heads & 1) {
      const float wanted = batch.odds[unit.request] * state.marked, rest = state.sum - state.kept;
      const bool is_plain = wanted >= rest || !sees_mark(unit.request, position);
      if (is_plain && reuse) return;  // the plain output is there
      base = is_plain ? 1.0f : std::max(wanted / rest, base);
      const float total = base * state.sum + (1.0f - base) * state.kept;
      plain_share = base * state.sum / total;
      (reuse ? factor : kept_factor) = (1.0f - base) * rescale / total;
      if (!reuse) factor = base * rescale / total;
    }
    for (long d = 0; d < shape.head_size; d += LANES) {
      f32 result = load<f32>(sums + d) * factor;
      if (kept_factor != 0.0f) result += load<f32>(kept_sums + d) * kept_factor;
      if (reuse) result += Element::widen(target + d) * plain_share;
      Element::narrow(result, target + d);
    }
  }
};

template <class Layout>
void run(const Batch& batch, const Shape& shape, const Layer& layer, std::vector<Unit>& units,
         std::vector<Merge>& merges) {
  const Kernel<Layout> kernel{batch, shape, layer};
  static thread_local std::vector<float> partials;
  long parts = 0;
  for (const Merge& merge : merges) parts += merge.count;
  partials.resize(std::max<size_t>(partials.size(), parts * kernel.partial_size()));
  float* sums = partials.data();
  bool failed = false;
#pragma omp parallel if (units.size() > 1)
  {
    static thread_local Scratch scratch;
    bool ready = true;
    try {
      scratch.resize(shape.head_size);
    } catch (const std::bad_alloc&) {  // an exception that leaves a thread ends the process
      ready = false;
#pragma omp atomic write
      failed = true;
    }
    const size_t threads = omp_get_num_threads();
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < units.size(); ++i)
      if (ready && units[i].rows > 0)
        kernel.run(units[i], i + threads < units.size() ? &units[i + threads] : nullptr, scratch,
                   sums);
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < merges.size(); ++i)
      if (ready) kernel.merge(&units[merges[i].unit], merges[i].count, scratch, sums);
  }
  if (failed) throw std::bad_alloc();
}

}  // namespace

extern "C" int vllm_pasta_steered_attention(const Batch* batch, const Shape* shape,
                                            const Layer* layer) {
  static thread_local std::vector<Unit> units;
  static thread_local std::vector<Merge> merges;
  static thread_local std::vector<int32_t> all_heads;
  try {
    if (const Status status = plan(*batch, *shape, *layer, units, merges, all_heads)) return status;
    switch (shape->format) {
      case FLOAT_PLAIN: run<Plain<Float>>(*batch, *shape, *layer, units, merges); break;
      case BFLOAT16_PLAIN: run<Plain<BFloat16>>(*batch, *shape, *layer, units, merges); break;
      case HALF_PLAIN: run<Plain<Half>>(*batch, *shape, *layer, units, merges); break;
      case BFLOAT16_PAIRED: run<Paired>(*batch, *shape, *layer, units, merges); break;
      default: return BAD_FORMAT;
    }
  } catch (const std::bad_alloc&) {
    return NO_MEMORY;  // an exception must not pass through Python, which ends the process
  }
  return OK;
}
