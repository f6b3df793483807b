// Attention, forward; see attention.h.
//
// A strip of queries meets the keys block by block (Milakov, Gimelshein, "Online normalizer calculation for softmax",
// 2018; Dao, Fu, Ermon, Rudra, Re, "FlashAttention", 2022). With m the largest exponent yet, base 2:
//
//   p = 2^(x - m'),   l = l * 2^(m - m') + sum p,   o = o * 2^(m - m') + p v,   m = m'
//
// Where there are enough heads each thread takes whole ones, so that what it packs stays in its cache. Where there are
// few, all are packed first and their chunks of queries shared out.
//
// Tile registers multiply while the others make probabilities, so strips go through them as through a line: between the
// rows of one turn (a strip before a block of keys) come the products of the turn before with its values, and the scores
// of the turn after it.
//
// A mean of the probabilities over heads takes what a head's chunk leaves behind, p of each block and its m', once l and
// the last m are known: p 2^(m' - m) / (l H). A chunk then goes through all heads, and is short where keys are many.
#include <cmath>
#include <cstring>
#include <iterator>
#include <utility>

#include "attention_operands.h"
#include "attention_probabilities.h"
#include "attention_tasks.h"

namespace pyarch {
namespace {

int64_t aligned(int64_t bytes) { return round_up(bytes, 64); }

// What a strip knows between two blocks.
struct StripState {
  float exponents[LANES];     // largest yet, of 2, a row each
  float sums[LANES * LANES];  // of probabilities, in lanes
  bool fresh;                 // nothing seen yet
};

// What the probabilities of a strip in a block of keys were taken relative to.
struct Meeting {
  Span rows, keys;
  float shifts[LANES];
};

// The probabilities of a chunk of queries: of one head as they were made, and, where wanted, their mean over heads.
struct Kept {
  int64_t first;  // query
  int64_t pitch;  // of a row, a float for each key
  float *made, *mean;
  std::vector<Meeting> meetings = {};

  int64_t row(int64_t query) const { return (query - first) * pitch; }
  // Keys that a strip has met.
  int64_t met(Span rows) const {
    int64_t keys = 0;
    for (const Meeting& meeting : meetings)
      if (meeting.rows.begin == rows.begin) keys += meeting.keys.size();
    return keys;
  }
};

// One call's units of work: a key head of a batch entry with the query heads that read it.
template <class T>
class Forward {
  using S = Step<T>;

 public:
  explicit Forward(const AttentionForward<T>& args)
      : args_(args),
        shape_(args.shape),
        rule_{args.scores},
        dropout_(args.scores.dropout, args.scores.seed),
        weights_pitch_(round_up(shape_.keys, PANEL)),
        chunk_rows_(args.weights ? kept_rows() : CHUNK<T>),
        chunks_(ceil_div(shape_.queries, chunk_rows_)),
        key_floats_(row_panels_floats<T>(shape_.keys, shape_.head_dim)),
        value_floats_(column_panels_floats<T>(shape_.keys, shape_.value_dim)),
        value_panels_(ceil_div(shape_.value_dim, PANEL)),
        query_steps_(steps_of<T>(shape_.head_dim)),
        clears_(clears_keys(shape_, args.pattern)) {}

  int64_t units() const { return shape_.batch * shape_.kv_heads; }
  int64_t chunks() const { return shape_.group() * chunks_; }  // of a unit
  double unit_weight() const { return double(shape_.group() * shape_.queries) * double(shape_.keys); }

  // Of a packed unit, and of what a thread works in.
  int64_t packed_bytes() const {
    const int64_t copied =
        clears_ ? shape_.keys * (shape_.head_dim + shape_.value_dim) * int64_t(sizeof(T)) : 0;
    return panel_bytes() + aligned(copied);
  }
  int64_t work_bytes() const {
    return aligned(int64_t(sizeof(Work))) +
           aligned(CHUNK_STRIPS<T> * strip_floats<T>(shape_.head_dim) * int64_t(sizeof(float))) +
           aligned(CHUNK<T> * value_pitch() * int64_t(sizeof(float)));
  }

