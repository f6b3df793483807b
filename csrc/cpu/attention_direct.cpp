// Attention of few queries, forward; see attention.h.
//
// Here reading keys and values is the work, so each is read once, where it lies: the queries that share a key head meet
// PART of its keys a task, in which
//
//   m = max x,   p = 2^(x - m),   l = sum p,   o = p v
//
// and the parts of a head are added in order (Dao, Haziza, Massa, Sizov, "Flash-Decoding for long-context inference",
// 2023): with m' the largest m,
//
//   out = (sum 2^(m - m') o) / (sum 2^(m - m') l)
#include "attention_probabilities.h"
#include "attention_tasks.h"

namespace pyarch {
namespace {

// More are faster packed.
template <class T>
constexpr int64_t MOST_ROWS = IN_TILES<T> ? 4 : 8;
constexpr int64_t PART = 256;  // keys
constexpr int TOGETHER = 4;    // keys, so that memory is read in long runs

constexpr int64_t AHEAD = 32;  // keys

// A hint, which may point behind the end.
ALWAYS_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

int64_t in_whole(int64_t count, int64_t of) { return ceil_div(count, of) * of; }

// How a vector of elements is read and multiplied.
template <class T>
struct Product {
  static constexpr int64_t ELEMENTS = LANES;

  static ALWAYS_INLINE Vec load_all(const T* p) { return load(p); }
  static ALWAYS_INLINE Vec load_first(const T* p, int64_t count) { return load(p, first_lanes(count)); }
  static ALWAYS_INLINE Vec add_to(Vec sums, Vec a, Vec b) { return fma(a, b, sums); }
};

#if defined(__AVX512BF16__)

template <>
struct Product<bfloat16> {
  static constexpr int64_t ELEMENTS = 2 * LANES;

  static ALWAYS_INLINE Vec load_all(const bfloat16* p) { return load_pairs(p); }
  static ALWAYS_INLINE Vec load_first(const bfloat16* p, int64_t count) { return load_pairs(p, count); }
  static ALWAYS_INLINE Vec add_to(Vec sums, Vec a, Vec b) { return dot_pairs(a, b, sums); }
};

#endif

// One call's units of work: a key head of a batch entry with the query heads that read it.
template <class T>
class Direct {
  using P = Product<T>;

 public:
  explicit Direct(const AttentionForward<T>& args)
      : args_(args),
        shape_(args.shape),
        rule_{args.scores},
        rows_(shape_.group() * shape_.queries),
        query_pitch_(in_whole(shape_.head_dim, P::ELEMENTS)),
        value_pitch_(in_whole(shape_.value_dim, LANES)),
        seen_{near(0).begin, near(shape_.queries - 1).end},
        parts_(std::max<int64_t>(0, ceil_div(seen_.size(), PART))) {}

  int64_t units() const { return shape_.batch * shape_.kv_heads; }
  int64_t parts() const { return parts_; }
  double multiply_adds() const {
    return double(units() * rows_ * parts_ * PART) * double(shape_.head_dim + shape_.value_dim);
  }
  // What a part leaves behind: of every row the largest exponent, the sum of powers, and the weighted values.
  int64_t part_floats() const { return in_whole(2 * rows_, LANES) + rows_ * value_pitch_; }
  int64_t work_floats() const { return rows_ * (PART + query_pitch_); }

  void run_part(int64_t unit, int64_t part, float* work, float* result) const {
    const int64_t b = unit / shape_.kv_heads, kv_head = unit % shape_.kv_heads;
    const Span keys{seen_.begin + part * PART, std::min(seen_.begin + (part + 1) * PART, seen_.end)};
    float* const scores = work;
    T* const queries = reinterpret_cast<T*>(work + rows_ * PART);
    copy_queries(b, kv_head, queries);
    const T* const key = args_.key.at(b, kv_head) + keys.begin * args_.key.row_stride;
    int64_t k = 0;
    for (; k + LANES <= keys.size(); k += LANES)
      multiply<false>(key + k * args_.key.row_stride, LANES, queries, scores + k);
    if (k < keys.size()) multiply<true>(key + k * args_.key.row_stride, keys.size() - k, queries, scores + k);
    for (int64_t row = 0; row < rows_; ++row) {
      float* const scores_of_row = scores + row * PART;
      const float largest = change_row(row, keys, scores_of_row);
      result[row] = largest;
      result[rows_ + row] = exponentiate(scores_of_row, keys.size(), largest);
    }
    const T* const value = args_.value.at(b, kv_head) + keys.begin * args_.value.row_stride;
    weigh_values(value, keys.size(), scores, result + in_whole(2 * rows_, LANES));
  }

