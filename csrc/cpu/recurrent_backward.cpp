// The backward pass: step after step back through time for the gates' gradients, and everything else as products over
// the rows of many steps.
//
// A step turns the gradients of h and c into those of its gates and multiplies them by the packed recurrent weights,
// which gives the gradient of the h before. After some steps, a chunk, their rows are added to the other gradients. A team's threads read each other's gate gradients; these go through two
// buffers in turn. A row's gate gradients are blocks of H units: the gates in torch's order; for gru the hidden side's
// n, r, z and the input side's n, so that either side's three lie side by side.
#include "gemm.h"
#include "recurrent_gates.h"
#include "recurrent_plan.h"

namespace pyarch {
namespace {

// Steps whose bias gradients are added up before they are added to the others'.
constexpr int64_t STEPS_A_SUM = 2;
// Rows of a chunk: so many that reading and writing the weights' gradients once a chunk takes little of its time.
constexpr int64_t LEAST_CHUNK_ROWS = 128;
constexpr int64_t chunk_rows(int64_t hidden) { return std::max(LEAST_CHUNK_ROWS, 2 * hidden); }

struct RecurrentSums {
  float *w_ih, *w_hh, *w_hr;
};

// Rows [begin, end) of a direction's chunk.
struct Rows {
  int64_t begin, end;
  int64_t count() const { return end - begin; }
};

template <class T>
class BackwardPass {
 public:
  BackwardPass(const RecurrentShape& shape, const RecurrentBackward<T>& args, int threads)
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
      take_steps(from, to, parallel);
      for (int64_t d = 0; d < shape_.directions; ++d) {
        const Rows rows = rows_of(d, from, to);
        multiply_inputs(d, rows, parallel);
        multiply_weights(d, rows, from > 0, parallel);
      }
    }
    for (int64_t d = 0; d < shape_.directions; ++d) {
      round_weights(d);
      sum_biases(d);
    }
  }

 private:
  using Cell = operand_of<T>;

  struct Direction {
    Cell* gates[2];      // (B, padded G * H): the hidden side's, for the next product
    float* carry_c;      // (B, H)
    float* c0;           // (B, H)
    T* grad_gates;       // (rows of a chunk, saved * H)
    T* hidden_before;    // (rows of a chunk, P); null where rows of the output serve
    RecurrentSums sums;  // of the weights' gradients over chunks; null where these are float32 themselves
    // With a projection:
    T* grad_hidden;           // (rows of a chunk, P): gradients of h
    Cell* grad_hidden_cells;  // (B, padded P)
    T* unprojected;           // (rows of a chunk, H): o tanh(c)
    float* grad_unprojected;  // (B, padded H): gradients of it
    Cell* w_hr;
  };

  int64_t gate_units() const { return shape_.gates() * shape_.hidden; }
  int64_t saved_units() const { return shape_.saved() * shape_.hidden; }
  // Where the input side's gates begin, and which gate is the hidden side's first.
  int64_t input_side() const { return saved_units() - gate_units(); }
  int64_t first_gate() const { return shape_.mode == Mode::gru ? 2 : 0; }
  bool gathers() const { return shape_.batch_sizes || !plan_.packs || !std::is_same_v<T, float>; }
  bool needs_w_hh(int64_t d) const { return args_.grad_weights[d].w_hh; }

  // Units of h that a shard multiplies for: its own, or, with a projection, all of P.
  int64_t product_units(const Shard& shard) const {
    return shape_.has_projection ? shape_.projected : shard.units();
  }
  int64_t columns(const Shard& shard) const {
    return Packed<Cell>::padded_columns(product_units(shard), width_);
  }
  int64_t unprojected_columns() const { return Packed<Cell>::padded_columns(shape_.hidden, width_); }
  int64_t shared(const Shard& shard) const { return shard.direction * plan_.parts + shard.part; }

