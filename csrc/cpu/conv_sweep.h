// The order in which tiles visit a box of targets, for both layouts.
#pragma once

#include <vector>

#include "conv_plan.h"

namespace pyarch {

// One tile: its first target, how many targets its band has, and the taps that are not padding.
struct TilePlace {
  int64_t depth, height, width;
  int band;
  Mask lanes;
  bool all_lanes;
  TapRange range;
  int64_t run;       // tiles of this kind
  int64_t run_step;  // targets from one to the next
};

// Splits `count` targets into as few bands as fit registers, as even as can be.
template <class Visit>
void for_each_band(int64_t count, Visit&& visit) {
  const int64_t bands = ceil_div(count, BAND);
  for (int64_t i = 0; i < bands; ++i) visit(int(count * (i + 1) / bands - count * i / bands));
}

// Bands along one dimension: neighbours `period` apart, so each residue of the period is swept on its own.
template <class Visit>
void sweep_bands(Span targets, int64_t period, Visit&& visit) {
  for (int64_t residue = 0; residue < std::min(period, targets.size()); ++residue) {
    const int64_t count = ceil_div(targets.size() - residue, period);
    int64_t first = targets.begin + residue;
    for_each_band(count, [&](int band) {
      visit(first, band);
      first += band * period;
    });
  }
}

// Vectors along the width: a run of whole ones, then the rest. `exact` visits every target once, masking the last lanes;
// otherwise the last vector is moved back over targets already visited, which costs no mask.
template <class Visit>
void sweep_lanes(Span targets, bool exact, Visit&& visit) {
  const int64_t whole = targets.size() / LANES, left = targets.size() % LANES;
  if (whole) visit(targets.begin, whole, first_lanes(LANES), true);
  if (!left) return;
  if (!exact && whole)
    visit(targets.end - LANES, 1, first_lanes(LANES), true);
  else
    visit(targets.end - left, 1, first_lanes(left), false);
}

// Bands of vectors along the width, under the same two rules: a run of full bands, one of what is left, and the tail.
template <class Visit>
void sweep_line(Span targets, bool exact, Visit&& visit) {
  const int64_t tail = targets.size() % LANES;
  const bool move_back = !exact && tail && targets.size() >= BAND * LANES;
  const int64_t vectors = targets.size() / LANES + move_back;
  const int64_t full = vectors / BAND, rest = vectors % BAND;
  const Mask all = first_lanes(LANES);
  if (full) {
    const bool moves_last = move_back && rest == 0;
    if (full > moves_last) visit(targets.begin, BAND, full - moves_last, all, true);
    if (moves_last) visit(targets.end - BAND * LANES, BAND, 1, all, true);
  }
  const int64_t first = targets.begin + full * BAND * LANES;
  if (rest) visit(std::min(first, targets.end - rest * LANES), int(rest), 1, all, true);
  if (!tail || move_back) return;
  if (!exact && vectors)
    visit(targets.end - LANES, 1, 1, all, true);
  else
    visit(targets.end - tail, 1, 1, first_lanes(tail), false);
}

// Rows of a plane: bands of rows with vectors along W, or, in a `line`, bands of vectors along W.
template <class Visit>
void sweep_rows(const Axis (&axes)[3], const Box& targets, bool line, bool exact, Visit&& visit) {
  TilePlace tile;
  tile.range.lane = EVERYWHERE, tile.run_step = LANES;
  for (tile.depth = targets[0].begin; tile.depth < targets[0].end; ++tile.depth) {
    tile.range.depth = axes[0].real_taps(tile.depth);
    if (line) {
      tile.range.places = EVERYWHERE;
      for (tile.height = targets[1].begin; tile.height < targets[1].end; ++tile.height) {
        tile.range.height = axes[1].real_taps(tile.height);
        sweep_line(targets[2], exact, [&](int64_t width, int band, int64_t run, Mask lanes, bool all_lanes) {
          tile.width = width, tile.band = band, tile.lanes = lanes, tile.all_lanes = all_lanes;
          tile.run = run, tile.run_step = band * LANES;
          visit(tile);
        });
      }
    } else {
      tile.range.height = {0, 1};
      sweep_bands(targets[1], axes[1].period, [&](int64_t height, int band) {
        tile.height = height, tile.band = band;
        tile.range.places = axes[1].real_places(height);
        sweep_lanes(targets[2], exact, [&](int64_t width, int64_t run, Mask lanes, bool all_lanes) {
          tile.width = width, tile.run = run, tile.lanes = lanes, tile.all_lanes = all_lanes;
          visit(tile);
        });
      });
    }
  }
}

// Pixels of groups of channels, one group after the other, with bands along W and lanes along C.
template <class Visit>
void sweep_channels(const Axis (&axes)[3], const Box& targets, int64_t groups, Visit&& visit) {
  TilePlace tile;
  tile.lanes = first_lanes(LANES), tile.all_lanes = true, tile.range.lane = EVERYWHERE, tile.run = 1;
  for (int64_t group = 0; group < groups; ++group) {
    for (tile.depth = targets[0].begin; tile.depth < targets[0].end; ++tile.depth) {
      tile.range.depth = axes[0].real_taps(tile.depth);
      for (tile.height = targets[1].begin; tile.height < targets[1].end; ++tile.height) {
        tile.range.height = axes[1].real_taps(tile.height);
        sweep_bands(targets[2], axes[2].period, [&](int64_t width, int band) {
          tile.width = width, tile.band = band;
          tile.range.places = axes[2].real_places(width);
          visit(group, tile);
        });
      }
    }
  }
}

}  // namespace pyarch