  void pack_unit(int64_t unit, bool keys, bool values, char* packed) const {
    const int64_t b = unit / shape_.kv_heads, h = unit % shape_.kv_heads;
    Rows<T> key = Rows<T>::of(args_.key, b, h, shape_.head_dim);
    Rows<T> value = Rows<T>::of(args_.value, b, h, shape_.value_dim);
    const Sight sight(shape_, args_.pattern, b);
    if (clears_ && !sight.sees_every_key()) {
      const std::vector<uint8_t> seen = sight.seen({h * shape_.group(), (h + 1) * shape_.group()});
      T* const copy = reinterpret_cast<T*>(packed + panel_bytes());
      if (keys) key = copy_kept(key, shape_.keys, seen.data(), copy);
      if (values) value = copy_kept(value, shape_.keys, seen.data(), copy + shape_.keys * shape_.head_dim);
    }
    float* const panels = reinterpret_cast<float*>(packed);
    if (keys) pack_row_panels(key, shape_.keys, panels);
    if (values) pack_column_panels(value, shape_.keys, panels + key_floats_);
  }

  void run_chunks(int64_t unit, Span chunks, const char* packed, char* work) const {
    const Sight sight(shape_, args_.pattern, unit / shape_.kv_heads);
    const float* const panels = reinterpret_cast<const float*>(packed);
    for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk)
      run_chunk(sight, unit, chunk / chunks_, chunk % chunks_, panels, work, nullptr);
  }

  // Whether the call wants its weights; its chunks then go through all heads, each with two stretches of floats.
  bool keeps() const { return args_.weights; }
  int64_t kept_chunks() const { return shape_.batch * chunks_; }
  int64_t kept_bytes() const { return 2 * chunk_rows_ * weights_pitch_ * int64_t(sizeof(float)); }

  template <class Packed>
  void run_kept_chunk(int64_t task, const Packed& packed, char* work, float* floats) const {
    const int64_t b = task / chunks_, index = task % chunks_;
    const Sight sight(shape_, args_.pattern, b);
    const Span rows = chunk_of(index);
    const int64_t count = chunk_rows_ * weights_pitch_;
    Kept kept{rows.begin, weights_pitch_, floats, args_.mean_weights ? floats + count : nullptr};
    if (kept.mean) std::fill_n(kept.mean, rows.size() * weights_pitch_, 0.0f);
    for (int64_t h = 0; h < shape_.heads; ++h) {
      const int64_t unit = b * shape_.kv_heads + h / shape_.group();
      kept.meetings.clear();
      run_chunk(sight, unit, h % shape_.group(), index, reinterpret_cast<const float*>(packed(unit)), work,
                &kept);
    }
    for (int64_t query = rows.begin; kept.mean && query < rows.end; ++query)
      write_row(args_.weights + (b * shape_.queries + query) * shape_.keys, kept.mean + kept.row(query),
                shape_.keys, broadcast(1.0f));
  }

 private:
  struct Buffers {
    alignas(64) float scores[STRIP<T> * KEY_PITCH];
    alignas(64) float factors[LANES];
    alignas(64) uint8_t visible[STRIP<T> * KEY_BLOCK];
  };
  struct Work {
    Buffers buffers[IN_TILES<T> ? 2 : 1];
    alignas(64) float maxima[LANES * LANES];
    alignas(64) float shifts[LANES];
    alignas(64) uint8_t kept[Dropout::BYTES];
    StripState states[CHUNK_STRIPS<T>];
  };

  // One head's chunk of queries on its way through the keys.
  struct Chunk {
    const Sight& sight;
    int64_t batch, head;
    const float *keys, *values;
    Work& work;
    float *queries, *sums;  // packed strips; CHUNK_ROWS x value_pitch
    Kept* kept;             // or null
  };

  // One strip before one block of keys; or none, without buffers.
  struct Turn {
    Span rows;
    Parts parts;
    StripState* state;
    const float* queries;  // packed
    float* sums;
    bool fresh;  // the strip has seen nothing before
    Buffers* buffers;
  };
  // What is to be multiplied yet: a turn's probabilities with panels of values, then another's queries with panels of
  // keys, whose scores may take their place.
  struct Products {
    const Turn &summed, &scored;
    int64_t panel, key;
  };

  int64_t value_pitch() const { return value_panels_ * PANEL; }
  int64_t panel_bytes() const { return aligned((key_floats_ + value_floats_) * int64_t(sizeof(float))); }

  // Queries that leave several threads some, and their probabilities in a cache.
  int64_t kept_rows() const {
    const int64_t rows = std::min(KEPT_FLOATS / std::max<int64_t>(weights_pitch_, 1),
                                  shape_.batch * shape_.queries / KEPT_CHUNKS);
    return std::clamp(rows / STRIP<T>, int64_t(1), CHUNK_STRIPS<T>) * STRIP<T>;
  }

