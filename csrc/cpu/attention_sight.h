// Who sees whom, in one batch entry and head: which blocks of keys a strip of queries must visit, whether it sees all of
// a block, and if not which keys a query sees.
#pragma once

#include <algorithm>
#include <vector>

#include "attention.h"
#include "attention_tile.h"

namespace pyarch {

// Tokens [begin, end).
struct Span {
  int64_t begin, end;

  int64_t size() const { return end - begin; }
};

class Sight {
 public:
  Sight(const AttentionShape& shape, const AttentionPattern& pattern, int64_t batch);

  // Calls body(keys) for the blocks of at most KEY_BLOCK keys within `among` that queries may see: whole panels,
  // ascending.
  template <class Body>
  void each_block(Span queries, Span among, Body&& body) const;

  // The panels of these keys, one after another, that every query sees whole; empty where there are none.
  Span seen_whole(Span queries, Span keys) const;
  bool sees_all(Span queries, Span keys) const { return seen_whole(queries, keys).size() == keys.size(); }

  // Says of each key, up to a whole panel, whether a head's query sees it; returns whether it sees any.
  bool look(int64_t head, int64_t query, Span keys, uint8_t* visible) const;

  // Whether a head's query sees nothing.
  bool is_blind(int64_t head, int64_t query) const;

  // Whether some query sees each key, for certain; if not, `seen` says it for heads [begin, end).
  bool sees_every_key() const;
  std::vector<uint8_t> seen(Span heads) const;

 private:
  int64_t position(int64_t query) const { return query + pattern_.query_offset; }
  bool is_global(int64_t position) const;
  Span near(int64_t query) const;  // by window and causality alone, of a query that is not global
  bool hides(int64_t panel, bool all) const;

  const AttentionShape shape_;
  const AttentionPattern pattern_;
  const int64_t batch_;
  bool windowed_;
  bool lattice_;
  std::vector<uint8_t> hidden_;         // by padding, a byte a key; empty: none
  std::vector<int64_t> hidden_before_;  // of each panel, and in all
  std::vector<uint8_t> global_;         // a byte a key; empty: none
  std::vector<int64_t> global_panels_;
  std::vector<int64_t> globals_before_;  // positions 0 ... T that are global before each
};

template <class Body>
void Sight::each_block(Span queries, Span among, Body&& body) const {
  Span run{0, 0};
  const auto visit = [&](int64_t panel) {
    const int64_t begin = panel * PANEL, end = std::min(begin + PANEL, shape_.keys);
    if (begin < among.begin || begin >= among.end || hides(panel, true)) return;
    if (run.size() && run.end == begin && end - run.begin <= KEY_BLOCK) {
      run.end = end;
      return;
    }
    if (run.size()) body(run);
    run = {begin, end};
  };
  const int64_t last = position(queries.end - 1);
  const int64_t latest = pattern_.is_causal ? std::clamp<int64_t>(last + 1, 0, shape_.keys) : shape_.keys;
  Span hull{near(queries.begin).begin, near(queries.end - 1).end};
  if (!globals_before_.empty()) {
    for (int64_t query = queries.begin; query < queries.end; ++query)
      if (is_global(position(query))) hull = {0, latest};
  }
  hull = {hull.begin / PANEL, hull.begin < hull.end ? ceil_div(hull.end, PANEL) : hull.begin / PANEL};
  const auto visit_globals = [&](int64_t from, int64_t to) {
    for (const int64_t panel : global_panels_)
      if (panel >= from && panel < to && panel * PANEL < latest) visit(panel);
  };
  visit_globals(0, hull.begin);
  const int64_t first = std::max(hull.begin, among.begin / PANEL);
  const int64_t end = std::min(hull.end, ceil_div(among.end, PANEL));
  for (int64_t panel = first; panel < end; ++panel) visit(panel);
  visit_globals(std::max(hull.begin, hull.end), UNBOUNDED);
  if (run.size()) body(run);
}

}  // namespace pyarch
