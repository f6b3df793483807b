// Blocking and threads of matrix products; see gemm.h.
//
// C is divided among tasks. A task takes its rows in blocks: for each stretch of k it packs the block's strips of A
// (to stay in the second-level cache), then each panel of B in turn (to stay in the first), which every strip meets
// while it is there.
#include "gemm.h"

#include <algorithm>

#include "gemm_tile.h"
#include "integers.h"

namespace pyarch {
namespace {

constexpr int64_t DEPTH = 256;                    // steps of k in a stretch
constexpr int64_t ACROSS_STEPS = 16;              // of k that every group packs before the next
constexpr int64_t BLOCK_BYTES = 640 * 1024;       // of packed A, at most,
constexpr int64_t BLOCK_SHARE = 16;               // and for small products this part of all they hold,
constexpr int64_t LEAST_BLOCK_BYTES = 32 * 1024;  // but so much always
constexpr int64_t SUMS_BYTES = 1024 * 1024;       // of sums that wait for the next stretch
template <class T>                                // multiply-adds that are worth a thread
constexpr int64_t TASK_PRODUCTS = IN_TILES<T> ? 2 * 1024 * 1024 : 256 * 1024;
constexpr int64_t ALIGNMENT = 64;

// One of `parts` nearly equal parts of [0, total).
struct Part {
  int64_t begin, end;

  int64_t size() const { return end - begin; }
};
Part part(int64_t total, int64_t parts, int64_t index) {
  return {total * index / parts, total * (index + 1) / parts};
}
int64_t largest_part(int64_t total, int64_t parts) { return ceil_div(total, parts); }

// A strip of a block's rows; in tile registers all but the last are whole.
template <class T>
Part strip_of(int64_t rows, int64_t index) {
  if constexpr (IN_TILES<T>)
    return {index * STRIP_ROWS<T>, std::min(rows, (index + 1) * STRIP_ROWS<T>)};
  else
    return part(rows, ceil_div(rows, ROWS), index);
}

// k in stretches of whole steps: it alone decides in which order an element's products are summed.
struct Stretches {
  int64_t k, count, elements;

  template <class S>
  static Stretches of(int64_t k) {
    const int64_t steps = ceil_div(k, S::ELEMENTS), count = std::max<int64_t>(1, ceil_div(steps, DEPTH));
    return {k, count, ceil_div(ceil_div(steps, count), LANES) * LANES * S::ELEMENTS};
  }
  Part operator[](int64_t index) const {
    return {std::min(k, index * elements), std::min(k, (index + 1) * elements)};
  }
};

// How a product is divided: tasks in a grid over C, each in blocks of rows and, where sums must wait, of panels.
struct Plan {
  int64_t row_tasks, panel_tasks;
  int64_t row_blocks, panel_blocks = 1;
  Stretches stretches;
  bool keep_sums;
  int64_t strip_floats, panel_floats, a_floats, sum_floats;  // of scratch