  // Adds up the parts of a unit, which lie one behind another; factors take the place of exponents.
  void finish(int64_t unit, float* results) const {
    const int64_t b = unit / shape_.kv_heads, kv_head = unit % shape_.kv_heads;
    const int64_t pitch = part_floats(), values = in_whole(2 * rows_, LANES);
    for (int64_t row = 0; row < rows_; ++row) {
      float largest = MINUS_INFINITY, total = 0;
      for (int64_t part = 0; part < parts_; ++part) largest = std::max(largest, results[part * pitch + row]);
      for (int64_t part = 0; part < parts_; ++part) {
        float& exponent = results[part * pitch + row];
        exponent = exponent == MINUS_INFINITY ? 0 : std::exp2(exponent - largest);
        total += exponent * results[part * pitch + rows_ + row];
      }
      const int64_t h = head(kv_head, row), query = row % shape_.queries;
      const RowEnd end = RowEnd::of(largest, total, args_.scores.sinks ? args_.scores.sinks + h : nullptr);
      args_.lse[(b * shape_.heads + h) * args_.lse_stride + query] = end.lse;
      T* const out = args_.out.at(b, h) + query * args_.out.row_stride;
      for (int64_t c = 0; c < shape_.value_dim; c += LANES) {
        Vec sums = zero();
        for (int64_t part = 0; part < parts_; ++part) {
          const float* const result = results + part * pitch;
          if (result[row] != 0)
            sums = fma(load(result + values + row * value_pitch_ + c), broadcast(result[row]), sums);
        }
        store(out + c, mul(sums, broadcast(end.factor)), first_lanes(shape_.value_dim - c));
      }
    }
  }

 private:
  int64_t head(int64_t kv_head, int64_t row) const { return kv_head * shape_.group() + row / shape_.queries; }

  // The keys that a query sees.
  Span near(int64_t query) const {
    const AttentionPattern& pattern = args_.pattern;
    const int64_t p = query + pattern.query_offset;
    const int64_t begin = pattern.left < UNBOUNDED ? p - pattern.left : 0;
    int64_t end = pattern.right < UNBOUNDED ? p + pattern.right + 1 : shape_.keys;
    if (pattern.is_causal) end = std::min(end, p + 1);
    return {std::clamp<int64_t>(begin, 0, shape_.keys), std::clamp<int64_t>(end, 0, shape_.keys)};
  }

  void copy_queries(int64_t b, int64_t kv_head, T* copies) const {
    for (int64_t row = 0; row < rows_; ++row, copies += query_pitch_) {
      const T* const query =
          args_.query.at(b, head(kv_head, row)) + row % shape_.queries * args_.query.row_stride;
      for (int64_t c = 0; c < shape_.head_dim; ++c) copies[c] = query[c * args_.query.column_stride];
      std::fill(copies + shape_.head_dim, copies + query_pitch_, T{});
    }
  }

