// The forward pass: the input side's sums of many steps in one product, then step after step.
//
// A step multiplies h by the packed recurrent weights and turns the sums into gates, c and h at once. h goes through two
// buffers in turn, so that a team's threads may write the next one while others still read the last.
#include "gemm.h"
#include "recurrent_gates.h"
#include "recurrent_plan.h"

namespace pyarch {
namespace {

// Floats of input-side sums that are made at a time: they stay in the cache until they are read. Short calls make an
// eighth of theirs, single sequences no fewer than they have in 128 steps of 1024 gates: each time packs weights anew.
constexpr int64_t LEAST_CHUNK_FLOATS = 1 << 16, LEAST_OF_ONE = 1 << 17, MOST_CHUNK_FLOATS = 1 << 18;

template <class T>
class ForwardPass {
 public:
  ForwardPass(const RecurrentShape& shape, const RecurrentForward<T>& args, int threads)
      : shape_(shape),
        args_(args),
        threads_(threads),
        steps_(shape),
        plan_(plan_shards(shape, steps_, threads, IN_TILES<operand_of<T>>)) {}

  void run(const GiveScratch& give, const ParallelFor& parallel) {
    lay_out(give(lay_out(nullptr)));
    prepare(parallel);
    for (int64_t from = 0; from < shape_.steps; from += chunk_steps_) {
      const int64_t to = std::min(shape_.steps, from + chunk_steps_);
      if (plan_.packs) multiply_inputs(from, to, parallel);
      take_steps(from, to, parallel);
    }
  }

 private:
  using Cell = operand_of<T>;

  // What a direction's steps read and write beside the arguments.
  struct Direction {
    float* bias_ih;           // (G * H)
    float* input_side;        // sums of a chunk's rows; null where they are made in place
    Cell* h[2];               // (B, padded P)
    float* carry;             // (B, H)
    T* unprojected;           // (B, H): o tanh(c)
    Cell* unprojected_cells;  // (B, padded H)
    float* projected;         // (B, padded P)
    Cell* w_hr;
  };

  // Points into the scratch; without one only says how many bytes that takes.
  int64_t lay_out(void* scratch) {
    Arena arena(scratch);
    const int64_t B = shape_.batch, H = shape_.hidden, GH = shape_.gates() * H, rows = B + SPARE_ROWS<Cell>;
    depth_ = Packed<Cell>::padded_depth(shape_.projected);
    width_ = panel_width<Cell>(plan_.most_rows, shape_.gates() * plan_.shards[0].gate_stride());
    in_place_ = std::is_same_v<T, float> && (shape_.saved() == 1 || args_.gates);
    const int64_t least = B == 1 ? LEAST_OF_ONE : LEAST_CHUNK_FLOATS;
    const int64_t floats = std::clamp(shape_.rows * GH / 8, least, MOST_CHUNK_FLOATS);
    chunk_steps_ = std::clamp<int64_t>(floats / std::max<int64_t>(1, GH * B), 1, shape_.steps);
    for (int64_t d = 0; d < shape_.directions; ++d) {
      Direction& direction = directions_[d];
      direction.bias_ih = arena.take<float>(GH);
      direction.input_side = in_place_ ? nullptr : arena.take<float>(chunk_steps_ * B * GH);
      for (Cell*& h : direction.h) h = arena.take<Cell>(rows * depth_);
      direction.carry = arena.take<float>(B * H);
      if (shape_.has_projection) {
        direction.unprojected = arena.take<T>(B * H);
        direction.unprojected_cells = arena.take<Cell>(rows * Packed<Cell>::padded_depth(H));
        direction.projected = arena.take<float>(B * projected_columns());
        direction.w_hr = arena.take<Cell>(Packed<Cell>::padded_depth(H) * projected_columns());
      }
    }
    for (auto* pieces : {&hidden_side_, &bias_}) pieces->clear();
    weights_.clear();
    for (const Shard& shard : plan_.shards) {
      hidden_side_.push_back(arena.take<float>(shard.rows() * columns(shard)));
      if (shard.row_begin > 0) continue;  // weights and bias are shared by all tiles
      weights_.push_back(plan_.packs ? arena.take<Cell>(depth_ * columns(shard)) : nullptr);
      bias_.push_back(arena.take<float>(columns(shard)));
    }
    gemm_scratch_ =
        arena.take<std::byte>(gemm_scratch_bytes<T, float>(input_product(chunk_steps_ * B), threads_));
    return arena.used();
  }