  Span chunk_of(int64_t index) const {
    return {shape_.queries * index / chunks_, shape_.queries * (index + 1) / chunks_};
  }

  void run_chunk(const Sight& sight, int64_t unit, int64_t head_of_group, int64_t index, const float* panels,
                 char* memory, Kept* kept) const {
    const int64_t b = unit / shape_.kv_heads;
    const int64_t h = unit % shape_.kv_heads * shape_.group() + head_of_group;
    const Span rows = chunk_of(index);
    const int64_t strips = ceil_div(rows.size(), STRIP<T>);
    const auto strip_rows = [&](int64_t s) {
      return Span{rows.begin + rows.size() * s / strips, rows.begin + rows.size() * (s + 1) / strips};
    };
    Work& work = *reinterpret_cast<Work*>(memory);
    float* const queries = reinterpret_cast<float*>(memory + aligned(sizeof(Work)));
    const int64_t query_floats = strip_floats<T>(shape_.head_dim);
    float* const sums = queries + CHUNK_STRIPS<T> * query_floats;
    const auto strip_sums = [&](int64_t s) { return sums + s * STRIP<T> * value_pitch(); };
    std::fill_n(work.maxima, LANES * LANES, MINUS_INFINITY);
    const Chunk chunk{sight, b, h, panels, panels + key_floats_, work, queries, sums, kept};

    const Rows<T> query = Rows<T>::of(args_.query, b, h, shape_.head_dim);
    for (int64_t s = 0; s < strips; ++s) {
      const Span strip = strip_rows(s);
      pack_strip(query.from(strip.begin), strip.size(), queries + s * query_floats);
      StripState& state = work.states[s];
      state.fresh = true;
      std::fill(state.exponents, state.exponents + LANES, MINUS_INFINITY);
      std::fill(state.sums, state.sums + LANES * LANES, 0.0f);
    }
    Turn before{}, now{};
    const auto proceed = [&](const Turn& next) {
      Products products{before, next, before.buffers ? 0 : value_panels_, next.parts.keys.begin};
      if (now.buffers) weigh(chunk, now, products);
      while (multiply_next(chunk, products)) {
      }
      before = std::exchange(now, next);
    };
    int64_t turns = 0;
    sight.each_block(rows, {0, shape_.keys}, [&](Span block) {
      for (int64_t s = 0; s < strips; ++s)
        sight.each_block(strip_rows(s), block, [&](Span keys) {
          const Parts parts{keys, sight.seen_whole(strip_rows(s), keys)};
          Buffers& buffers = work.buffers[turns % std::size(work.buffers)];
          if (!parts.look(sight, h, strip_rows(s), buffers.visible)) return;
          ++turns;
          StripState& state = work.states[s];
          proceed({strip_rows(s), parts, &state, queries + s * query_floats, strip_sums(s),
                   std::exchange(state.fresh, false), &buffers});
          if (!IN_TILES<T>) {
            proceed({});
            proceed({});
          }
        });
    });
    proceed({});
    proceed({});
    for (int64_t s = 0; s < strips; ++s) finish(chunk, strip_rows(s), work.states[s], strip_sums(s));
  }

  // Makes one of the products; false where none is left.
  ALWAYS_INLINE bool multiply_next(const Chunk& chunk, Products& products) const {
    if (products.panel < value_panels_) {
      const Turn& turn = products.summed;
      const Span keys = turn.parts.keys;
      const int64_t panel = products.panel++, first = keys.begin / S::ELEMENTS * PANEL;
      multiply_sums<T>(
          turn.rows.size(), shape_.value_dim - panel * PANEL,
          {turn.buffers->scores, chunk.values + panel * column_panel_floats<T>(shape_.keys) + first,
           steps_of<T>(keys.size()), turn.sums + panel * PANEL, value_pitch(), turn.buffers->factors,
           turn.fresh});
      return true;
    }
    const Turn& turn = products.scored;
    const Span keys = turn.parts.keys, whole = turn.parts.whole;
    const int64_t key = products.key;
    if (key >= keys.end) return false;
    products.key += PANEL;
    const bool ready = finds_largest() && key >= whole.begin && key < whole.end;
    multiply_scores<T>(
        turn.rows.size(), keys.end - key,
        {turn.queries, chunk.keys + key / PANEL * row_panel_floats<T>(shape_.head_dim), query_steps_,
         turn.buffers->scores + key - keys.begin, ready ? chunk.work.maxima : nullptr});
    return true;
  }

