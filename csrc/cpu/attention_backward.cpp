// Attention, backward; see attention.h.
//
//   p = 2^(x - lse),  dv = p^T do,  dp = do v^T,  ds = p (dp - delta),  dq = ds k,  dk = ds^T q,
//   delta = sum(do * o) - dlse
//
// Where all keys lie in one block, delta = sum(p dp) / sum(p) - dlse, which is the same but for rounding: an error of
// delta is one of all of a row's ds, and so is multiplied by what its keys have in common.
//
// A block of keys meets the chunks of queries one after another. Each strip of a chunk makes its scores again, from them
// p and ds, and adds to dq; then the chunk's p and ds, read across, add to the block's dv and dk. Five products, of which
// none is done twice. Where there are fewer heads than threads the keys of a head are split; each part sums a dq of its
// own, and these are added in order. So is the gradient of a bias that depends on distance alone, of which every part of
// a head sums its own: d[j - i] += ds.
#include <cstring>

#include "attention_key_sums.h"
#include "attention_row_gradients.h"

namespace pyarch {
namespace {

template <class T>
class Backward {
  using S = Step<T>;
  using Row = typename RowGradients<T>::Row;
  static constexpr int64_t E = S::ELEMENTS;
  static constexpr int64_t STRIP_DISTANCES = STRIP<T> + KEY_PITCH;  // of a strip to a block of keys

 public:
  explicit Backward(const AttentionBackward<T>& args)
      : args_(args),
        shape_(args.shape),
        rows_(args),
        head_panels_(ceil_div(shape_.head_dim, PANEL)),
        query_floats_(round_up(shape_.queries, STRIP<T>) * head_panels_ * PANEL),
        distances_(args.distance_grad ? shape_.queries + shape_.keys - 1 : 0),
        key_sums_(shape_.keys, shape_.head_dim),
        value_sums_(shape_.keys, shape_.value_dim),
        blocks_(ceil_div(shape_.keys, KEY_BLOCK)),
        clears_(clears_keys(shape_, args.pattern)) {
    const bool sums_bias = args.bias_grad.data;
    sums_batches_ = sums_bias && args.bias_grad.batch_stride == 0;
    sums_heads_ = sums_bias && args.bias_grad.head_stride == 0;
    groups_ = (sums_batches_ ? 1 : shape_.batch) * (sums_heads_ ? 1 : shape_.kv_heads);
    layout_ = lay_out();
  }

  // Units that add to the same gradient of a bias are one group.
  int64_t groups() const { return groups_; }
  double unit_weight() const {
    const int64_t units = shape_.batch * shape_.kv_heads / groups_;
    return double(units * shape_.group() * shape_.queries) * double(shape_.keys);
  }
  // Divides the keys of each group into at most so many parts.
  void split(int64_t parts) {
    const bool fixed = args_.bias_grad.data && args_.bias_grad.key_stride == 0;
    splits_ = fixed ? 1 : std::min(blocks_, parts);
  }

  int64_t tasks() const { return groups_ * splits_; }
  int64_t heads_to_sum() const { return splits_ > 1 && (args_.query_grad.data || distances_) ? heads() : 0; }
  int64_t partial_floats() const { return splits_ > 1 ? heads() * splits_ * sum_floats() : 0; }
  int64_t work_floats() const { return layout_.floats + (splits_ > 1 ? 0 : sum_floats()); }

  void run(int64_t task, float* work, float* partials) const {
    const int64_t group = task / splits_, split = task % splits_;
    const Thread own{work, layout_};
    const Span keys{blocks_ * split / splits_ * KEY_BLOCK,
                    std::min(shape_.keys, blocks_ * (split + 1) / splits_ * KEY_BLOCK)};
    each_unit(group, [&](int64_t b, int64_t kv_head) {
      run_unit(b, kv_head, keys, own, [&](int64_t h) {
        return splits_ > 1 ? partials + ((b * shape_.heads + h) * splits_ + split) * sum_floats()
                           : work + layout_.floats;
      });
    });
  }