  GemmShape input_product(int64_t rows) const {
    return {rows, shape_.gates() * shape_.hidden, shape_.input_size};
  }
  int64_t columns(const Shard& shard) const {
    return Packed<Cell>::padded_columns(shape_.gates() * shard.gate_stride(), width_);
  }
  int64_t projected_columns() const { return Packed<Cell>::padded_columns(shape_.projected, width_); }
  int64_t shared(const Shard& shard) const { return shard.direction * plan_.parts + shard.part; }

  // -------------------------------------------------------------------------- before the first step

  void prepare(const ParallelFor& parallel) {
    const int64_t H = shape_.hidden, P = shape_.projected, B = shape_.batch;
    for (int64_t d = 0; d < shape_.directions; ++d) {
      Direction& direction = directions_[d];
      const RecurrentWeights<T>& weights = args_.weights[d];
      for (int64_t j = 0; j < shape_.gates() * H; ++j)
        direction.bias_ih[j] = weights.b_ih ? to_float(weights.b_ih[j]) : 0.0f;
      for (Cell* h : direction.h) {
        std::fill_n(reinterpret_cast<char*>(h), B * depth_ * sizeof(Cell), 0);
        for (int64_t b = 0; b < B; ++b) copy_cells(h + b * depth_, args_.h0 + (d * B + b) * P, P);
      }
      if (shape_.mode == Mode::lstm) copy_floats(direction.carry, args_.c0 + d * B * H, B * H);
      if (shape_.mode == Mode::gru) copy_floats(direction.carry, args_.h0 + d * B * H, B * H);
      if (shape_.has_projection) {
        std::fill_n(reinterpret_cast<char*>(direction.unprojected_cells),
                    B * Packed<Cell>::padded_depth(H) * sizeof(Cell), 0);
        zero_last_panel(direction.w_hr, Packed<Cell>::padded_depth(H), projected_columns());
        pack_rows_as_columns(direction.w_hr, width_, H, 0, weights.w_hr, H, P);
      }
      for (int64_t part = 0; part < plan_.parts; ++part) copy_bias(plan_.sample(d, part), weights.b_hh);
    }
    if (plan_.packs) pack(parallel);
  }

  static void copy_cells(Cell* to, const T* from, int64_t count) {
    for_lanes(count, [&](int64_t i, Mask mask) { store(to + i, load(from + i, mask), mask); });
  }
  static void copy_floats(float* to, const T* from, int64_t count) {
    for_lanes(count, [&](int64_t i, Mask mask) { store(to + i, load(from + i, mask), mask); });
  }

  void copy_bias(const Shard& shard, const T* b_hh) {
    float* bias = bias_[shared(shard)];
    std::fill_n(bias, columns(shard), 0.0f);
    if (!b_hh) return;
    for (int64_t gate = 0; gate < shape_.gates(); ++gate)
      copy_floats(bias + gate * shard.gate_stride(), b_hh + gate * shape_.hidden + shard.unit_begin,
                  shard.units());
  }

  // Packing leaves the columns that pad a panel as they are, and products with what was there may be slow: a number
  // too small for its exponent takes a processor a hundred cycles.
  void zero_last_panel(Cell* cells, int64_t depth, int64_t columns) const {
    const int64_t panel = int64_t(width_) * LANES;
    std::fill_n(reinterpret_cast<char*>(cells + (columns - panel) * depth), panel * depth * sizeof(Cell), 0);
  }

  // Tasks are gates of a shard, LANES units at a time.
  void pack(const ParallelFor& parallel) {
    for (const Shard& shard : plan_.shards)
      if (shard.row_begin == 0) zero_last_panel(weights_[shared(shard)], depth_, columns(shard));
    const int64_t P = shape_.projected, G = shape_.gates();
    const int64_t blocks = ceil_div(shape_.hidden, LANES);
    const auto body = [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t d = task / (G * blocks), gate = task / blocks % G, unit = task % blocks * LANES;
        int64_t part = 0;
        while (plan_.sample(d, part).unit_end <= unit) ++part;
        const Shard& shard = plan_.sample(d, part);
        const int64_t at = gate * shard.gate_stride() + unit - shard.unit_begin;
        const T* source = args_.weights[d].w_hh + (gate * shape_.hidden + unit) * P;
        pack_rows_as_columns(weights_[shared(shard)], width_, P, at, source, P,
                             std::min<int64_t>(LANES, shape_.hidden - unit));
      }
    };
    const int64_t tasks = shape_.directions * G * blocks;
    if (worth_threads(tasks * LANES * P * 4))
      parallel(tasks, body);
    else
      body(0, tasks);
  }

  // -------------------------------------------------------------------------- the input side

  // Steps [from, to) that a direction takes, as rows.
  int64_t first_row(bool reverse, int64_t from, int64_t to) const {
    return steps_.first(reverse ? shape_.steps - to : from);
  }
  int64_t end_row(bool reverse, int64_t from, int64_t to) const {
    return steps_.first(reverse ? shape_.steps - from : to);
  }