  // Whether the micro-kernel finds the largest scores too, because nothing changes what it makes.
  bool finds_largest() const { return !IN_TILES<T> && rule_.is_plain(); }

  // A turn's scores become probabilities; meanwhile products of others are made.
  void weigh(const Chunk& chunk, const Turn& turn, Products& products) const {
    Work& work = chunk.work;
    const auto [keys, whole] = turn.parts;
    const int64_t count = turn.rows.size(), width = columns_of<T>(keys.size());
    const bool plain = rule_.is_plain();
    turn.parts.each([&](Span part, bool is_whole) {
      if (is_whole && finds_largest()) return;
      for (int64_t r = 0; r < count; ++r) change_row(chunk, turn, r, part, is_whole, plain);
    });
    update_exponents(work, turn, plain);
    for (int64_t r = 0; r < count; ++r) {
      exponentiate_row(chunk, turn, r, width, plain);
      multiply_next(chunk, products);
    }
    if (chunk.kept) {
      Meeting& meeting = chunk.kept->meetings.emplace_back(Meeting{turn.rows, keys, {}});
      std::copy_n(work.shifts, LANES, meeting.shifts);
    }
  }

  // What the products of a row become before the softmax; and their largest.
  void change_row(const Chunk& chunk, const Turn& turn, int64_t r, Span keys, bool is_whole,
                  bool plain) const {
    const int64_t query = turn.rows.begin + r, column = keys.begin - turn.parts.keys.begin;
    const int64_t columns = columns_of<T>(keys.size());
    float* const scores = turn.buffers->scores + r * KEY_PITCH + column;
    const uint8_t* const visible = turn.buffers->visible + r * KEY_BLOCK + column;
    Vec largest = load(chunk.work.maxima + r * LANES);
    if (is_whole && plain) {
      for (int64_t k = 0; k < columns; k += LANES) largest = larger_of(largest, load(scores + k));
    } else {
      const auto biases = rule_.biases(chunk.batch, chunk.head, query, keys.begin);
      for (int64_t k = 0; k < columns; k += LANES) {
        Vec x = load(scores + k);
        if (!plain) {
          const Vec tanh_of_it = args_.scores.softcap != 0 ? rule_.capped(x) : x;
          x = rule_.exponent(x, tanh_of_it, biases.at(k, keys.size()));
        }
        if (!is_whole) x = where(visible + k, x, broadcast(MINUS_INFINITY));
        store(scores + k, x);
        largest = larger_of(largest, x);
      }
    }
    store(chunk.work.maxima + r * LANES, largest);
  }

  // m', 2^(m - m') and what is taken from exponents, for every row at once; the maxima begin anew.
  void update_exponents(Work& work, const Turn& turn, bool plain) const {
    Vec rows[LANES];
    unrolled<LANES>([&](auto r) { rows[r] = load(work.maxima + r * LANES); });
    transpose(rows);
    Vec largest = rows[0];
    unrolled<LANES - 1>([&](auto r) { largest = larger_of(largest, rows[r + 1]); });
    if (plain) largest = mul(largest, broadcast(rule_.factor()));
    const Vec before = load(turn.state->exponents), now = larger_of(before, largest);
    store(turn.state->exponents, now);
    const Vec shift = larger_of(now, broadcast(LOWEST));
    store(work.shifts, shift);
    store(turn.buffers->factors, power_of_two(sub(before, shift)));
    for (int64_t r = 0; r < LANES; ++r) store(work.maxima + r * LANES, broadcast(MINUS_INFINITY));
  }

  void exponentiate_row(const Chunk& chunk, const Turn& turn, int64_t r, int64_t width, bool plain) const {
    Work& work = chunk.work;
    const int64_t query = turn.rows.begin + r;
    const Span keys = turn.parts.keys;
    float* const scores = turn.buffers->scores + r * KEY_PITCH;
    const Vec factor = broadcast(plain ? rule_.factor() : 1.0f);
    const Vec shift = sub(zero(), broadcast(work.shifts[r]));
    float* const sums = turn.state->sums + r * LANES;
    Vec total = mul(load(sums), broadcast(turn.buffers->factors[r]));
    const bool drops = dropout_.drops();
    float* const made = chunk.kept ? chunk.kept->made + chunk.kept->row(query) + keys.begin : nullptr;
    if (drops) dropout_.keep(chunk.batch * shape_.heads + chunk.head, query, keys, work.kept);
#if defined(__AMX_BF16__)
    if constexpr (IN_TILES<T>) {
      if (!drops && !made) {
        for (int64_t k = 0; k < width; k += 2 * LANES) {
          const Vec low = flushed_power_of_two(fma(load(scores + k), factor, shift));
          const Vec high = flushed_power_of_two(fma(load(scores + k + LANES), factor, shift));
          total = add(total, add(low, high));
          _mm512_storeu_si512(reinterpret_cast<bfloat16*>(scores) + k, narrow_both(low, high));
        }
        store(sums, total);
        return;
      }
    }
#endif
    for (int64_t k = 0; k < width; k += LANES) {
      Vec p = power_of_two(fma(load(scores + k), factor, shift));
      total = add(total, p);
      if (drops) p = where(work.kept + k, p, zero());
      if (made) store(made + k, p);
      store_probability(scores, k, p);
    }
    store(sums, total);
  }