  void sum_partials(int64_t head, float* partials) const {
    float* const sums = partials + head * splits_ * sum_floats();
    for (int64_t split = 1; split < splits_; ++split)
      for (int64_t i = 0; i < query_floats_ + distances_; ++i) sums[i] += sums[split * sum_floats() + i];
    write_head(head / shape_.heads, head % shape_.heads, sums);
  }

 private:
  // Where a thread keeps what, in floats.
  struct Layout {
    int64_t keys, key_columns, values;  // the block's operands
    int64_t queries, query_columns;     // the chunk's
    int64_t out_grads, out_grad_columns;
    int64_t scores, probability_grads, slopes;  // a strip's
    int64_t probabilities, score_grads, strip_score_grads;
    int64_t key_grads, value_grads;  // the unit's
    int64_t deltas, exponents;       // the head's
    int64_t bias_grads;              // the strip's, where its queries share a bias
    int64_t distance_grads;          // the strip's
    int64_t visible, kept, copies, floats;
  };
  struct Thread {
    float* memory;
    const Layout& at;
  };
  // One head's chunk of queries before one block of keys.
  struct Meeting {
    const Sight& sight;
    int64_t batch, head;
    Span queries, keys;
    const Thread& own;
    float* query_sums;  // of the head, then those of distances
  };

  int64_t heads() const { return shape_.batch * shape_.heads; }
  bool in_one_block() const { return blocks_ == 1; }
  int64_t head_pitch() const { return head_panels_ * PANEL; }
  int64_t sum_floats() const { return query_floats_ + round_up(distances_, LANES); }  // of a head
  static int64_t floats(int64_t bytes) { return ceil_div(bytes, 64) * 16; }

  Layout lay_out() const {
    int64_t end = 0;
    const auto take = [&](int64_t count) { return std::exchange(end, end + ceil_div(count, 16) * 16); };
    const int64_t d = shape_.head_dim, dv = shape_.value_dim;
    Layout at;
    at.keys = take(row_panels_floats<T>(KEY_BLOCK, d));
    at.key_columns = take(column_panels_floats<T>(KEY_BLOCK, d));
    at.values = take(row_panels_floats<T>(KEY_BLOCK, dv));
    at.queries = take(CHUNK_STRIPS<T> * strip_floats<T>(std::max(d, dv)));
    at.query_columns = take(key_sums_.operand_floats());
    at.out_grads = take(CHUNK_STRIPS<T> * strip_floats<T>(dv));
    at.out_grad_columns = take(value_sums_.operand_floats());
    at.scores = take(STRIP<T> * KEY_PITCH);
    at.probability_grads = take(STRIP<T> * KEY_PITCH);
    at.slopes = take(args_.scores.softcap != 0 ? STRIP<T> * KEY_PITCH : 0);
    at.probabilities = take(CHUNK<T> / E * KEY_PITCH);
    at.score_grads = take(CHUNK<T> / E * KEY_PITCH);
    at.strip_score_grads = take(E > 1 ? STRIP<T> * KEY_PITCH : 0);
    at.key_grads = take(key_sums_.floats());
    at.value_grads = take(value_sums_.floats());
    at.deltas = take(shape_.queries);
    at.exponents = take(shape_.queries);
    at.bias_grads = take(KEY_PITCH);
    at.distance_grads = take(distances_ ? STRIP_DISTANCES : 0);
    at.visible = take(floats(STRIP<T> * KEY_BLOCK));
    at.kept = take(floats(Dropout::BYTES));
    at.copies = take(floats(((clears_ ? shape_.keys : 0) + CHUNK<T>)*(d + dv) * int64_t(sizeof(T))));
    at.floats = end;
    return at;
  }

  // The batch entries and key heads that add to the same gradient of a bias; without one, a single pair.
  template <class Body>
  void each_unit(int64_t group, Body&& body) const {
    const int64_t heads = sums_heads_ ? 1 : shape_.kv_heads;
    const int64_t b = sums_batches_ ? 0 : group / heads, h = sums_heads_ ? 0 : group % heads;
    for (int64_t batch = b; batch < (sums_batches_ ? shape_.batch : b + 1); ++batch)
      for (int64_t head = h; head < (sums_heads_ ? shape_.kv_heads : h + 1); ++head) body(batch, head);
  }