  // Input-side sums of a row: in the place of what the row's step will save, or in a buffer of the chunk's rows.
  struct InputSide {
    float* data;
    int64_t stride, first_row;
    float* row(int64_t row) const { return data + (row - first_row) * stride; }
  };
  InputSide input_side(int64_t d, int64_t from, int64_t to) const {
    const int64_t H = shape_.hidden;
    if (!in_place_) return {directions_[d].input_side, shape_.gates() * H, first_row(d, from, to)};
    if (shape_.saved() == 1) return {as_floats(args_.output) + d * H, shape_.directions * H, 0};
    return {as_floats(args_.gates) + d * shape_.rows * 4 * H, 4 * H, 0};
  }
  static float* as_floats(T* p) { return reinterpret_cast<float*>(p); }

  void multiply_inputs(int64_t from, int64_t to, const ParallelFor& parallel) {
    const int64_t I = shape_.input_size;
    for (int64_t d = 0; d < shape_.directions; ++d) {
      const int64_t first = first_row(d, from, to), rows = end_row(d, from, to) - first;
      const InputSide side = input_side(d, from, to);
      gemm<T, float>(input_product(rows), {args_.input + first * I, I, 1}, {args_.weights[d].w_ih, 1, I},
                     directions_[d].bias_ih, false, {side.row(first), side.stride}, gemm_scratch_, threads_,
                     parallel);
    }
  }

  // -------------------------------------------------------------------------- steps

  void take_steps(int64_t from, int64_t to, const ParallelFor& parallel) {
    with_mode(shape_.mode, [&](auto mode) { take_steps_of<mode>(from, to, parallel); });
  }

  template <Mode MODE>
  void take_steps_of(int64_t from, int64_t to, const ParallelFor& parallel) {
    Team team(int64_t(plan_.shards.size()));
    const auto body = [&](int64_t begin, int64_t end) {
      [[maybe_unused]] const TileRegistersFor<Cell> registers(tile_rows(plan_.most_rows));
      for (int64_t index = from; index < to; ++index) {
        for (int64_t s = begin; s < end; ++s) {
          take_step<MODE>(s, index, input_side(plan_.shards[s].direction, from, to));
          team.finish(s, index + 1 - from);
        }
        if (plan_.parts == 1 || index + 1 == to) continue;
        for (int64_t s = begin; s < end; ++s)
          team.wait(plan_.shards[s].team_begin, plan_.shards[s].team_end, index + 1 - from);
      }
      if (to == shape_.steps)
        for (int64_t s = begin; s < end; ++s) write_final_states(plan_.shards[s]);
    };
    team.run(parallel, body);
  }

  template <Mode MODE>
  void take_step(int64_t s, int64_t index, const InputSide& side) {
    const Shard& shard = plan_.shards[s];
    const Direction& direction = directions_[shard.direction];
    const int64_t H = shape_.hidden, P = shape_.projected, step = steps_.taken(shard.direction, index);
    const int64_t alive = shard.rows_alive(steps_, step), first = steps_.first(step) + shard.row_begin;
    if (alive == 0) return;
    if (shape_.batch == 1) fetch_input_side(shard, side.row(first));
    multiply_hidden(s, index, alive, first, side);
    const bool projects = shape_.has_projection;
    for (int64_t r = 0; r < alive; ++r) {
      const int64_t b = shard.row_begin + r, row = first + r, saved = shard.direction * shape_.rows + row;
      T* output = args_.output + row * shape_.directions * P + shard.direction * P;
      Cell* next = direction.h[(index + 1) % 2] + b * depth_;
      step_forward<MODE, T>(
          {.hidden_side = hidden_side_[s] + r * columns(shard),
           .shard_units = shard.gate_stride(),
           .input_side = side.row(row) + shard.unit_begin,
           .gates = args_.gates ? args_.gates + saved * 4 * H + shard.unit_begin : nullptr,
           .units = H,
           .carry = direction.carry + b * H + shard.unit_begin,
           .cells = args_.cells ? args_.cells + saved * H + shard.unit_begin : nullptr,
           .hidden = projects ? direction.unprojected + b * H : output + shard.unit_begin,
           .operand = projects ? direction.unprojected_cells + b * Packed<Cell>::padded_depth(H)
                               : next + shard.unit_begin},
          shard.units());
    }
    if (projects) project(shard, index, alive, first);
  }

  // A single row's sums may have been made by another thread: fetched while the product runs, nothing waits for them.
  void fetch_input_side(const Shard& shard, const float* row) const {
    for (int64_t gate = 0; gate < shape_.gates(); ++gate)
      for (int64_t unit = shard.unit_begin; unit < shard.unit_end; unit += LANES)
        __builtin_prefetch(row + gate * shape_.hidden + unit);
  }