  // Points into the scratch; without one only says how many bytes that takes.
  int64_t lay_out(void* scratch) {
    Arena arena(scratch);
    const int64_t B = shape_.batch, H = shape_.hidden, P = shape_.projected, I = shape_.input_size;
    chunk_steps_ = std::clamp<int64_t>(ceil_div(chunk_rows(H), std::max<int64_t>(1, B)), 1, shape_.steps);
    const int64_t N = std::min(shape_.rows, chunk_steps_ * B), GH = gate_units();
    const int64_t rows = B + SPARE_ROWS<Cell>;
    depth_ = Packed<Cell>::padded_depth(gate_units());
    width_ = panel_width<Cell>(plan_.most_rows, product_units(plan_.shards[0]));
    projected_depth_ = Packed<Cell>::padded_depth(P);
    for (int64_t d = 0; d < shape_.directions; ++d) {
      Direction& direction = directions_[d];
      for (Cell*& gates : direction.gates) gates = arena.take<Cell>(rows * depth_);
      direction.carry_c = arena.take<float>(B * H);
      direction.c0 = arena.take<float>(B * H);
      direction.grad_gates = arena.take<T>(N * saved_units());
      if (gathers() && needs_w_hh(d)) direction.hidden_before = arena.take<T>(N * P);
      if (!std::is_same_v<T, float> && chunk_steps_ < shape_.steps) {
        const RecurrentGradients<T>& grads = args_.grad_weights[d];
        if (grads.w_ih) direction.sums.w_ih = arena.take<float>(GH * I);
        if (grads.w_hh) direction.sums.w_hh = arena.take<float>(GH * P);
        if (grads.w_hr) direction.sums.w_hr = arena.take<float>(P * H);
      }
      if (shape_.has_projection) {
        direction.grad_hidden = arena.take<T>(N * P);
        direction.grad_hidden_cells = arena.take<Cell>(rows * projected_depth_);
        direction.unprojected = arena.take<T>(N * H);
        direction.grad_unprojected = arena.take<float>(B * unprojected_columns());
        direction.w_hr = arena.take<Cell>(projected_depth_ * unprojected_columns());
      }
    }
    for (auto* pieces : {&carry_h_, &recent_sums_, &sums_}) pieces->clear();
    weights_.clear();
    for (const Shard& shard : plan_.shards) {
      carry_h_.push_back(arena.take<float>(shard.rows() * columns(shard)));
      recent_sums_.push_back(arena.take<float>(shape_.saved() * shard.gate_stride()));
      sums_.push_back(arena.take<float>(shape_.saved() * shard.gate_stride()));
      if (shard.row_begin == 0)
        weights_.push_back(plan_.packs ? arena.take<Cell>(depth_ * columns(shard)) : nullptr);
    }
    lay_out_products(arena, N);
    return arena.used();
  }

  // The largest scratch of all products that follow the steps; parts of these take no more.
  void lay_out_products(Arena& arena, int64_t N) {
    const int64_t H = shape_.hidden, P = shape_.projected, I = shape_.input_size, GH = gate_units();
    int64_t bytes = 0;
    for (const GemmShape& product : {GemmShape{N, I, GH}, {GH, I, N}, {GH, P, N}, {P, H, N}})
      bytes = std::max({bytes, gemm_scratch_bytes<T, T>(product, threads_),
                        gemm_scratch_bytes<T, float>(product, threads_)});
    gemm_scratch_ = arena.take<std::byte>(bytes);
  }

  // -------------------------------------------------------------------------- before the first step

  void prepare(const ParallelFor& parallel) {
    const int64_t B = shape_.batch, H = shape_.hidden, P = shape_.projected;
    for (int64_t d = 0; d < shape_.directions; ++d) {
      Direction& direction = directions_[d];
      for (Cell* gates : direction.gates) zero_cells(gates, B * depth_);
      if (shape_.mode == Mode::lstm) {
        copy_or_zero(direction.carry_c, args_.grad_c_n ? args_.grad_c_n + d * B * H : nullptr, B * H);
        copy_or_zero(direction.c0, args_.c0 + d * B * H, B * H);
      }
      if (!shape_.has_projection) continue;
      zero_cells(direction.grad_hidden_cells, B * projected_depth_);
      pack_panels(direction.w_hr, P, 0, args_.weights[d].w_hr, H, H);
    }
    for (size_t s = 0; s < plan_.shards.size(); ++s) {
      const Shard& shard = plan_.shards[s];
      std::fill_n(recent_sums_[s], shape_.saved() * shard.gate_stride(), 0.0f);
      std::fill_n(sums_[s], shape_.saved() * shard.gate_stride(), 0.0f);
      const int64_t first = shape_.has_projection ? 0 : shard.unit_begin;
      for (int64_t r = 0; r < shard.rows(); ++r) {
        const int64_t state = shard.direction * B + shard.row_begin + r;
        copy_or_zero(carry_h_[s] + r * columns(shard),
                     args_.grad_h_n ? args_.grad_h_n + state * P + first : nullptr, product_units(shard));
      }
    }
    if (args_.grad_input && shape_.directions > 1)
      std::fill_n(reinterpret_cast<char*>(args_.grad_input), shape_.rows * shape_.input_size * sizeof(T), 0);
    if (plan_.packs && multiplies()) pack(parallel);
  }