  template <class QuerySums>
  void run_unit(int64_t b, int64_t kv_head, Span keys, const Thread& own, QuerySums&& query_sums_of) const {
    const Sight sight(shape_, args_.pattern, b);
    Rows<T> key = Rows<T>::of(args_.key, b, kv_head, shape_.head_dim);
    Rows<T> value = Rows<T>::of(args_.value, b, kv_head, shape_.value_dim);
    if (clears_ && !sight.sees_every_key()) {
      const auto seen = sight.seen({kv_head * shape_.group(), (kv_head + 1) * shape_.group()});
      T* const copies = query_copies(own) + CHUNK<T> * (shape_.head_dim + shape_.value_dim);
      key = copy_kept(key, shape_.keys, seen.data(), copies);
      value = copy_kept(value, shape_.keys, seen.data(), copies + shape_.keys * shape_.head_dim);
    }
    float* const key_grads = own.memory + own.at.key_grads;
    float* const value_grads = own.memory + own.at.value_grads;
    key_sums_.clear(key_grads, keys);
    value_sums_.clear(value_grads, keys);
    for (int64_t h = kv_head * shape_.group(); h < (kv_head + 1) * shape_.group(); ++h) {
      float* const query_sums = query_sums_of(h);
      std::memset(query_sums, 0, (query_floats_ + distances_) * sizeof(float));
      prepare_head(sight, b, h, own);
      for (int64_t begin = keys.begin; begin < keys.end; begin += KEY_BLOCK)
        run_block(sight, b, h, {begin, std::min(begin + KEY_BLOCK, keys.end)}, key, value, own, query_sums);
      if (splits_ == 1) write_head(b, h, query_sums);
    }
    if (args_.key_grad.data)
      key_sums_.write(key_grads, keys, args_.key_grad.at(b, kv_head), args_.key_grad.row_stride,
                      args_.scores.scale);
    if (args_.value_grad.data)
      value_sums_.write(value_grads, keys, args_.value_grad.at(b, kv_head), args_.value_grad.row_stride, 1);
  }

  // delta and what is taken from exponents, of every query; infinity where it sees nothing. delta is summed as the
  // products of probability gradients are, so that a query which sees one key finds no difference.
  // Where a block holds all keys, the products are left to its rows.
  void prepare_head(const Sight& sight, int64_t b, int64_t h, const Thread& own) const {
    const auto out = Rows<T>::of(args_.out, b, h, shape_.value_dim);
    const auto grad = Rows<T>::of(args_.out_grad, b, h, shape_.value_dim);
    const int64_t first = (b * shape_.heads + h) * args_.lse_stride;
    float *const outs = own.memory + own.at.queries, *const grads = own.memory + own.at.out_grads;
    for (int64_t i = 0; i < shape_.queries; i += STRIP<T>) {
      const int64_t count = std::min<int64_t>(STRIP<T>, shape_.queries - i);
      float products[LANES] = {};
      if (!in_one_block()) {
        pack_strip(out.from(i), count, outs);
        pack_strip(grad.from(i), count, grads);
        multiply_rows(grads, outs, products);
      }
      for (int64_t r = 0; r < count; ++r) {
        const float lse = args_.lse[first + i + r];
        // With a sink even what sees nothing has a sum.
        const bool blind = lse == MINUS_INFINITY || (args_.scores.sinks && sight.is_blind(h, i + r));
        const float of_lse = args_.lse_grad ? args_.lse_grad[first + i + r] : 0;
        own.memory[own.at.exponents + i + r] = blind ? -MINUS_INFINITY : lse * LOG2_E;
        own.memory[own.at.deltas + i + r] = blind ? 0 : products[r] - of_lse;
      }
    }
  }

