// Visibility of keys; see attention_sight.h.
#include "attention_sight.h"

#include <cstring>

namespace pyarch {

Sight::Sight(const AttentionShape& shape, const AttentionPattern& pattern, int64_t batch)
    : shape_(shape), pattern_(pattern), batch_(batch) {
  lattice_ = pattern.dilation != 1;
  windowed_ = lattice_ || pattern.left < UNBOUNDED || pattern.right < UNBOUNDED;
  const int64_t panels = ceil_div(shape.keys, PANEL);
  if (pattern.padding.data) {
    hidden_.resize(shape.keys);
    hidden_before_.assign(panels + 1, 0);
    for (int64_t key = 0; key < shape.keys; ++key) {
      hidden_[key] = pattern.padding.at(batch, key);
      hidden_before_[key / PANEL + 1] += hidden_[key];
    }
    for (int64_t panel = 0; panel < panels; ++panel) hidden_before_[panel + 1] += hidden_before_[panel];
    if (hidden_before_[panels] == 0) {
      hidden_.clear();
      hidden_before_.clear();
    }
  }
  if (windowed_ && (pattern.global_tokens > 0 || pattern.global.data)) {
    const int64_t positions = std::max(shape.keys, position(shape.queries));
    globals_before_.assign(positions + 1, 0);
    for (int64_t p = 0; p < positions; ++p)
      globals_before_[p + 1] =
          globals_before_[p] + (p < pattern.global_tokens || pattern.global.at(batch, p));
    global_.resize(shape.keys);
    for (int64_t key = 0; key < shape.keys; ++key) global_[key] = is_global(key);
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t begin = panel * PANEL, end = std::min(begin + PANEL, shape.keys);
      if (globals_before_[end] > globals_before_[begin]) global_panels_.push_back(panel);
    }
  }
}

bool Sight::is_global(int64_t position) const {
  return position >= 0 && position + 1 < int64_t(globals_before_.size()) &&
         globals_before_[position + 1] > globals_before_[position];
}

Span Sight::near(int64_t query) const {
  const int64_t p = position(query);
  const int64_t begin = pattern_.left < UNBOUNDED ? p - pattern_.left * pattern_.dilation : 0;
  int64_t end = pattern_.right < UNBOUNDED ? p + pattern_.right * pattern_.dilation + 1 : shape_.keys;
  if (pattern_.is_causal) end = std::min(end, p + 1);
  return {std::clamp<int64_t>(begin, 0, shape_.keys), std::clamp<int64_t>(end, 0, shape_.keys)};
}

bool Sight::hides(int64_t panel, bool all) const {
  if (hidden_.empty()) return false;
  const int64_t hidden = hidden_before_[panel + 1] - hidden_before_[panel];
  return all ? hidden == std::min<int64_t>(PANEL, shape_.keys - panel * PANEL) : hidden > 0;
}

Span Sight::seen_whole(Span queries, Span keys) const {
  const Span none{keys.begin, keys.begin};
  if (pattern_.mask.data || lattice_) return none;
  int64_t first = ceil_div(std::max(near(queries.end - 1).begin, keys.begin), PANEL);
  int64_t end = std::min(near(queries.begin).end, keys.end) / PANEL;
  while (first < end && hides(end - 1, false)) --end;
  while (first < end && hides(first, false)) ++first;
  if (first >= end) return none;
  if (!hidden_.empty() && hidden_before_[end] > hidden_before_[first]) return none;
  return {first * PANEL, end * PANEL};
}

bool Sight::look(int64_t head, int64_t query, Span keys, uint8_t* visible) const {
  const int64_t count = keys.size(), p = position(query);
  std::memset(visible, 0, round_up(count, PANEL));
  if (!globals_before_.empty() && is_global(p)) {
    std::memset(visible, 1, count);
  } else {
    Span span = near(query);
    if (lattice_) {
      const int64_t step = pattern_.dilation;
      const int64_t from = std::max(span.begin, keys.begin);
      for (int64_t key = from + ((p - from) % step + step) % step; key < std::min(span.end, keys.end);
           key += step)
        visible[key - keys.begin] = 1;
    } else {
      span = {std::max(span.begin, keys.begin), std::min(span.end, keys.end)};
      if (span.size() > 0) std::memset(visible + span.begin - keys.begin, 1, span.size());
    }
    if (!global_.empty())
      for (int64_t k = 0; k < count; ++k) visible[k] |= global_[keys.begin + k];
  }
  if (pattern_.is_causal && p + 1 < keys.end) {
    const int64_t allowed = std::max<int64_t>(0, p + 1 - keys.begin);
    std::memset(visible + allowed, 0, count - allowed);
  }
  if (!hidden_.empty())
    for (int64_t k = 0; k < count; ++k) visible[k] &= uint8_t(hidden_[keys.begin + k] ^ 1);
  if (pattern_.mask.data) {
    const uint8_t* const mask = pattern_.mask.at(batch_, head, query) + keys.begin * pattern_.mask.key_stride;
    if (pattern_.mask.key_stride == 1)
      for (int64_t k = 0; k < count; ++k) visible[k] &= mask[k];
    else
      for (int64_t k = 0; k < count; ++k) visible[k] &= mask[k * pattern_.mask.key_stride];
  }
  uint8_t any = 0;
  for (int64_t k = 0; k < count; ++k) any |= visible[k];
  return any;
}

bool Sight::is_blind(int64_t head, int64_t query) const {
  uint8_t visible[KEY_BLOCK];
  bool blind = true;
  each_block({query, query + 1}, {0, shape_.keys},
             [&](Span keys) { blind = blind && !look(head, query, keys, visible); });
  return blind;
}

bool Sight::sees_every_key() const {
  if (pattern_.mask.data || lattice_ || !hidden_.empty()) return false;
  return shape_.queries > 0 && near(0).begin == 0 && near(shape_.queries - 1).end == shape_.keys &&
         (!windowed_ || (pattern_.left >= 0 && pattern_.right >= 0));
}

std::vector<uint8_t> Sight::seen(Span heads) const {
  std::vector<uint8_t> seen(shape_.keys), visible(KEY_BLOCK);
  const bool by_head = pattern_.mask.data && pattern_.mask.head_stride;
  for (int64_t head = heads.begin; head < (by_head ? heads.end : heads.begin + 1); ++head)
    for (int64_t query = 0; query < shape_.queries; ++query)
      each_block({query, query + 1}, {0, shape_.keys}, [&](Span keys) {
        look(head, query, keys, visible.data());
        for (int64_t key = keys.begin; key < keys.end; ++key) seen[key] |= visible[key - keys.begin];
      });
  return seen;
}

}  // namespace pyarch