  // Whether any step's product is of use: the last one only makes the gradient of h0.
  bool multiplies() const { return shape_.steps > 1 || args_.grad_h0; }

  static void zero_cells(Cell* cells, int64_t count) {
    std::fill_n(reinterpret_cast<char*>(cells), count * sizeof(Cell), 0);
  }
  static void copy_or_zero(float* to, const T* from, int64_t count) {
    if (!from) return void(std::fill_n(to, count, 0.0f));
    for_lanes(count, [&](int64_t i, Mask mask) { store(to + i, load(from + i, mask), mask); });
  }

  void pack_panels(Cell* cells, int64_t depth, int64_t first, const T* source, int64_t stride,
                   int64_t count) {
    const int64_t panel = int64_t(width_) * LANES;
    for (int64_t column = 0; column < count; column += panel)
      pack_panel(cells + column * Packed<Cell>::padded_depth(depth), width_, depth, first, source + column,
                 stride, std::min(panel, count - column));
  }

  // Tasks are panels of a shard.
  void pack(const ParallelFor& parallel) {
    struct Task {
      Cell* cells;
      const T* source;
      int64_t count;
    };
    std::vector<Task> tasks;
    const int64_t P = shape_.projected, panel = int64_t(width_) * LANES;
    const int64_t first = first_gate() * shape_.hidden;
    for (const Shard& shard : plan_.shards) {
      if (shard.row_begin > 0) continue;
      const T* source = args_.weights[shard.direction].w_hh + (shape_.has_projection ? 0 : shard.unit_begin);
      for (int64_t column = 0; column < product_units(shard); column += panel)
        tasks.push_back({weights_[shared(shard)] + column * depth_, source + column,
                         std::min(panel, product_units(shard) - column)});
    }
    const auto body = [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task)
        pack_panel(tasks[task].cells, width_, gate_units(), first, tasks[task].source, P, tasks[task].count);
    };
    if (worth_threads(shape_.directions * gate_units() * P * 4))
      parallel(int64_t(tasks.size()), body);
    else
      body(0, int64_t(tasks.size()));
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
          find_gate_gradients<MODE>(s, index, rows_of(plan_.shards[s].direction, from, to));
          team.finish(s, index + 1 - from);
        }
        if (index + 1 == shape_.steps && !args_.grad_h0) break;
        for (int64_t s = begin; s < end; ++s) {
          if (plan_.parts > 1)
            team.wait(plan_.shards[s].team_begin, plan_.shards[s].team_end, index + 1 - from);
          multiply_gates(s, index, rows_of(plan_.shards[s].direction, from, to));
        }
      }
      if (to == shape_.steps)
        for (int64_t s = begin; s < end; ++s) write_initial_states(s);
    };
    team.run(parallel, body);
  }

  // The rows of the `from`-th to the last step before the `to`-th one back.
  Rows rows_of(int64_t d, int64_t from, int64_t to) const {
    if (d) return {steps_.first(from), steps_.first(to)};
    return {steps_.first(shape_.steps - to), steps_.first(shape_.steps - from)};
  }

  // The step that the `index`-th one back is.
  int64_t step_back(int64_t d, int64_t index) const { return steps_.taken(d, shape_.steps - 1 - index); }

  template <Mode MODE>
  void find_gate_gradients(int64_t s, int64_t index, const Rows& chunk) {
    const Shard& shard = plan_.shards[s];
    const Direction& direction = directions_[shard.direction];
    const int64_t d = shard.direction, H = shape_.hidden, P = shape_.projected, D = shape_.directions;
    const int64_t step = step_back(d, index), alive = shard.rows_alive(steps_, step);
    const int64_t first = steps_.first(step) + shard.row_begin, unit = shard.unit_begin;
    const bool projects = shape_.has_projection;
    if (projects && alive > 0) unproject(s, index, alive, first, chunk);
    for (int64_t r = 0; r < alive; ++r) {
      const int64_t b = shard.row_begin + r, row = first + r, saved = d * shape_.rows + row;
      const int64_t before = steps_.row_before(d, step, b);
      const T* hidden_before =
          before < 0 ? args_.h0 + (d * shape_.batch + b) * P : args_.output + before * D * P + d * P;
      if (direction.hidden_before && shard.part == 0)
        std::copy_n(hidden_before, P, direction.hidden_before + (row - chunk.begin) * P);
      BackwardRow<T> pointers{
          .grad_output = args_.grad_output ? args_.grad_output + row * D * P + d * P + unit : nullptr,
          .carry_h = carry_h_[s] + r * columns(shard),
          .gates = args_.gates + saved * 4 * H + unit,
          .hidden = args_.output + row * D * P + d * P + unit,
          .hidden_before = hidden_before + unit,
          .grad_gates = direction.grad_gates + (row - chunk.begin) * saved_units() + unit,
          .units = H,
          .operand = direction.gates[index % 2] + b * depth_ + unit,
          .sums = recent_sums_[s],
          .shard_units = shard.gate_stride()};
      if constexpr (MODE == Mode::lstm) {
        pointers.carry_c = direction.carry_c + b * H + unit;
        pointers.cell = args_.cells + saved * H + unit;
        pointers.cell_before =
            unit + (before < 0 ? direction.c0 + b * H : args_.cells + (d * shape_.rows + before) * H);
      }
      if (projects) {
        pointers.grad_output = nullptr;
        pointers.carry_h = direction.grad_unprojected + b * unprojected_columns();
        save_unprojected(pointers, direction.unprojected + (row - chunk.begin) * H);
      }
      step_backward<MODE, T>(pointers, shard.units());
    }
    if (index % STEPS_A_SUM == STEPS_A_SUM - 1 || index + 1 == shape_.steps) keep_sums(s);
  }

  // Adds the last few steps' sums to the shard's: in one long row of additions small terms would be lost.
  void keep_sums(int64_t s) {
    const int64_t count = shape_.saved() * plan_.shards[s].gate_stride();
    for (int64_t i = 0; i < count; i += LANES) {
      store(sums_[s] + i, add(load(sums_[s] + i), load(recent_sums_[s] + i)));
      store(recent_sums_[s] + i, zero());
    }
  }

  // Gradients of h through W_hr to those of o tanh(c).
  void unproject(int64_t s, int64_t index, int64_t alive, int64_t first, const Rows& chunk) {
    const Shard& shard = plan_.shards[s];
    const int64_t d = shard.direction, P = shape_.projected, D = shape_.directions,
                  columns_h = unprojected_columns();
    const Direction& direction = directions_[d];
    Cell* cells = direction.grad_hidden_cells + shard.row_begin * projected_depth_;
    for (int64_t r = 0; r < alive; ++r)
      for_lanes(P, [&](int64_t p, Mask mask) {
        float* carry = carry_h_[s] + r * columns(shard) + p;
        Vec grad = load(carry, mask);
        if (args_.grad_output)
          grad = add(grad, load(args_.grad_output + (first + r) * D * P + d * P + p, mask));
        store_hidden(direction.grad_hidden + (first + r - chunk.begin) * P + p,
                     cells + r * projected_depth_ + p, grad, mask);
        store(carry, zero(), mask);
      });
    float* sums = direction.grad_unprojected + shard.row_begin * columns_h;
    std::fill_n(sums, alive * columns_h, 0.0f);
    multiply<Cell>(
        alive, {cells, projected_depth_, sums, columns_h, sums, columns_h},
        {direction.w_hr, projected_depth_ / PER_CELL<Cell>, columns_h, width_, tile_rows(plan_.most_rows)},
        index);
  }

  void save_unprojected(const BackwardRow<T>& row, T* to) {
    for_lanes(shape_.hidden, [&](int64_t u, Mask mask) {
      const Vec o = load(row.gates + 3 * row.units + u, mask);
      store(to + u, mul(o, hyperbolic_tangent(load(row.cell + u, mask))), mask);
    });
  }

  void multiply_gates(int64_t s, int64_t index, const Rows& chunk) {
    const Shard& shard = plan_.shards[s];
    const int64_t d = shard.direction, alive = shard.rows_alive(steps_, step_back(d, index)),
                  stride = columns(shard);
    if (!plan_.packs)
      return multiply_unpacked_columns(alive, unpacked_gates(s, index, chunk), saved_units(),
                                       args_.weights[d].w_hh + shard.unit_begin, shape_.projected,
                                       gate_units(), first_gate() * shape_.hidden, shard.units(), true,
                                       carry_h_[s], stride);
    const Cell* gates = directions_[d].gates[index % 2] + shard.row_begin * depth_;
    multiply<Cell>(
        alive, {gates, depth_, carry_h_[s], stride, carry_h_[s], stride},
        {weights_[shared(shard)], depth_ / PER_CELL<Cell>, stride, width_, tile_rows(plan_.most_rows)},
        index);
  }

  const T* unpacked_gates(int64_t s, int64_t index, const Rows& chunk) const {
    const Shard& shard = plan_.shards[s];
    const int64_t row = steps_.first(step_back(shard.direction, index)) + shard.row_begin - chunk.begin;
    return directions_[shard.direction].grad_gates + row * saved_units();
  }

  void write_initial_states(int64_t s) {
    const Shard& shard = plan_.shards[s];
    const int64_t d = shard.direction, P = shape_.projected, H = shape_.hidden;
    const int64_t first = shape_.has_projection ? 0 : shard.unit_begin;
    for (int64_t r = 0; r < shard.rows(); ++r) {
      const int64_t b = shard.row_begin + r, state = d * shape_.batch + b;
      if (args_.grad_h0)
        round(args_.grad_h0 + state * P + first, carry_h_[s] + r * columns(shard), product_units(shard));
      if (args_.grad_c0)
        round(args_.grad_c0 + state * H + shard.unit_begin, directions_[d].carry_c + b * H + shard.unit_begin,
              shard.units());
    }
  }

  static void round(T* to, const float* from, int64_t count) {
    for_lanes(count, [&](int64_t i, Mask mask) { store(to + i, load(from + i, mask), mask); });
  }

  // -------------------------------------------------------------------------- after a chunk of steps

  // Both directions add to the rows, which are zero at first.
  void multiply_inputs(int64_t d, const Rows& rows, const ParallelFor& parallel) {
    const int64_t I = shape_.input_size, GH = gate_units();
    if (!args_.grad_input) return;
    const T* gates = directions_[d].grad_gates + input_side();
    T* grad = args_.grad_input + rows.begin * I;
    const bool accumulate = shape_.directions > 1;
    if (!plan_.packs)
      return multiply_unpacked_columns(rows.count(), gates, saved_units(), args_.weights[d].w_ih, I, GH, 0, I,
                                       accumulate, grad, I);
    gemm<T, T>({rows.count(), I, GH}, {gates, saved_units(), 1}, {args_.weights[d].w_ih, I, 1}, nullptr,
               accumulate, {grad, I}, gemm_scratch_, threads_, parallel);
  }

  // Adds a chunk's part of the weights' gradients; `added`: whether others were added before.
  void multiply_weights(int64_t d, const Rows& rows, bool added, const ParallelFor& parallel) {
    const Direction& direction = directions_[d];
    const RecurrentGradients<T>& grads = args_.grad_weights[d];
    const int64_t I = shape_.input_size, H = shape_.hidden, P = shape_.projected, GH = gate_units();
    const T* gates = direction.grad_gates;
    const Few few{rows.count(), added};
    if (grads.w_ih)
      multiply_transposed(few, gates + input_side(), saved_units(), GH, args_.input + rows.begin * I, I, I,
                          {grads.w_ih, direction.sums.w_ih}, parallel);
    if (grads.w_hh && shape_.mode == Mode::gru) {
      multiply_recurrent(d, rows, added, gates, H, 2 * H, parallel);
      multiply_recurrent(d, rows, added, gates + H, 2 * H, 0, parallel);
    } else if (grads.w_hh) {
      multiply_recurrent(d, rows, added, gates, GH, 0, parallel);
    }
    if (grads.w_hr)
      multiply_transposed(few, direction.grad_hidden, P, P, direction.unprojected, H, H,
                          {grads.w_hr, direction.sums.w_hr}, parallel);
  }

  struct Few {
    int64_t rows;
    bool added;
  };
  // Where a product of rows goes: to float32 sums where there are any.
  struct Gradient {
    T* grad;
    float* sums;
    Gradient from(int64_t element) const { return {grad + element, sums ? sums + element : nullptr}; }
  };

  // target[m, n] (+)= sum over rows of a[row, m] * b[row, n].
  void multiply_transposed(const Few& few, const T* a, int64_t a_stride, int64_t m, const T* b,
                           int64_t b_stride, int64_t n, const Gradient& target, const ParallelFor& parallel) {
    if (!plan_.packs) return outer_products(few.rows, a, a_stride, m, b, b_stride, n, target.grad);
    const GemmShape product{m, n, few.rows};
    if (target.sums)
      gemm<T, float>(product, {a, 1, a_stride}, {b, b_stride, 1}, nullptr, few.added, {target.sums, n},
                     gemm_scratch_, threads_, parallel);
    else
      gemm<T, T>(product, {a, 1, a_stride}, {b, b_stride, 1}, nullptr, few.added, {target.grad, n},
                 gemm_scratch_, threads_, parallel);
  }

  // Some gates' rows of dW_hh, from row `at` on: their gradients times the h that each row started from.
  void multiply_recurrent(int64_t d, const Rows& rows, bool added, const T* gates, int64_t units, int64_t at,
                          const ParallelFor& parallel) {
    const int64_t P = shape_.projected, DP = shape_.directions * P, N = shape_.rows, B = shape_.batch;
    const Gradient target = Gradient{args_.grad_weights[d].w_hh, directions_[d].sums.w_hh}.from(at * P);
    const auto multiply_rows = [&](const Rows& some, const T* hidden, int64_t stride, bool before) {
      multiply_transposed({some.count(), before}, gates + (some.begin - rows.begin) * saved_units(),
                          saved_units(), units, hidden, stride, P, target, parallel);
    };
    if (directions_[d].hidden_before) return multiply_rows(rows, directions_[d].hidden_before, P, added);
    // The first step's rows started from h0, all others from the row a batch before; in reverse, behind.
    const Rows started =
        d ? Rows{std::max(rows.begin, N - B), rows.end} : Rows{rows.begin, std::min(rows.end, B)};
    const Rows others =
        d ? Rows{rows.begin, std::min(rows.end, N - B)} : Rows{std::max(rows.begin, B), rows.end};
    const bool starts = started.count() > 0;
    if (starts) multiply_rows(started, args_.h0 + d * B * P, P, added);
    if (others.count() > 0 || !(starts || added))
      multiply_rows(others, args_.output + d * P + (others.begin + (d ? B : -B)) * DP, DP, added || starts);
  }

  void round_weights(int64_t d) {
    const RecurrentSums& sums = directions_[d].sums;
    const RecurrentGradients<T>& grads = args_.grad_weights[d];
    const int64_t H = shape_.hidden, P = shape_.projected, GH = gate_units();
    if (sums.w_ih) round(grads.w_ih, sums.w_ih, GH * shape_.input_size);
    if (sums.w_hh) round(grads.w_hh, sums.w_hh, GH * P);
    if (sums.w_hr) round(grads.w_hr, sums.w_hr, P * H);
  }

  // Over the tiles of sequences, in their order.
  void sum_biases(int64_t d) {
    const int64_t H = shape_.hidden;
    const auto write = [&](T* grad, int64_t gate, int64_t block) {
      if (!grad) return;
      for (int64_t part = 0; part < plan_.parts; ++part) {
        const Shard& shard = plan_.sample(d, part);
        for_lanes(shard.units(), [&](int64_t u, Mask mask) {
          Vec total = zero();
          for (int64_t tile = 0; tile < plan_.tiles; ++tile) {
            const int64_t s = (d * plan_.tiles + tile) * plan_.parts + part;
            total = add(total, load(sums_[s] + block * shard.gate_stride() + u, mask));
          }
          store(grad + gate * H + shard.unit_begin + u, total, mask);
        });
      }
    };
    const int64_t G = shape_.gates();
    for (int64_t gate = 0; gate < G; ++gate) {
      write(args_.grad_weights[d].b_ih, gate, gate + shape_.saved() - G);
      write(args_.grad_weights[d].b_hh, (gate + first_gate()) % G, gate);
    }
  }

  const RecurrentShape& shape_;
  const RecurrentBackward<T>& args_;
  const int threads_;
  const Steps steps_;
  const Plan plan_;
  Direction directions_[2] = {};
  std::vector<float*> carry_h_;             // a shard: (rows, padded units)
  std::vector<float*> recent_sums_, sums_;  // a shard: (saved, padded units), of grad_gates
  std::vector<Cell*> weights_;              // a direction and part
  void* gemm_scratch_;
  int width_;  // of all panels
  int64_t chunk_steps_, depth_, projected_depth_;
};

}  // namespace

template <class T>
void recurrent_backward(const RecurrentShape& shape, const RecurrentBackward<T>& args,
                        const GiveScratch& give, int threads, const ParallelFor& parallel) {
  BackwardPass<T>(shape, args, threads).run(give, parallel);
}

#define INSTANTIATE(T)                                                                    \
  template void recurrent_backward<T>(const RecurrentShape&, const RecurrentBackward<T>&, \
                                      const GiveScratch&, int, const ParallelFor&);
INSTANTIATE(float)
INSTANTIATE(bfloat16)
INSTANTIATE(float16)

}  // namespace pyarch