  // Row by row the product of two packed strips.
  void multiply_rows(const float* a, const float* b, float* products) const {
    const int64_t steps = steps_of<T>(shape_.value_dim);
    Vec sums = zero();
    if constexpr (IN_TILES<T>) {
      for (int64_t r = 0; r < LANES; ++r) {
        Vec row = zero();
        for (int64_t step = 0; step < steps; step += LANES)
          row = S::multiply_add(load(a + r * steps + step), load(b + r * steps + step), row);
        products[r] = sum(row);
      }
      return;
    }
    for (int64_t step = 0; step < steps; ++step)
      sums = S::multiply_add(load(a + step * LANES), load(b + step * LANES), sums);
    store(products, sums);
  }

  T* query_copies(const Thread& own) const { return reinterpret_cast<T*>(own.memory + own.at.copies); }

  void run_block(const Sight& sight, int64_t b, int64_t h, Span keys, const Rows<T>& key,
                 const Rows<T>& value, const Thread& own, float* query_sums) const {
    bool packed = false;
    const int64_t chunks = ceil_div(shape_.queries, CHUNK<T>);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const Span queries{chunk * CHUNK<T>, std::min((chunk + 1) * CHUNK<T>, shape_.queries)};
      bool meets = false;
      sight.each_block(queries, keys, [&](Span) { meets = true; });
      if (!meets) continue;
      if (!std::exchange(packed, true)) {
        pack_row_panels(key.from(keys.begin), keys.size(), own.memory + own.at.keys);
        pack_row_panels(value.from(keys.begin), keys.size(), own.memory + own.at.values);
        if (args_.query_grad.data)
          pack_column_panels(key.from(keys.begin), keys.size(), own.memory + own.at.key_columns);
      }
      run_chunk({sight, b, h, queries, keys, own, query_sums});
    }
  }

  void run_chunk(const Meeting& meeting) const {
    const Thread& own = meeting.own;
    const Span queries = meeting.queries;
    const int64_t strips = ceil_div(queries.size(), STRIP<T>);
    pack_queries(meeting);
    Span seen[CHUNK_STRIPS<T>];  // of the block's keys, by a strip
    for (int64_t s = 0; s < (IN_TILES<T> ? strips + strips % 2 : strips); ++s) {
      const Span rows{queries.begin + s * STRIP<T>,
                      std::min(queries.begin + (s + 1) * STRIP<T>, queries.end)};
      seen[s] = {meeting.keys.end, meeting.keys.begin};
      int64_t runs = 0;
      const auto each_run = [&](auto&& body) {
        if (s < strips) each_stretch(meeting, rows, body);
      };
      each_run([&](Span keys) {
        seen[s] = {std::min(seen[s].begin, keys.begin), std::max(seen[s].end, keys.end)};
        ++runs;
      });
      const bool sees_block = runs == 1 && seen[s].size() == meeting.keys.size();
      if (!sees_block || rows.size() < STRIP<T>) clear_strip(own, s);
      each_run([&](Span keys) {
        if (!run_strip(meeting, s, rows, keys) && sees_block) clear_strip(own, s);
      });
    }
    for (int64_t key = meeting.keys.begin; key < meeting.keys.end; key += KeySums<T>::TILE) {
      const Span tile{key, std::min(key + KeySums<T>::TILE, meeting.keys.end)};
      int64_t first = strips, last = 0;
      for (int64_t s = 0; s < strips; ++s)
        if (seen[s].begin < tile.end && seen[s].end > tile.begin) {
          first = std::min(first, s);
          last = s + 1;
        }
      if (IN_TILES<T>) first -= first % 2;  // whole multiples of steps
      if (first < last)
        sum_over_queries(meeting, tile, {first * STRIP<T>, std::min(last * STRIP<T>, queries.size())});
    }
  }

  // Calls body(keys) for the stretches of the block that a strip meets; where the block holds all keys, for one.
  template <class Body>
  void each_stretch(const Meeting& meeting, Span rows, Body&& body) const {
    if (!in_one_block()) return meeting.sight.each_block(rows, meeting.keys, body);
    Span all{meeting.keys.end, meeting.keys.begin};
    meeting.sight.each_block(rows, meeting.keys, [&](Span keys) {
      all = {std::min(all.begin, keys.begin), std::max(all.end, keys.end)};
    });
    if (all.size() > 0) body(all);
  }