  // In place: a bfloat16 is written behind what is still to be read.
  static ALWAYS_INLINE void store_probability(float* row, int64_t k, Vec p) {
    if constexpr (S::ELEMENTS == 2)
      store(reinterpret_cast<bfloat16*>(row) + k, p);
    else
      store(row + k, p);
  }

  void finish(const Chunk& chunk, Span rows, const StripState& state, float* sums) const {
    for (int64_t r = 0; r < rows.size(); ++r) {
      const float* const sink = args_.scores.sinks ? args_.scores.sinks + chunk.head : nullptr;
      const RowEnd end = RowEnd::of(state.exponents[r], sum(load(state.sums + r * LANES)), sink);
      args_.lse[(chunk.batch * shape_.heads + chunk.head) * args_.lse_stride + rows.begin + r] = end.lse;
      T* const out = args_.out.at(chunk.batch, chunk.head) + (rows.begin + r) * args_.out.row_stride;
      const bool sees = end.factor != 0 && !state.fresh;
      const float share = sees ? end.factor * dropout_.rescale() : 0;
      if (sees)
        write_row(out, sums + r * value_pitch(), shape_.value_dim, broadcast(share));
      else
        std::fill(out, out + shape_.value_dim, T{});
      if (chunk.kept) weigh_row(chunk, rows, r, std::max(state.exponents[r], LOWEST), share);
    }
  }

  // Adds a row's probabilities to the mean or writes them: `share` makes those whole that were taken relative to
  // `exponent`.
  void weigh_row(const Chunk& chunk, Span rows, int64_t r, float exponent, float share) const {
    const Kept& kept = *chunk.kept;
    const int64_t query = rows.begin + r, row = kept.row(query);
    T* const weights =
        args_.weights + ((chunk.batch * shape_.heads + chunk.head) * shape_.queries + query) * shape_.keys;
    if (!kept.mean && (share == 0 || kept.met(rows) < shape_.keys)) std::fill_n(weights, shape_.keys, T{});
    if (share == 0) return;
    for (const Meeting& meeting : kept.meetings) {
      if (meeting.rows.begin != rows.begin) continue;
      const float scale = std::exp2(meeting.shifts[r] - exponent) * share;
      const float* const made = kept.made + row + meeting.keys.begin;
      if (kept.mean)
        add_row(kept.mean + row + meeting.keys.begin, made, meeting.keys.size(), scale / shape_.heads);
      else
        write_row(weights + meeting.keys.begin, made, meeting.keys.size(), broadcast(scale));
    }
  }

  static void add_row(float* sums, const float* row, int64_t columns, float scale) {
    for (int64_t k = 0; k < columns; k += LANES)
      store(sums + k, fma(load(row + k), broadcast(scale), load(sums + k)));
  }

  static constexpr int64_t KEPT_FLOATS = 64 * 1024;
  static constexpr int64_t KEPT_CHUNKS = 8;

  const AttentionForward<T>& args_;
  const AttentionShape shape_;
  const ScoreRule<T> rule_;
  const Dropout dropout_;
  const int64_t weights_pitch_, chunk_rows_, chunks_;
  const int64_t key_floats_, value_floats_, value_panels_, query_steps_;
  const bool clears_;
};

// All calls, the one with the heaviest units first.
template <class T>
class Forwards {
 public:
  Forwards(std::span<const AttentionForward<T>> calls, int64_t threads)
      : calls_(heaviest_first<Forward<T>>(calls)), tasks_(attention_work(calls), threads) {
    double all = 0;
    for (const Forward<T>& call : calls_) {
      units_.append(call.units());
      all += call.unit_weight() * double(call.units());
    }
    whole_units_ = !calls_[0].keeps() && tasks_.share_evenly(units_.count(), calls_[0].unit_weight(), all);
  }