  // The products of every row with LANES keys, or with fewer: those that are missing are read as the first.
  template <bool FEWER>
  void multiply(const T* key, int64_t count, const T* queries, float* scores) const {
    const int64_t stride = args_.key.row_stride, whole = shape_.head_dim / P::ELEMENTS * P::ELEMENTS;
    const int64_t rest = shape_.head_dim - whole, ahead = AHEAD * stride;
    for (int64_t row = 0; row < rows_; ++row, queries += query_pitch_, scores += PART) {
      Vec sums[LANES];
      unrolled<LANES / TOGETHER>([&](auto group) {
        Vec some[TOGETHER];
        const T* keys[TOGETHER];
        unrolled<TOGETHER>([&](auto i) {
          some[i] = zero();
          keys[i] = key + (FEWER && group * TOGETHER + i >= count ? 0 : (group * TOGETHER + i) * stride);
        });
        for (int64_t c = 0; c < whole; c += P::ELEMENTS) {
          const Vec query = P::load_all(queries + c);
          unrolled<TOGETHER>([&](auto i) {
            prefetch(keys[i] + ahead + c);
            some[i] = P::add_to(some[i], P::load_all(keys[i] + c), query);
          });
        }
        if (rest) {
          const Vec query = P::load_all(queries + whole);
          unrolled<TOGETHER>(
              [&](auto i) { some[i] = P::add_to(some[i], P::load_first(keys[i] + whole, rest), query); });
        }
        unrolled<TOGETHER>([&](auto i) { sums[group * TOGETHER + i] = some[i]; });
      });
      store(scores, sum_each(sums));
    }
  }

  // What the products of a row become before the softmax, minus infinity where it does not see; the largest.
  float change_row(int64_t row, Span keys, float* scores) const {
    const Span sees = near(row % shape_.queries);
    const Vec factor = broadcast(rule_.factor());
    const bool plain = rule_.is_plain();
    const int64_t first = sees.begin - keys.begin, end = std::min(sees.end - keys.begin, keys.size());
    alignas(64) float lanes[LANES];
    Vec largest = broadcast(MINUS_INFINITY);
    for (int64_t k = 0; k < keys.size(); k += LANES) {
      Vec x = load(scores + k);
      if (plain)
        x = mul(x, factor);
      else
        x = rule_.exponent(x, args_.scores.softcap != 0 ? rule_.capped(x) : x, zero());
      store(scores + k, x);
      if (k < first || k + LANES > end) {
        for (int64_t lane = k; lane < k + LANES; ++lane)
          if (lane < first || lane >= end) scores[lane] = MINUS_INFINITY;
        x = load(scores + k);
      }
      largest = larger_of(largest, x);
    }
    store(lanes, largest);
    return *std::max_element(lanes, lanes + LANES);
  }

  // From exponents to powers; their sum.
  static float exponentiate(float* scores, int64_t count, float largest) {
    const Vec shift = broadcast(std::max(largest, LOWEST));
    Vec total = zero();
    for (int64_t k = 0; k < count; k += LANES) {
      const Vec p = power_of_two(sub(load(scores + k), shift));
      store(scores + k, p);
      total = add(total, p);
    }
    return sum(total);
  }

  // sums[row, c] = sum over keys of scores[row, k] * value[k, c]
  void weigh_values(const T* value, int64_t count, const float* scores, float* sums) const {
    constexpr int MANY = REGISTERS == 32 ? 4 : 2;  // rows that share a read
    int64_t row = 0;
    for (; row + MANY <= rows_; row += MANY)
      weigh<MANY>(value, count, scores + row * PART, sums + row * value_pitch_);
    for (; row < rows_; ++row) weigh<1>(value, count, scores + row * PART, sums + row * value_pitch_);
  }

  template <int ROW_COUNT>
  void weigh(const T* value, int64_t count, const float* scores, float* sums) const {
    constexpr int WIDE = ROW_COUNT == 1 ? 8 : 4;
    const int64_t vectors = shape_.value_dim / LANES;
    int64_t vector = 0;
    const auto advance = [&](auto columns) {
      for (; vector + columns <= vectors; vector += columns)
        weigh_columns<ROW_COUNT, columns>(value + vector * LANES, count, scores, sums + vector * LANES,
                                          LANES);
    };
    advance(std::integral_constant<int, WIDE>{});
    advance(std::integral_constant<int, 4>{});
    advance(std::integral_constant<int, 1>{});
    if (const int64_t rest = shape_.value_dim - vectors * LANES)
      weigh_columns<ROW_COUNT, 1>(value + vectors * LANES, count, scores, sums + vectors * LANES, rest);
  }

