#include "conv_plan.h"

#include <cstdlib>
#include <memory>
#include <new>
#include <numeric>

namespace pyarch {
namespace {

constexpr int64_t CACHE_FLOATS = 96 * 1024;  // 384 KiB: with its gradient and output it stays in a 1 MiB L2
constexpr int64_t LONGEST_LINE = 32 * 1024;

int64_t tap_number_step(const ConvShape& shape, int dimension) {
  int64_t step = 1;
  for (int inner = dimension + 1; inner < 3; ++inner) step *= shape.kernel[inner];
  return step;
}

// Runs of taps `spacing` places apart, each a list of indices into `taps`, cut evenly into at most CHUNK taps.
std::vector<std::vector<size_t>> chunked_runs(const Taps& taps, int64_t spacing) {
  std::vector<std::vector<size_t>> chunks;
  std::vector<bool> taken(taps.size(), false);
  for (size_t first = 0; first < taps.size(); ++first) {
    if (taken[first]) continue;
    std::vector<size_t> run;
    for (size_t next = first; next < taps.size(); ++next) {
      if (taps[next].at != taps[first].at + int64_t(run.size()) * spacing) continue;
      taken[next] = true;
      run.push_back(next);
    }
    const size_t pieces = (run.size() + CHUNK - 1) / CHUNK;
    for (size_t piece = 0; piece < pieces; ++piece)
      chunks.emplace_back(run.begin() + run.size() * piece / pieces,
                          run.begin() + run.size() * (piece + 1) / pieces);
  }
  std::stable_sort(chunks.begin(), chunks.end(), [](auto& a, auto& b) { return a.size() < b.size(); });
  return chunks;
}

// Chunks of one size that differ only in where they begin become one chunk with several lane taps: a tighter loop.
void merge_chunks(TapTables& tables) {
  std::vector<Chunk> merged;
  tables.lane.clear();
  for (const Chunk& chunk : tables.chunks) {
    if (merged.empty() || merged.back().taps != chunk.taps) {
      const int64_t lane = int64_t(tables.lane.size());
      merged.push_back({chunk.taps, 0, chunk.weight, chunk.step, chunk.at, {lane, lane}});
    }
    tables.lane.push_back(chunk.source);
    ++merged.back().lane.end;
  }
  tables.chunks = std::move(merged);
}

}  // namespace

Span Axis::sources_of(Span targets) const {
  if (taps.empty() || targets.size() <= 0) return {0, 0};
  return {first_source(targets.begin) + taps.front().at, first_source(targets.end - 1) + taps.back().at + 1};
}

Span Axis::real_taps(int64_t target) const {
  Span range{0, int64_t(taps.size())};
  if (!padding_is_zero) return range;
  const int64_t first = first_source(target);
  while (range.begin < range.end && first + taps[range.begin].at < 0) ++range.begin;
  while (range.begin < range.end && first + taps[range.end - 1].at >= sources) --range.end;
  return range;
}

Span Axis::real_places(int64_t target) const {
  if (!padding_is_zero) return EVERYWHERE;
  return {-first_source(target), sources - first_source(target)};
}

Axis forward_axis(const ConvShape& shape, int dimension) {
  const int64_t stride = shape.stride[dimension], dilation = shape.dilation[dimension];
  const int64_t spacing = std::lcm(dilation, stride);
  Axis axis{{},
            stride,
            -shape.before[dimension],
            shape.in[dimension],
            shape.mode == PaddingMode::zeros,
            spacing,
            spacing / stride};
  for (int64_t k = 0; k < shape.kernel[dimension]; ++k)
    axis.taps.push_back({k * tap_number_step(shape, dimension), k * dilation});
  return axis;
}

Axis gradient_axis(const ConvShape& shape, int dimension, int64_t phase) {
  const int64_t stride = shape.stride[dimension], dilation = shape.dilation[dimension];
  const int64_t spacing = dilation / std::gcd(dilation, stride);
  Axis axis{{}, 1, 0, shape.out[dimension], true, spacing, spacing};
  for (int64_t k = shape.kernel[dimension] - 1; k >= 0; --k) {
    if (k * dilation % stride != phase) continue;
    axis.taps.push_back({k * tap_number_step(shape, dimension), -(k * dilation - phase) / stride});
  }
  return axis;
}

Span gradient_targets(const ConvShape& shape, int dimension, int64_t phase, Span inputs) {
  const int64_t stride = shape.stride[dimension], shift = shape.before[dimension] - phase;
  return {ceil_div(inputs.begin + shift, stride), floor_div(inputs.end - 1 + shift, stride) + 1};
}

Span gradient_sources(const ConvShape& shape, int dimension, Span inputs) {
  const int64_t stride = shape.stride[dimension], before = shape.before[dimension];
  const int64_t reach = shape.dilation[dimension] * (shape.kernel[dimension] - 1);
  return {floor_div(inputs.begin + before - reach, stride), floor_div(inputs.end - 1 + before, stride) + 1};
}

TapTables tap_tables(std::vector<int64_t> group, const Taps& depth, const Taps& height, const Taps& band,
                     const Taps& lane, int64_t spacing, int64_t band_unit, int64_t taps_a_group,
                     bool merges) {
  TapTables tables;
  tables.group = std::move(group);
  tables.spacing = spacing;
  tables.band_step = spacing * band_unit;
  for (const Tap& tap : depth) tables.depth.push_back(tap.at);
  for (const Tap& tap : height) tables.height.push_back(tap.at);
  for (const Tap& tap : lane) tables.lane.push_back(tap.at);

  const Span lanes{0, int64_t(lane.size())};
  std::vector<int64_t> inner;
  for (const auto& run : chunked_runs(band, spacing)) {
    const Tap& first = band[run.front()];
    const int64_t taps = int64_t(run.size());
    tables.chunks.push_back({int(taps), first.at * band_unit, int64_t(inner.size()), taps, first.at, lanes});
    for (const Tap& side : lane)
      for (size_t k : run) inner.push_back(side.number + band[k].number);
  }
  if (merges) merge_chunks(tables);
  tables.inner = int64_t(inner.size());
  for (size_t g = 0; g < tables.group.size(); ++g)
    for (const Tap& d : depth)
      for (const Tap& h : height)
        for (int64_t tap : inner)
          tables.order.push_back(int64_t(g) * taps_a_group + d.number + h.number + tap);
  return tables;
}

Taps scaled(Taps taps, int64_t unit) {
  for (Tap& tap : taps) tap.at *= unit;
  return taps;
}

Box part_of(const int64_t (&size)[3], const int64_t (&parts)[3], int64_t index) {
  Box box;
  for (int i = 2; i >= 0; --i) {
    const int64_t part = index % parts[i];
    index /= parts[i];
    box[i] = {size[i] * part / parts[i], size[i] * (part + 1) / parts[i]};
  }
  return box;
}

void choose_parts(const ConvShape& shape, int64_t floats_a_place, int64_t (&parts)[3]) {
  int64_t reach[3], most[3];
  for (int i = 0; i < 3; ++i) {
    parts[i] = 1;
    most[i] = std::min(shape.out[i], shape.in[i]);
    reach[i] = shape.dilation[i] * (shape.kernel[i] - 1);
  }
  const auto extent = [&](int i) { return ceil_div(shape.out[i], parts[i]) * shape.stride[i] + reach[i]; };
  const auto too_large = [&] { return extent(0) * extent(1) * extent(2) * floats_a_place > CACHE_FLOATS; };
  parts[2] = std::min(most[2], ceil_div(shape.out[2] * floats_a_place, LONGEST_LINE));
  for (int i : {0, 1})
    while (too_large() && parts[i] < most[i]) parts[i] = std::min(most[i], parts[i] * 2);
}

int64_t source_place(int64_t place, int64_t size, PaddingMode mode) {
  if (place >= 0 && place < size) return place;
  switch (mode) {
    case PaddingMode::zeros:
      return -1;
    case PaddingMode::replicate:
      return place < 0 ? 0 : size - 1;
    case PaddingMode::circular:
      return place < 0 ? place + size : place - size;
    case PaddingMode::reflect:
      return place < 0 ? -place : 2 * (size - 1) - place;
  }
  return -1;
}

float* scratch(Slot slot, int64_t floats) {
  struct Buffer {
    std::unique_ptr<float, decltype(&std::free)> memory{nullptr, &std::free};
    int64_t floats = 0;
  };
  static thread_local Buffer buffers[int(Slot::count)];
  Buffer& buffer = buffers[int(slot)];
  if (buffer.floats < floats || !buffer.memory) {
    const int64_t rounded = round_up(floats + 4 * LANES, 1024);
    buffer.memory.reset(static_cast<float*>(std::aligned_alloc(64, rounded * sizeof(float))));
    if (!buffer.memory) throw std::bad_alloc();
    buffer.floats = floats;
  }
  return buffer.memory.get();
}

}  // namespace pyarch