  void run(const GiveScratch& give, const ParallelFor& parallel) const {
    const int64_t work_bytes = calls_[0].work_bytes();  // the same in all
    whole_units_ ? run_units(work_bytes, give, parallel) : run_chunks(work_bytes, give, parallel);
  }

 private:
  // Each thread packs a unit for itself.
  void run_units(int64_t work_bytes, const GiveScratch& give, const ParallelFor& parallel) const {
    int64_t packed_bytes = 0;
    for (const Forward<T>& call : calls_) packed_bytes = std::max(packed_bytes, call.packed_bytes());
    char* const memory = static_cast<char*>(give(tasks_.threads() * (packed_bytes + work_bytes)));
    tasks_.template each<T>(units_.count(), parallel, [&](int64_t task, int64_t thread) {
      const auto [index, unit] = units_.at(task);
      const Forward<T>& call = calls_[index];
      char* const packed = memory + thread * (packed_bytes + work_bytes);
      call.pack_unit(unit, true, true, packed);
      call.run_chunks(unit, {0, call.chunks()}, packed, packed + packed_bytes);
    });
  }

  // All units are packed before the first chunk. A call that wants its weights is alone.
  void run_chunks(int64_t work_bytes, const GiveScratch& give, const ParallelFor& parallel) const {
    std::vector<int64_t> first;
    TasksOfCalls chunks;
    int64_t packed_bytes = 0;
    for (const Forward<T>& call : calls_) {
      first.push_back(packed_bytes);
      packed_bytes += call.units() * call.packed_bytes();
      chunks.append(call.units() * call.chunks());
    }
    const int64_t kept_bytes = calls_[0].keeps() ? calls_[0].kept_bytes() : 0;
    char* const memory =
        static_cast<char*>(give(packed_bytes + tasks_.threads() * (work_bytes + kept_bytes)));
    const auto packed = [&](int64_t index, int64_t unit) {
      return memory + first[index] + unit * calls_[index].packed_bytes();
    };
    tasks_.template each<T>(2 * units_.count(), parallel, [&](int64_t task, int64_t) {
      const auto [index, unit] = units_.at(task / 2);
      calls_[index].pack_unit(unit, task % 2 == 0, task % 2 == 1, packed(index, unit));
    });
    if (calls_[0].keeps()) {
      char* const works = memory + packed_bytes;
      char* const kept = works + tasks_.threads() * work_bytes;
      tasks_.template each<T>(calls_[0].kept_chunks(), parallel, [&](int64_t task, int64_t thread) {
        calls_[0].run_kept_chunk(
            task, [&](int64_t unit) { return packed(0, unit); }, works + thread * work_bytes,
            reinterpret_cast<float*>(kept + thread * kept_bytes));
      });
      return;
    }
    tasks_.template each<T>(chunks.count(), parallel, [&](int64_t task, int64_t thread) {
      const auto [index, place] = chunks.at(task);
      const Forward<T>& call = calls_[index];
      const int64_t unit = place / call.chunks(), chunk = place % call.chunks();
      call.run_chunks(unit, {chunk, chunk + 1}, packed(index, unit),
                      memory + packed_bytes + thread * work_bytes);
    });
  }

  const std::vector<Forward<T>> calls_;
  const Tasks tasks_;
  TasksOfCalls units_;
  bool whole_units_;
};

}  // namespace

template <class T>
void attention_forward(std::span<const AttentionForward<T>> calls, const GiveScratch& scratch,
                       int64_t threads, const ParallelFor& parallel) {
  std::vector<AttentionForward<T>> present;
  for (const AttentionForward<T>& call : calls)
    if (call.shape.batch * call.shape.heads * call.shape.queries != 0) present.push_back(call);
  if (present.empty()) return;
  if (std::all_of(present.begin(), present.end(), is_direct<T>))
    return attention_direct<T>(present, scratch, threads, parallel);
  Forwards<T>(present, threads).run(scratch, parallel);
}

template void attention_forward(std::span<const AttentionForward<float>>, const GiveScratch&, int64_t,
                                const ParallelFor&);
template void attention_forward(std::span<const AttentionForward<bfloat16>>, const GiveScratch&, int64_t,
                                const ParallelFor&);
template void attention_forward(std::span<const AttentionForward<float16>>, const GiveScratch&, int64_t,
                                const ParallelFor&);

}  // namespace pyarch