  void pack_queries(const Meeting& meeting) const {
    const Thread& own = meeting.own;
    const Span queries = meeting.queries;
    const int64_t count = queries.size();
    auto query = Rows<T>::of(args_.query, meeting.batch, meeting.head, shape_.head_dim).from(queries.begin);
    auto grad =
        Rows<T>::of(args_.out_grad, meeting.batch, meeting.head, shape_.value_dim).from(queries.begin);
    uint8_t sees[CHUNK<T>];
    bool all = true;
    for (int64_t i = 0; i < count; ++i) {
      sees[i] = own.memory[own.at.exponents + queries.begin + i] < -MINUS_INFINITY;
      all &= bool(sees[i]);
    }
    if (!all) {
      query = copy_kept(query, count, sees, query_copies(own));
      grad = copy_kept(grad, count, sees, query_copies(own) + CHUNK<T> * shape_.head_dim);
    }
    for (int64_t s = 0; s * STRIP<T> < count; ++s) {
      const int64_t rows = std::min<int64_t>(STRIP<T>, count - s * STRIP<T>);
      pack_strip(query.from(s * STRIP<T>), rows,
                 own.memory + own.at.queries + s * strip_floats<T>(shape_.head_dim));
      pack_strip(grad.from(s * STRIP<T>), rows,
                 own.memory + own.at.out_grads + s * strip_floats<T>(shape_.value_dim));
    }
    if (args_.key_grad.data) key_sums_.pack_chunk(query, count, own.memory + own.at.query_columns);
    if (args_.value_grad.data) value_sums_.pack_chunk(grad, count, own.memory + own.at.out_grad_columns);
  }

  // Zeros, for the keys of the block that a strip does not see.
  static void clear_strip(const Thread& own, int64_t s) {
    const int64_t first = s * STRIP<T> / E * KEY_PITCH, count = STRIP<T> / E * KEY_PITCH;
    std::memset(own.memory + own.at.probabilities + first, 0, count * sizeof(float));
    std::memset(own.memory + own.at.score_grads + first, 0, count * sizeof(float));
  }

  static RowBuffers buffers_of(const Thread& own) {
    const Layout& at = own.at;
    float* const memory = own.memory;
    return {memory + at.scores,        memory + at.probability_grads,
            memory + at.slopes,        memory + at.strip_score_grads,
            memory + at.probabilities, memory + at.score_grads,
            memory + at.exponents,     memory + at.deltas,
            memory + at.kept};
  }