  void multiply_hidden(int64_t s, int64_t index, int64_t alive, int64_t first, const InputSide& side) {
    const Shard& shard = plan_.shards[s];
    const int64_t d = shard.direction, c_stride = columns(shard);
    const Cell* h = directions_[d].h[index % 2] + shard.row_begin * depth_;
    const float* bias = bias_[shared(shard)];
    if (plan_.packs)
      return multiply<Cell>(
          alive, {h, depth_, bias, 0, hidden_side_[s], c_stride},
          {weights_[shared(shard)], depth_ / PER_CELL<Cell>, c_stride, width_, tile_rows(plan_.most_rows)},
          index);
    const RecurrentWeights<T>& weights = args_.weights[d];
    const int64_t H = shape_.hidden, P = shape_.projected, I = shape_.input_size;
    for (int64_t gate = 0; gate < shape_.gates(); ++gate) {
      const int64_t row = gate * H + shard.unit_begin;
      const float* bias_ih = directions_[d].bias_ih + row;
      multiply_unpacked(alive, h, depth_, weights.w_hh + row * P, P, bias + gate * shard.gate_stride(),
                        shard.units(), hidden_side_[s] + gate * shard.gate_stride(), c_stride);
      multiply_unpacked(alive, args_.input + first * I, I, weights.w_ih + row * I, I, bias_ih, shard.units(),
                        side.row(first) + row, side.stride);
    }
  }

  void project(const Shard& shard, int64_t index, int64_t alive, int64_t first) {
    const int64_t d = shard.direction, P = shape_.projected, H = Packed<Cell>::padded_depth(shape_.hidden);
    const Direction& direction = directions_[d];
    float* sums = direction.projected + shard.row_begin * projected_columns();
    std::fill_n(sums, alive * projected_columns(), 0.0f);
    multiply<Cell>(
        alive,
        {direction.unprojected_cells + shard.row_begin * H, H, sums, projected_columns(), sums,
         projected_columns()},
        {direction.w_hr, H / PER_CELL<Cell>, projected_columns(), width_, tile_rows(plan_.most_rows)}, index);
    for (int64_t r = 0; r < alive; ++r) {
      T* output = args_.output + (first + r) * shape_.directions * P + d * P;
      Cell* next = direction.h[(index + 1) % 2] + (shard.row_begin + r) * depth_;
      for_lanes(P, [&](int64_t p, Mask mask) {
        store_hidden(output + p, next + p, load(sums + r * projected_columns() + p, mask), mask);
      });
    }
  }

  void write_final_states(const Shard& shard) {
    const int64_t d = shard.direction, P = shape_.projected, H = shape_.hidden;
    const int64_t begin = shape_.has_projection ? 0 : shard.unit_begin;
    const int64_t count = shape_.has_projection ? P : shard.units();
    for (int64_t b = shard.row_begin; b < shard.row_end; ++b) {
      const int64_t state = d * shape_.batch + b;
      const T* last = args_.output + steps_.final_row(d, b) * shape_.directions * P + d * P;
      std::copy_n(last + begin, count, args_.h_n + state * P + begin);
      if (shape_.mode != Mode::lstm) continue;
      const float* c = directions_[d].carry + b * H + shard.unit_begin;
      for_lanes(shard.units(), [&](int64_t u, Mask mask) {
        store(args_.c_n + state * H + shard.unit_begin + u, load(c + u, mask), mask);
      });
    }
  }

  const RecurrentShape& shape_;
  const RecurrentForward<T>& args_;
  const int threads_;
  const Steps steps_;
  const Plan plan_;
  Direction directions_[2] = {};
  std::vector<float*> hidden_side_;  // a shard
  std::vector<Cell*> weights_;       // a direction and part
  std::vector<float*> bias_;         // likewise: b_hh, gates as in the product
  void* gemm_scratch_;
  int width_;  // of all panels
  int64_t depth_, chunk_steps_;
  bool in_place_;
};

}  // namespace

template <class T>
void recurrent_forward(const RecurrentShape& shape, const RecurrentForward<T>& args, const GiveScratch& give,
                       int threads, const ParallelFor& parallel) {
  ForwardPass<T>(shape, args, threads).run(give, parallel);
}

#define INSTANTIATE(T)                                                                                      \
  template void recurrent_forward<T>(const RecurrentShape&, const RecurrentForward<T>&, const GiveScratch&, \
                                     int, const ParallelFor&);
INSTANTIATE(float)
INSTANTIATE(bfloat16)
INSTANTIATE(float16)

}  // namespace pyarch