  template <int ROW_COUNT, int VECTORS>
  void weigh_columns(const T* value, int64_t count, const float* scores, float* sums, int64_t lanes) const {
    Vec totals[ROW_COUNT][VECTORS];
    unrolled<ROW_COUNT>([&](auto r) { unrolled<VECTORS>([&](auto c) { totals[r][c] = zero(); }); });
    const bool whole = lanes == LANES;
    for (int64_t k = 0; k < count; ++k, value += args_.value.row_stride) {
      Vec columns[VECTORS];
      unrolled<VECTORS>([&](auto c) {
        prefetch(value + AHEAD * args_.value.row_stride + c * LANES);
        columns[c] = VECTORS > 1 || whole ? load(value + c * LANES) : load(value, first_lanes(lanes));
      });
      unrolled<ROW_COUNT>([&](auto r) {
        const Vec p = broadcast(scores[r * PART + k]);
        unrolled<VECTORS>([&](auto c) { totals[r][c] = fma(p, columns[c], totals[r][c]); });
      });
    }
    unrolled<ROW_COUNT>([&](auto r) {
      unrolled<VECTORS>([&](auto c) { store(sums + r * value_pitch_ + c * LANES, totals[r][c]); });
    });
  }

  const AttentionForward<T>& args_;
  const AttentionShape shape_;
  const ScoreRule<T> rule_;
  const int64_t rows_, query_pitch_, value_pitch_;
  const Span seen_;
  const int64_t parts_;
};

}  // namespace

template <class T>
bool is_direct(const AttentionForward<T>& args) {
  const AttentionPattern& pattern = args.pattern;
  const AttentionScores<T>& scores = args.scores;
  const bool is_banded = !pattern.mask.data && !pattern.padding.data && !pattern.global.data &&
                         pattern.global_tokens == 0 && pattern.dilation == 1;
  return args.shape.group() * args.shape.queries <= MOST_ROWS<T> && is_banded && !scores.bias.data &&
         !scores.float_bias.data && !scores.distance_bias.data && scores.dropout == 0 && !args.weights &&
         args.key.column_stride == 1 && args.value.column_stride == 1;
}

template <class T>
void attention_direct(std::span<const AttentionForward<T>> calls, const GiveScratch& scratch, int64_t threads,
                      const ParallelFor& parallel) {
  const std::vector<Direct<T>> all(calls.begin(), calls.end());
  TasksOfCalls parts, units;
  std::vector<int64_t> first;
  int64_t floats = 0, work_floats = 0;
  double multiply_adds = 0;
  for (const Direct<T>& call : all) {
    multiply_adds += call.multiply_adds();
    first.push_back(floats);
    floats += call.units() * call.parts() * call.part_floats();
    work_floats = std::max(work_floats, in_whole(call.work_floats(), LANES));
    parts.append(call.units() * call.parts());
    units.append(call.units());
  }
  const Tasks tasks(multiply_adds, threads);
  float* const memory =
      static_cast<float*>(scratch((floats + tasks.threads() * work_floats) * int64_t(sizeof(float))));
  tasks.template each<T>(parts.count(), parallel, [&](int64_t task, int64_t thread) {
    const auto [index, part] = parts.at(task);
    const Direct<T>& call = all[index];
    call.run_part(part / call.parts(), part % call.parts(), memory + floats + thread * work_floats,
                  memory + first[index] + part * call.part_floats());
  });
  // Mostly too little for several threads.
  Tasks(double(floats), threads).each<T>(units.count(), parallel, [&](int64_t task, int64_t) {
    const auto [index, unit] = units.at(task);
    const Direct<T>& call = all[index];
    call.finish(unit, memory + first[index] + unit * call.parts() * call.part_floats());
  });
}

#define INSTANTIATE(T)                                                                              \
  template bool is_direct(const AttentionForward<T>&);                                              \
  template void attention_direct(std::span<const AttentionForward<T>>, const GiveScratch&, int64_t, \
                                 const ParallelFor&);
INSTANTIATE(float)
INSTANTIATE(bfloat16)
INSTANTIATE(float16)

}  // namespace pyarch
