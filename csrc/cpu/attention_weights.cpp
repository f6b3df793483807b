// The probabilities of attention, made again from queries, keys and lse; see attention.h.
//
// A chunk of queries and a block of keys take every head in turn, so that a mean over heads needs memory for one block,
// and a head's block of keys is read from memory once for all strips of the chunk.
#include "attention_operands.h"
#include "attention_probabilities.h"
#include "attention_tasks.h"

namespace pyarch {
namespace {

template <class T>
class Weights {
 public:
  Weights(const AttentionWeights<T>& args, int64_t threads)
      : args_(args),
        shape_(args.shape),
        rule_{args.scores},
        dropout_(args.scores.dropout, args.scores.seed),
        key_floats_(round_up(row_panels_floats<T>(shape_.keys, shape_.head_dim), LINE_FLOATS)),
        strip_floats_(strip_floats<T>(shape_.head_dim)),
        tasks_(attention_work(shape_), threads) {}

  void run(const GiveScratch& give, const ParallelFor& parallel) const {
    const int64_t units = shape_.batch * shape_.kv_heads;
    const int64_t strips = ceil_div(shape_.queries, STRIP<T>);
    // Chunks as large as leave every thread some.
    const int64_t chunk_strips =
        std::clamp<int64_t>(shape_.batch * strips / (4 * tasks_.threads()), 1, CHUNK_STRIPS<T>);
    const int64_t weight_floats = chunk_strips * STRIP<T> * KEY_PITCH;
    const int64_t query_floats = round_up(shape_.heads * chunk_strips * strip_floats_, LINE_FLOATS);
    const int64_t work_floats = int64_t(sizeof(Work) / sizeof(float)) + weight_floats + query_floats;
    float* const keys = static_cast<float*>(
        give((units * key_floats_ + tasks_.threads() * work_floats) * int64_t(sizeof(float))));
    float* const works = keys + units * key_floats_;
    tasks_.template each<T>(units, parallel, [&](int64_t unit, int64_t) {
      pack_row_panels(Rows<T>::of(args_.key, unit / shape_.kv_heads, unit % shape_.kv_heads, shape_.head_dim),
                      shape_.keys, keys + unit * key_floats_);
    });
    const int64_t chunks = ceil_div(strips, chunk_strips), chunk_rows = chunk_strips * STRIP<T>;
    tasks_.template each<T>(shape_.batch * chunks, parallel, [&](int64_t task, int64_t thread) {
      const int64_t b = task / chunks, first = task % chunks * chunk_rows;
      Work& work = *reinterpret_cast<Work*>(works + thread * work_floats);
      float* const weights = reinterpret_cast<float*>(&work + 1);
      run_chunk(b, {first, std::min(first + chunk_rows, shape_.queries)},
                keys + b * shape_.kv_heads * key_floats_, work, weights, weights + weight_floats);
    });
  }

 private:
  static constexpr int64_t LINE_FLOATS = 16;  // of a cache line

  struct alignas(64) Work {
    float scores[STRIP<T> * KEY_PITCH];
    uint8_t visible[KEY_BLOCK], kept[Dropout::BYTES];
  };

  void run_chunk(int64_t b, Span rows, const float* keys, Work& work, float* weights, float* queries) const {
    const Sight sight(shape_, args_.pattern, b);
    const int64_t strips = ceil_div(rows.size(), STRIP<T>);
    const auto strip_rows = [&](int64_t s) {
      return Span{rows.begin + s * STRIP<T>, std::min(rows.begin + (s + 1) * STRIP<T>, rows.end)};
    };
    const auto strip_queries = [&](int64_t h, int64_t s) {
      return queries + (h * strips + s) * strip_floats_;
    };
    for (int64_t h = 0; h < shape_.heads; ++h)
      for (int64_t s = 0; s < strips; ++s)
        pack_strip(Rows<T>::of(args_.query, b, h, shape_.head_dim).from(strip_rows(s).begin),
                   strip_rows(s).size(), strip_queries(h, s));
    const int64_t at_once = args_.mean ? shape_.heads : 1;
    for (int64_t first = 0; first < shape_.heads; first += at_once)
      for (int64_t begin = 0; begin < shape_.keys; begin += KEY_BLOCK) {
        const Span block{begin, std::min(begin + KEY_BLOCK, shape_.keys)};
        std::fill_n(weights, strips * STRIP<T> * KEY_PITCH, 0.0f);
        for (int64_t h = first; h < first + at_once; ++h)
          for (int64_t s = 0; s < strips; ++s)
            sight.each_block(strip_rows(s), block, [&](Span seen) {
              add_head(sight, b, h, strip_rows(s), seen, keys + h / shape_.group() * key_floats_,
                       strip_queries(h, s), work, weights + s * STRIP<T> * KEY_PITCH + seen.begin - begin);
            });
        write(b, first, rows, block, weights);
      }
  }