  // Returns whether any query sees any key; else nothing is written.
  bool run_strip(const Meeting& meeting, int64_t s, Span rows, Span keys) const {
    const Thread& own = meeting.own;
    const int64_t count = rows.size(), width = columns_of<T>(keys.size());
    const int64_t offset = keys.begin - meeting.keys.begin;
    uint8_t* const visible = reinterpret_cast<uint8_t*>(own.memory + own.at.visible);
    const Parts parts{keys, meeting.sight.seen_whole(rows, keys)};
    if (!parts.look(meeting.sight, meeting.head, rows, visible)) return false;
    float* const scores = own.memory + own.at.scores;
    float* const probability_grads = own.memory + own.at.probability_grads;
    const auto multiply = [&](int64_t left, int64_t right, int64_t elements, float* products) {
      const int64_t steps = steps_of<T>(elements), panel_floats = row_panel_floats<T>(elements);
      for (int64_t k = 0; k < width; k += PANEL)
        multiply_scores<T>(
            count, width - k,
            {own.memory + left + s * strip_floats<T>(elements),
             own.memory + right + (offset + k) / PANEL * panel_floats, steps, products + k, nullptr});
    };
    multiply(own.at.queries, own.at.keys, shape_.head_dim, scores);
    multiply(own.at.out_grads, own.at.values, shape_.value_dim, probability_grads);
    float* const shared = shares_bias() ? own.memory + own.at.bias_grads : nullptr;
    if (shared) std::fill(shared, shared + KEY_PITCH, 0.0f);
    float* const distances = distances_ ? own.memory + own.at.distance_grads : nullptr;
    if (distances) std::fill_n(distances, STRIP_DISTANCES, 0.0f);
    const auto row_of = [&](int64_t r, Span part, bool is_whole) {
      const int64_t column = part.begin - keys.begin;
      return Row{rows.begin + r,
                 part,
                 {r, column, s * STRIP<T> + r, offset + column},
                 is_whole ? nullptr : visible + r * KEY_BLOCK + column};
    };
    const auto gradients_of = [&](int64_t r, Span part) {
      return typename RowGradients<T>::Gradients{
          shared ? shared + part.begin - keys.begin : bias_grad_of(meeting, rows.begin + r, part),
          distances ? distances + count - 1 - r + part.begin - keys.begin : nullptr};
    };
    const RowBuffers buffers = buffers_of(own);
    const auto whole_rows = [&](Span part) {
      return [&row_of, part](int64_t r) { return row_of(r, part, true); };
    };
    if (in_one_block()) {
      typename RowGradients<T>::WeightedSums sums[STRIP<T>];
      parts.each([&](Span part, bool is_whole) {
        int64_t r = is_whole ? rows_.weigh_pairs(buffers, count, whole_rows(part), sums) : 0;
        for (; r < count; ++r)
          rows_.weigh_row(buffers, meeting.batch, meeting.head, row_of(r, part, is_whole), sums[r]);
      });
      float deltas[STRIP<T>];
      for (int64_t r = 0; r < count; ++r) deltas[r] = rows_.delta_of(buffers, row_of(r, keys, true), sums[r]);
      int64_t r = rows_.differentiate_weighed_pairs(buffers, count, whole_rows(keys), deltas);
      for (; r < count; ++r)
        rows_.differentiate_weighed_row(buffers, row_of(r, keys, true), deltas[r], gradients_of(r, keys));
    } else {
      parts.each([&](Span part, bool is_whole) {
        int64_t r = is_whole ? rows_.differentiate_pairs(buffers, count, whole_rows(part)) : 0;
        for (; r < count; ++r)
          rows_.differentiate_row(buffers, meeting.batch, meeting.head, row_of(r, part, is_whole),
                                  gradients_of(r, part));
      });
    }
    if (shared)
      for (int64_t k = 0; k < keys.size(); k += LANES)
        rows_.add_to_bias(bias_grad_of(meeting, rows.begin, keys), k, keys.size(), load(shared + k));
    if (distances) {
      float* const sums = meeting.query_sums + query_floats_ + shape_.queries - rows.end + keys.begin;
      for (int64_t d = 0; d < keys.size() + count - 1; ++d) sums[d] += distances[d];
    }
    if (args_.query_grad.data) {
      const float* const left = E > 1 ? own.memory + own.at.strip_score_grads
                                      : own.memory + own.at.score_grads + s * STRIP<T> * KEY_PITCH + offset;
      for (int64_t panel = 0; panel < head_panels_; ++panel)
        multiply_sums<T>(
            count, shape_.head_dim - panel * PANEL,
            {left,
             own.memory + own.at.key_columns + panel * column_panel_floats<T>(meeting.keys.size()) +
                 offset / E * PANEL,
             steps_of<T>(keys.size()), meeting.query_sums + rows.begin * head_pitch() + panel * PANEL,
             head_pitch(), nullptr, false});
    }
    return true;
  }

  // Whether the queries of a strip add to the same few gradients, which then are summed apart: long sums lose bits.
  bool shares_bias() const {
    return args_.bias_grad.data && args_.bias_grad.query_stride == 0 && args_.bias_grad.key_stride != 0;
  }
  float* bias_grad_of(const Meeting& meeting, int64_t query, Span keys) const {
    if (!args_.bias_grad.data) return nullptr;
    return args_.bias_grad.at(meeting.batch, meeting.head, query) + keys.begin * args_.bias_grad.key_stride;
  }