  int64_t tasks() const { return row_tasks * panel_tasks; }
  int64_t task_floats() const { return a_floats + panel_floats + sum_floats; }
};

int64_t block_bytes(const GemmShape& shape) {
  const int64_t elements = shape.m * shape.k + shape.k * shape.n + shape.m * shape.n;
  return std::clamp(elements * int64_t(sizeof(float)) / BLOCK_SHARE, LEAST_BLOCK_BYTES, BLOCK_BYTES);
}

template <class T>
int64_t most_tasks(const GemmShape& shape, int64_t threads) {
  return std::min(threads, std::max<int64_t>(1, shape.m * shape.n * shape.k / TASK_PRODUCTS<T>));
}

// The grid of tasks that is done soonest: its largest task multiplies and packs least.
template <class T>
void divide_among_tasks(const GemmShape& shape, int64_t threads, Plan& plan) {
  const int64_t panels = ceil_div(shape.n, PANEL);
  const int64_t tasks = most_tasks<T>(shape, threads);
  // In cycles a step of k: a tile, and what packing a strip or a panel takes.
  constexpr int64_t TILE = IN_TILES<T> ? 4 : ROWS, PACK_STRIP = IN_TILES<T> ? 8 : 4, PACK_PANEL = 8;
  int64_t least = INT64_MAX;
  for (int64_t row_tasks = 1; row_tasks <= tasks; ++row_tasks) {
    const int64_t task_strips = ceil_div(largest_part(shape.m, row_tasks), STRIP_ROWS<T>);
    const int64_t task_panels = largest_part(panels, tasks / row_tasks);
    const int64_t cost =
        task_strips * task_panels * TILE + task_strips * PACK_STRIP + task_panels * PACK_PANEL;
    if (cost >= least) continue;
    least = cost;
    plan.row_tasks = row_tasks;
    plan.panel_tasks = tasks / row_tasks;
  }
}

template <class T, class Out>
Plan plan_of(const GemmShape& shape, int64_t threads) {
  using S = Step<T>;
  Plan plan{};
  divide_among_tasks<T>(shape, threads, plan);
  plan.stretches = Stretches::of<S>(shape.k);

  const int64_t steps = plan.stretches.elements / S::ELEMENTS;
  plan.strip_floats = steps * STRIP_FLOATS<T>;
  plan.panel_floats = steps * PANEL;
  const int64_t task_rows = largest_part(shape.m, plan.row_tasks);
  const int64_t task_bytes = ceil_div(task_rows, STRIP_ROWS<T>) * plan.strip_floats * int64_t(sizeof(float));
  plan.row_blocks = std::max<int64_t>(1, ceil_div(task_bytes, block_bytes(shape)));
  const int64_t block_rows = largest_part(task_rows, plan.row_blocks);
  plan.a_floats = ceil_div(block_rows, STRIP_ROWS<T>) * plan.strip_floats;

  plan.keep_sums = sizeof(Out) < sizeof(float) && plan.stretches.count > 1;
  if (plan.keep_sums) {
    const int64_t task_panels = largest_part(ceil_div(shape.n, PANEL), plan.panel_tasks);
    const int64_t sums_of_panel = block_rows * PANEL;
    const int64_t sums_bytes = task_panels * sums_of_panel * int64_t(sizeof(float));
    plan.panel_blocks = std::max<int64_t>(1, ceil_div(sums_bytes, SUMS_BYTES));
    plan.sum_floats = largest_part(task_panels, plan.panel_blocks) * sums_of_panel;
  }
  return plan;
}

template <class T, class Out>
struct Product {
  GemmShape shape;
  Operand<T> a, b;
  const float* bias;
  bool accumulate;
  Target<Out> c;
};

// Packs groups of lanes over a stretch of k, each by pack_group(lanes, group, first step); the lanes are the rows of
// `matrix`. Where neighbours in memory are lanes, all groups take a few steps at a time, so that memory is read in long
// runs.
template <class T, class FirstLane, class PackGroup>
void pack_groups(const Operand<T>& matrix, int64_t lanes, int64_t groups, FirstLane&& first_lane, Part depth,
                 PackGroup&& pack_group) {
  constexpr int E = Step<T>::ELEMENTS;
  const int64_t at_once = matrix.column_stride == 1 ? depth.size() : ACROSS_STEPS * E;
  for (int64_t k = depth.begin; k < depth.end; k += at_once) {
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t lane = first_lane(group);
      const T* const first = matrix.data + lane * matrix.row_stride + k * matrix.column_stride;
      pack_group(LaneGroup<T>{first, matrix.row_stride, matrix.column_stride, lanes - lane,
                              std::min(at_once, depth.end - k)},
                 group, (k - depth.begin) / E);
    }
  }
}

// The rows of one block, strip by strip.
template <class T, class Out>
void pack_strips(const Product<T, Out>& product, const Plan& plan, Part rows, Part depth, float* packed) {
  const int64_t lanes = product.shape.m;
#if defined(__AMX_BF16__)
  if constexpr (IN_TILES<T>) {
    static_assert(ACROSS_STEPS % TILE_STEPS == 0);
    const auto first_row = [&](int64_t group) { return rows.begin + group * MOST_TILE_ROWS; };
    const auto pack_group = [&](const LaneGroup<T>& group, int64_t index, int64_t step) {
      float* const strip = packed + index / 2 * plan.strip_floats;
      pack_squares(group, strip + step * STRIP_FLOATS<T> + index % 2 * SQUARE, 2 * SQUARE);
    };
    return pack_groups(product.a, lanes, ceil_div(rows.size(), MOST_TILE_ROWS), first_row, depth, pack_group);
  }
#endif
  const auto first_row = [&](int64_t strip) { return rows.begin + strip_of<T>(rows.size(), strip).begin; };
  const auto pack_group = [&](const LaneGroup<T>& group, int64_t strip, int64_t step) {
    pack<T>(group, packed + strip * plan.strip_floats + step * LANES, LANES);
  };
  pack_groups(product.a, lanes, ceil_div(rows.size(), ROWS), first_row, depth, pack_group);
}

// The columns of one panel, vectors side by side. A vector that has none is zero: what was there is multiplied too, and
// a number too small for its exponent takes a processor a hundred cycles.
template <class T, class Out>
void pack_panel(const Product<T, Out>& product, int64_t panel, Part depth, float* packed) {
  const int64_t column = panel * PANEL, columns = std::min<int64_t>(PANEL, product.shape.n - column);
  const int64_t steps = ceil_div(depth.size(), Step<T>::ELEMENTS);
  for (int64_t step = 0; columns <= LANES && step < steps; ++step)
    store(packed + step * PANEL + LANES, zero());
  if constexpr (IN_TILES<T>)
    std::fill(packed + steps * PANEL, packed + round_up(steps, ACROSS_STEPS) * PANEL, 0.0f);
  const auto first_column = [&](int64_t group) { return column + group * LANES; };
  const auto pack_group = [&](const LaneGroup<T>& group, int64_t index, int64_t step) {
    pack<T>(group, packed + step * PANEL + index * LANES, PANEL);
  };
  pack_groups(product.b.transposed(), product.shape.n, ceil_div(columns, LANES), first_column, depth,
              pack_group);
}

// One panel of B against every strip of the block.
template <class T, class Out>
void multiply_strips(const Product<T, Out>& product, const Plan& plan, Part rows, int64_t panel,
                     int64_t stretch, const float* packed_a, const float* packed_b, float* sums) {
  using S = Step<T>;
  const bool first = stretch == 0, last = stretch == plan.stretches.count - 1;
  const int64_t column = panel * PANEL;
  Tile<Out> tile;
  tile.b = packed_b;
  tile.steps = ceil_div(plan.stretches[stretch].size(), S::ELEMENTS);
  tile.columns = std::min<int64_t>(PANEL, product.shape.n - column);
  tile.bias = product.bias && first ? product.bias + column : nullptr;
  tile.accumulate = plan.keep_sums ? product.accumulate && last : product.accumulate || !first;
  tile.c.row_stride = product.c.row_stride;
  const int64_t strips = ceil_div(rows.size(), STRIP_ROWS<T>);
  for (int64_t s = 0; s < strips; ++s) {
    const Part strip = strip_of<T>(rows.size(), s);
    tile.a = packed_a + s * plan.strip_floats;
    tile.c.data = product.c.data + (rows.begin + strip.begin) * product.c.row_stride + column;
    float* const kept = sums + strip.begin * PANEL;
    tile.sums = plan.keep_sums && !first ? kept : nullptr;
    tile.keep_sums = plan.keep_sums && !last ? kept : nullptr;
    multiply_tile<S>(strip.size(), tile);
  }
}

template <class T, class Out>
void run_task(const Product<T, Out>& product, const Plan& plan, int64_t task, float* scratch) {
  const Part task_rows = part(product.shape.m, plan.row_tasks, task / plan.panel_tasks);
  const Part task_panels = part(ceil_div(product.shape.n, PANEL), plan.panel_tasks, task % plan.panel_tasks);
  float *const a = scratch, *const b = a + plan.a_floats, *const sums = b + plan.panel_floats;
  for (int64_t row_block = 0; row_block < plan.row_blocks; ++row_block) {
    Part rows = part(task_rows.size(), plan.row_blocks, row_block);
    rows = {task_rows.begin + rows.begin, task_rows.begin + rows.end};
    for (int64_t panel_block = 0; panel_block < plan.panel_blocks; ++panel_block) {
      const Part panels = part(task_panels.size(), plan.panel_blocks, panel_block);
      for (int64_t stretch = 0; stretch < plan.stretches.count; ++stretch) {
        const Part depth = plan.stretches[stretch];
        pack_strips(product, plan, rows, depth, a);
        for (int64_t p = panels.begin; p < panels.end; ++p) {
          const int64_t panel = task_panels.begin + p;
          pack_panel(product, panel, depth, b);
          multiply_strips(product, plan, rows, panel, stretch, a, b,
                          sums + (p - panels.begin) * rows.size() * PANEL);
        }
      }
    }
  }
}

float* aligned(void* scratch) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(scratch);
  return reinterpret_cast<float*>((address + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
}

}  // namespace

// No plan of a smaller product takes more: a stretch is never longer than DEPTH and a vector, and a block or its sums
// pass their limit by less than two strips or panels.
template <class T, class Out>
int64_t gemm_scratch_bytes(const GemmShape& shape, int64_t threads) {
  constexpr int64_t E = Step<T>::ELEMENTS, FLOAT = sizeof(float);
  const int64_t steps = std::min(ceil_div(ceil_div(shape.k, E), LANES) * LANES, DEPTH + LANES);
  const int64_t strip_bytes = steps * STRIP_FLOATS<T> * FLOAT, strips = ceil_div(shape.m, STRIP_ROWS<T>) + 1;
  const int64_t a_bytes = std::min(strips * strip_bytes, block_bytes(shape) + 2 * strip_bytes);
  int64_t sum_bytes = 0;
  if (sizeof(Out) < sizeof(float) && ceil_div(shape.k, E) > DEPTH) {
    // A short stretch has short strips, of which a block holds more.
    const int64_t shortest = ceil_div(DEPTH, 2) * STRIP_FLOATS<T> * FLOAT;
    const int64_t rows = std::min(shape.m, (block_bytes(shape) / shortest + 2) * STRIP_ROWS<T>);
    const int64_t panel_sums = rows * PANEL * FLOAT;
    sum_bytes = std::min(ceil_div(shape.n, PANEL) * panel_sums, SUMS_BYTES + 2 * panel_sums);
  }
  const int64_t task_bytes = a_bytes + steps * PANEL * FLOAT + sum_bytes;
  return most_tasks<T>(shape, threads) * task_bytes + ALIGNMENT;
}

template <class T, class Out>
void gemm(const GemmShape& shape, const Operand<T>& a, const Operand<T>& b, const float* bias,
          bool accumulate, const Target<Out>& c, void* scratch, int64_t threads,
          const ParallelFor& parallel) {
  if (shape.m == 0 || shape.n == 0) return;
  const Plan plan = plan_of<T, Out>(shape, threads);
  const Product<T, Out> product{shape, a, b, bias, accumulate, c};
  const auto run_tasks = [&](int64_t begin, int64_t end) {
    [[maybe_unused]] const TileRegistersFor<T> registers;
    for (int64_t task = begin; task < end; ++task)
      run_task(product, plan, task, aligned(scratch) + task * plan.task_floats());
  };
  if (plan.tasks() == 1)
    run_tasks(0, 1);
  else
    parallel(plan.tasks(), run_tasks);
}

#define PYARCH_GEMM(T, Out)                                                                      \
  template int64_t gemm_scratch_bytes<T, Out>(const GemmShape&, int64_t);                        \
  template void gemm(const GemmShape&, const Operand<T>&, const Operand<T>&, const float*, bool, \
                     const Target<Out>&, void*, int64_t, const ParallelFor&);
PYARCH_GEMM(float, float)
PYARCH_GEMM(bfloat16, bfloat16)
PYARCH_GEMM(bfloat16, float)
PYARCH_GEMM(float16, float16)
PYARCH_GEMM(float16, float)

}  // namespace pyarch