  // Adds one head's probabilities.
  void add_head(const Sight& sight, int64_t b, int64_t h, Span rows, Span keys, const float* panels,
                const float* queries, Work& work, float* weights) const {
    const int64_t width = columns_of<T>(keys.size()), steps = steps_of<T>(shape_.head_dim);
    const int64_t panel_floats = row_panel_floats<T>(shape_.head_dim);
    const bool all = sight.sees_all(rows, keys), plain = rule_.is_plain();
    for (int64_t k = 0; k < width; k += PANEL)
      multiply_scores<T>(
          rows.size(), width - k,
          {queries, panels + (keys.begin + k) / PANEL * panel_floats, steps, work.scores + k, nullptr});
    const Vec share = broadcast(dropout_.rescale() / float(args_.mean ? shape_.heads : 1));
    for (int64_t r = 0; r < rows.size(); ++r) {
      const int64_t query = rows.begin + r;
      const float lse = args_.lse[(b * shape_.heads + h) * shape_.queries + query];
      if (lse == MINUS_INFINITY || (!all && !sight.look(h, query, keys, work.visible))) continue;
      if (dropout_.drops()) dropout_.keep(b * shape_.heads + h, query, keys, work.kept);
      const auto biases = rule_.biases(b, h, query, keys.begin);
      const Vec shift = broadcast(-lse * LOG2_E), factor = broadcast(rule_.factor());
      float* const sums = weights + r * KEY_PITCH;
      for (int64_t k = 0; k < width; k += LANES) {
        const Vec product = load(work.scores + r * KEY_PITCH + k);
        Vec x;
        if (plain) {
          x = fma(product, factor, shift);
        } else {
          const Vec tanh_of_it = args_.scores.softcap != 0 ? rule_.capped(product) : product;
          x = add(rule_.exponent(product, tanh_of_it, biases.at(k, keys.size())), shift);
        }
        Vec p = mul(power_of_two(x), share);
        if (!all) p = where(work.visible + k, p, zero());
        if (dropout_.drops()) p = where(work.kept + k, p, zero());
        store(sums + k, add(load(sums + k), p));
      }
    }
  }

  void write(int64_t b, int64_t h, Span rows, Span keys, const float* weights) const {
    const int64_t heads = args_.mean ? 1 : shape_.heads;
    for (int64_t r = 0; r < rows.size(); ++r) {
      T* const row =
          args_.weights + ((b * heads + h) * shape_.queries + rows.begin + r) * shape_.keys + keys.begin;
      write_row(row, weights + r * KEY_PITCH, keys.size(), broadcast(1.0f));
    }
  }

  const AttentionWeights<T>& args_;
  const AttentionShape shape_;
  const ScoreRule<T> rule_;
  const Dropout dropout_;
  const int64_t key_floats_, strip_floats_;
  const Tasks tasks_;
};

}  // namespace

template <class T>
void attention_weights(const AttentionWeights<T>& args, const GiveScratch& scratch, int64_t threads,
                       const ParallelFor& parallel) {
  const AttentionShape& shape = args.shape;
  if (shape.batch * shape.heads * shape.queries * shape.keys == 0) return;
  Weights<T>(args, threads).run(scratch, parallel);
}

template void attention_weights(const AttentionWeights<float>&, const GiveScratch&, int64_t,
                                const ParallelFor&);
template void attention_weights(const AttentionWeights<bfloat16>&, const GiveScratch&, int64_t,
                                const ParallelFor&);
template void attention_weights(const AttentionWeights<float16>&, const GiveScratch&, int64_t,
                                const ParallelFor&);

}  // namespace pyarch