  // A tile of keys meets the chunk's queries.
  void sum_over_queries(const Meeting& meeting, Span keys, Span rows) const {
    const Thread& own = meeting.own;
    const int64_t count = meeting.queries.size(), column = keys.begin - meeting.keys.begin;
    if (args_.value_grad.data)
      value_sums_.add(own.memory + own.at.value_grads, keys, rows, count,
                      own.memory + own.at.probabilities + column, own.memory + own.at.out_grad_columns);
    if (args_.key_grad.data)
      key_sums_.add(own.memory + own.at.key_grads, keys, rows, count,
                    own.memory + own.at.score_grads + column, own.memory + own.at.query_columns);
  }

  // What a head's keys sum for its queries and for distances.
  void write_head(int64_t b, int64_t h, const float* sums) const {
    if (args_.query_grad.data)
      for (int64_t query = 0; query < shape_.queries; ++query)
        write_row(args_.query_grad.at(b, h) + query * args_.query_grad.row_stride,
                  sums + query * head_pitch(), shape_.head_dim, broadcast(args_.scores.scale));
    if (distances_)
      std::copy_n(sums + query_floats_, distances_,
                  args_.distance_grad + (b * shape_.heads + h) * distances_);
  }

  const AttentionBackward<T>& args_;
  const AttentionShape shape_;
  const RowGradients<T> rows_;
  const int64_t head_panels_, query_floats_, distances_;
  const KeySums<T> key_sums_, value_sums_;
  const int64_t blocks_;
  const bool clears_;
  bool sums_batches_, sums_heads_;
  int64_t groups_, splits_ = 1;
  Layout layout_;
};

}  // namespace

template <class T>
void attention_backward(std::span<const AttentionBackward<T>> calls, const GiveScratch& scratch,
                        int64_t threads, const ParallelFor& parallel) {
  std::vector<AttentionBackward<T>> present;
  for (const AttentionBackward<T>& call : calls)
    if (call.shape.batch * call.shape.heads * call.shape.queries * call.shape.keys != 0)
      present.push_back(call);
  if (present.empty()) return;
  auto all = heaviest_first<Backward<T>>(std::span<const AttentionBackward<T>>(present));
  const Tasks shared(attention_work(std::span<const AttentionBackward<T>>(present)), threads);
  int64_t groups = 0, partial_floats = 0, work_floats = 0;
  double weight = 0;
  for (const Backward<T>& call : all) {
    groups += call.groups();
    weight += call.unit_weight() * double(call.groups());
  }
  if (!shared.share_evenly(groups, all[0].unit_weight(), weight))
    for (Backward<T>& call : all) call.split(shared.threads());

  TasksOfCalls tasks, sums;
  std::vector<int64_t> first;
  for (const Backward<T>& call : all) {
    first.push_back(partial_floats);
    partial_floats += call.partial_floats();
    work_floats = std::max(work_floats, call.work_floats());
    tasks.append(call.tasks());
    sums.append(call.heads_to_sum());
  }
  float* const memory = static_cast<float*>(
      scratch((partial_floats + shared.threads() * work_floats) * int64_t(sizeof(float))));
  shared.template each<T>(tasks.count(), parallel, [&](int64_t place, int64_t thread) {
    const auto [index, task] = tasks.at(place);
    all[index].run(task, memory + partial_floats + thread * work_floats, memory + first[index]);
  });
  if (sums.count())
    shared.template each<T>(sums.count(), parallel, [&](int64_t place, int64_t) {
      const auto [index, head] = sums.at(place);
      all[index].sum_partials(head, memory + first[index]);
    });
}

template void attention_backward(std::span<const AttentionBackward<float>>, const GiveScratch&, int64_t,
                                 const ParallelFor&);
template void attention_backward(std::span<const AttentionBackward<bfloat16>>, const GiveScratch&, int64_t,
                                 const ParallelFor&);
template void attention_backward(std::span<const AttentionBackward<float16>>, const GiveScratch&, int64_t,
                                 const ParallelFor&);

}  // namespace pyarch
