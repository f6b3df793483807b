// Binds attention; see bindings.h and attention.h.
#include <algorithm>

#include "attention.h"
#include "attention_sight.h"
#include "attention_tile.h"

#include "bindings.h"

namespace pyarch {
namespace {

using MaybeTensor = std::optional<Tensor>;

// What a call passes beside its tensors: a seed of one int64 where it drops, and these float64, one after another.
struct Numbers {
  double scale, softcap, dropout, is_causal, left, right, dilation, global_tokens, query_offset;

  static const Numbers& of(const Tensor& numbers) {
    STD_TORCH_CHECK(numbers.numel() == sizeof(Numbers) / sizeof(double), "attention: needs its nine numbers");
    return *data<const Numbers>(numbers);
  }
};

template <class T>
Heads<T> heads_of(const Tensor& tensor) {
  return {data<T>(tensor), tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}

template <class T>
PerScore<T> per_score(const MaybeTensor& tensor) {
  if (!tensor) return {};
  const auto stride = [&](int64_t d) { return tensor->size(d) == 1 ? 0 : tensor->stride(d); };
  return {data<T>(*tensor), stride(0), stride(1), stride(2), stride(3)};
}

// A bias (B or 1, H or 1, Tq + Tk - 1), dense, whose entry j - i + Tq - 1 belongs to query i and key j.
PerScore<const float> per_distance(const MaybeTensor& tensor, int64_t queries) {
  if (!tensor) return {};
  const auto stride = [&](int64_t d) { return tensor->size(d) == 1 ? 0 : tensor->stride(d); };
  return {data<const float>(*tensor) + queries - 1, stride(0), stride(1), -1, 1};
}

PerToken per_token(const MaybeTensor& tensor) {
  if (!tensor) return {};
  return {data<const uint8_t>(*tensor), tensor->stride(0), tensor->stride(1), tensor->size(1)};
}

AttentionShape shape_of(const Tensor& query, const Tensor& key, int64_t value_dim) {
  return {query.size(0), query.size(1), key.size(1), query.size(2), key.size(2), query.size(3), value_dim};
}

AttentionPattern pattern_of(const MaybeTensor& mask, const MaybeTensor& padding, const MaybeTensor& global,
                            const Numbers& numbers) {
  return {numbers.is_causal != 0,
          numbers.left < 0 ? UNBOUNDED : int64_t(numbers.left),
          numbers.right < 0 ? UNBOUNDED : int64_t(numbers.right),
          int64_t(numbers.dilation),
          int64_t(numbers.global_tokens),
          int64_t(numbers.query_offset),
          per_score<const uint8_t>(mask),
          per_token(padding),
          per_token(global)};
}

template <class T>
AttentionScores<T> scores_of(const MaybeTensor& bias, const MaybeTensor& sinks, const MaybeTensor& seed,
                             const MaybeTensor& distance, int64_t queries, const Numbers& numbers) {
  const bool single = bias && bias->scalar_type() == ScalarType::Float;
  return {float(numbers.scale),
          float(numbers.softcap),
          single ? PerScore<const T>{} : per_score<const T>(bias),
          single ? per_score<const float>(bias) : PerScore<const float>{},
          per_distance(distance, queries),
          data<const float>(sinks),
          numbers.dropout,
          seed ? uint64_t(*data<const int64_t>(*seed)) : 0};
}

template <class T>
void run_forward(std::span<const AttentionForward<T>> calls, const Tensor& out) {
  Scratch scratch{out};
  attention_forward<T>(calls, std::ref(scratch), int64_t(torch::stable::get_num_threads()), on_torch_threads);
}

void forward_and_weights(const Tensor& out, const Tensor& lse, const MaybeTensor& weights,
                         const Tensor& query, const Tensor& key, const Tensor& value, const MaybeTensor& mask,
                         const MaybeTensor& bias, const MaybeTensor& padding, const MaybeTensor& global,
                         const MaybeTensor& sinks, const MaybeTensor& seed, const MaybeTensor& distance,
                         const Tensor& numbers) {
  with_element_type("attention_forward", query, [&](auto element) {
    using T = decltype(element);
    const AttentionForward<T> args{
        shape_of(query, key, value.size(3)),
        pattern_of(mask, padding, global, Numbers::of(numbers)),
        scores_of<T>(bias, sinks, seed, distance, query.size(2), Numbers::of(numbers)),
        heads_of<const T>(query),
        heads_of<const T>(key),
        heads_of<const T>(value),
        heads_of<T>(out),
        data<float>(lse),
        query.size(2),
        data<T>(weights),
        weights && weights->dim() == 3};
    run_forward<T>({&args, 1}, out);
  });
}

void forward(const Tensor& out, const Tensor& lse, const Tensor& query, const Tensor& key,
             const Tensor& value, const MaybeTensor& mask, const MaybeTensor& bias,
             const MaybeTensor& padding, const MaybeTensor& global, const MaybeTensor& sinks,
             const MaybeTensor& seed, const MaybeTensor& distance, const Tensor& numbers) {
  forward_and_weights(out, lse, std::nullopt, query, key, value, mask, bias, padding, global, sinks, seed,
                      distance, numbers);
}

void backward(const MaybeTensor& query_grad, const MaybeTensor& key_grad, const MaybeTensor& value_grad,
              const MaybeTensor& bias_grad, bool first_bias_grad, const MaybeTensor& distance_grad,
              const Tensor& out_grad, const MaybeTensor& lse_grad, const Tensor& query, const Tensor& key,
              const Tensor& value, const Tensor& out, const Tensor& lse, const MaybeTensor& mask,
              const MaybeTensor& bias, const MaybeTensor& padding, const MaybeTensor& global,
              const MaybeTensor& sinks, const MaybeTensor& seed, const MaybeTensor& distance,
              const Tensor& numbers) {
  with_element_type("attention_backward", query, [&](auto element) {
    using T = decltype(element);
    const auto grad = [](const MaybeTensor& tensor) { return tensor ? heads_of<T>(*tensor) : Heads<T>{}; };
    const AttentionBackward<T> args{
        shape_of(query, key, value.size(3)),
        pattern_of(mask, padding, global, Numbers::of(numbers)),
        scores_of<T>(bias, sinks, seed, distance, query.size(2), Numbers::of(numbers)),
        heads_of<const T>(query),
        heads_of<const T>(key),
        heads_of<const T>(value),
        heads_of<const T>(out),
        heads_of<const T>(out_grad),
        data<const float>(lse),
        data<const float>(lse_grad),
        query.size(2),
        grad(query_grad),
        grad(key_grad),
        grad(value_grad),
        per_score<float>(bias_grad),
        first_bias_grad,
        data<float>(distance_grad)};
    Scratch scratch{out};
    attention_backward<T>({&args, 1}, std::ref(scratch), int64_t(torch::stable::get_num_threads()),
                          on_torch_threads);
  });
}

void weights(const Tensor& weights, const Tensor& query, const Tensor& key, const Tensor& lse, bool mean,
             const MaybeTensor& mask, const MaybeTensor& bias, const MaybeTensor& padding,
             const MaybeTensor& global, const MaybeTensor& sinks, const MaybeTensor& seed,
             const MaybeTensor& distance, const Tensor& numbers) {
  with_element_type("attention_weights", query, [&](auto element) {
    using T = decltype(element);
    const AttentionWeights<T> args{
        shape_of(query, key, query.size(3)),
        pattern_of(mask, padding, global, Numbers::of(numbers)),
        scores_of<T>(bias, sinks, seed, distance, query.size(2), Numbers::of(numbers)),
        heads_of<const T>(query),
        heads_of<const T>(key),
        data<const float>(lse),
        data<T>(weights),
        mean};
    Scratch scratch{weights};
    attention_weights<T>(args, std::ref(scratch), int64_t(torch::stable::get_num_threads()),
                         on_torch_threads);
  });
}

// -------------------------------------------------------------------------------- many lengths at once

// Tokens of one sequence, of tensors (tokens, H, D), as a batch.
template <class T>
Heads<T> sequence_of(const Tensor& tokens, int64_t first) {
  return {data<T>(tokens) + first * tokens.stride(0), 0, tokens.stride(1), tokens.stride(0),
          tokens.stride(2)};
}

// Calls body(queries, keys) for the tokens of each sequence.
template <class Body>
void each_sequence(const Tensor& query, const Tensor& key, const Tensor& query_ends, const Tensor& key_ends,
                   Body&& body) {
  const int64_t count = query_ends.numel();
  const int32_t *const of_queries = data<const int32_t>(query_ends), *const of_keys =
                                                                         data<const int32_t>(key_ends);
  const auto divide = [&](const int32_t* ends, int64_t tokens) {
    return ends[0] == 0 && ends[count - 1] == tokens && std::is_sorted(ends, ends + count);
  };
  STD_TORCH_CHECK(count > 0 && key_ends.numel() == count && divide(of_queries, query.size(0)) &&
                      divide(of_keys, key.size(0)),
                  "attention_varlen: the ends of sequences must go from 0 to all tokens and never decrease");
  for (int64_t s = 0; s + 1 < count; ++s)
    body(Span{of_queries[s], of_queries[s + 1]}, Span{of_keys[s], of_keys[s + 1]});
}

AttentionShape shape_of_sequence(const Tensor& query, const Tensor& key, const Tensor& value, Span queries,
                                 Span keys) {
  return {1, query.size(1), key.size(1), queries.size(), keys.size(), query.size(2), value.size(2)};
}

AttentionPattern pattern_of_sequence(const Numbers& numbers, Span queries, Span keys, bool at_end) {
  AttentionPattern pattern = pattern_of({}, {}, {}, numbers);
  if (at_end) pattern.query_offset = keys.size() - queries.size();
  return pattern;
}

void varlen_forward(const Tensor& out, const Tensor& lse, const Tensor& query, const Tensor& key,
                    const Tensor& value, const Tensor& query_ends, const Tensor& key_ends,
                    const MaybeTensor& sinks, const Tensor& numbers, bool at_end) {
  with_element_type("attention_varlen_forward", query, [&](auto element) {
    using T = decltype(element);
    std::vector<AttentionForward<T>> calls;
    each_sequence(query, key, query_ends, key_ends, [&](Span queries, Span keys) {
      calls.push_back({shape_of_sequence(query, key, value, queries, keys),
                       pattern_of_sequence(Numbers::of(numbers), queries, keys, at_end),
                       scores_of<T>({}, sinks, {}, {}, 0, Numbers::of(numbers)),
                       sequence_of<const T>(query, queries.begin), sequence_of<const T>(key, keys.begin),
                       sequence_of<const T>(value, keys.begin), sequence_of<T>(out, queries.begin),
                       data<float>(lse) + queries.begin, query.size(0)});
    });
    run_forward<T>(calls, out);
  });
}

void varlen_backward(const MaybeTensor& query_grad, const MaybeTensor& key_grad,
                     const MaybeTensor& value_grad, const Tensor& out_grad, const MaybeTensor& lse_grad,
                     const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
                     const Tensor& lse, const Tensor& query_ends, const Tensor& key_ends,
                     const MaybeTensor& sinks, const Tensor& numbers, bool at_end) {
  with_element_type("attention_varlen_backward", query, [&](auto element) {
    using T = decltype(element);
    const auto grad = [](const MaybeTensor& tensor, int64_t first) {
      return tensor ? sequence_of<T>(*tensor, first) : Heads<T>{};
    };
    std::vector<AttentionBackward<T>> calls;
    each_sequence(query, key, query_ends, key_ends, [&](Span queries, Span keys) {
      calls.push_back({shape_of_sequence(query, key, value, queries, keys),
                       pattern_of_sequence(Numbers::of(numbers), queries, keys, at_end),
                       scores_of<T>({}, sinks, {}, {}, 0, Numbers::of(numbers)),
                       sequence_of<const T>(query, queries.begin),
                       sequence_of<const T>(key, keys.begin),
                       sequence_of<const T>(value, keys.begin),
                       sequence_of<const T>(out, queries.begin),
                       sequence_of<const T>(out_grad, queries.begin),
                       data<const float>(lse) + queries.begin,
                       lse_grad ? data<const float>(*lse_grad) + queries.begin : nullptr,
                       query.size(0),
                       grad(query_grad, queries.begin),
                       grad(key_grad, keys.begin),
                       grad(value_grad, keys.begin),
                       {},
                       false});
    });
    Scratch scratch{out};
    attention_backward<T>(calls, std::ref(scratch), int64_t(torch::stable::get_num_threads()),
                          on_torch_threads);
  });
}

// Each batch entry's first query stands at its own position.
void decode(const Tensor& out, const Tensor& lse, const Tensor& query, const Tensor& key, const Tensor& value,
            const Tensor& positions, const MaybeTensor& sinks, const Tensor& numbers) {
  with_element_type("attention_decode", query, [&](auto element) {
    using T = decltype(element);
    const auto entry = [](auto heads, int64_t b) {
      heads.data = heads.at(b, 0);
      return heads;
    };
    std::vector<AttentionForward<T>> calls;
    for (int64_t b = 0; b < query.size(0); ++b) {
      AttentionShape shape = shape_of(query, key, value.size(3));
      AttentionPattern pattern = pattern_of({}, {}, {}, Numbers::of(numbers));
      shape.batch = 1;
      pattern.query_offset = data<const int32_t>(positions)[b];
      shape.keys = std::clamp<int64_t>(pattern.query_offset + shape.queries, 0, shape.keys);
      calls.push_back({shape, pattern, scores_of<T>({}, sinks, {}, {}, 0, Numbers::of(numbers)),
                       entry(heads_of<const T>(query), b), entry(heads_of<const T>(key), b),
                       entry(heads_of<const T>(value), b), entry(heads_of<T>(out), b),
                       data<float>(lse) + b * shape.heads * shape.queries, shape.queries});
    }
    run_forward<T>(calls, out);
  });
}

}  // namespace
}  // namespace pyarch

#define EXTRAS                                                                                              \
  "Tensor? mask, Tensor? bias, Tensor? padding, Tensor? global_mask, Tensor? sinks, Tensor? seed, Tensor? " \
  "distance_bias, Tensor numbers"

STABLE_TORCH_LIBRARY_FRAGMENT(PYARCH_NAMESPACE, library) {
  library.def(
      "attention_forward(Tensor(a!) out, Tensor(b!) lse, Tensor query, Tensor key, Tensor "
      "value, " EXTRAS ") -> ()");
  library.def(
      "attention_forward_and_weights(Tensor(a!) out, Tensor(b!) lse, Tensor(c!)? weights, Tensor query, "
      "Tensor key, Tensor value, " EXTRAS ") -> ()");
  library.def(
      "attention_backward(Tensor(a!)? query_grad, Tensor(b!)? key_grad, Tensor(c!)? value_grad, Tensor(d!)? "
      "bias_grad, bool first_bias_grad, Tensor(e!)? distance_grad, Tensor out_grad, Tensor? lse_grad, Tensor "
      "query, Tensor key, Tensor "
      "value, Tensor out, "
      "Tensor lse, " EXTRAS ") -> ()");
  library.def(
      "attention_varlen_forward(Tensor(a!) out, Tensor(b!) lse, Tensor query, Tensor key, Tensor value, "
      "Tensor "
      "query_ends, Tensor key_ends, Tensor? sinks, Tensor numbers, bool at_end) -> ()");
  library.def(
      "attention_varlen_backward(Tensor(a!)? query_grad, Tensor(b!)? key_grad, Tensor(c!)? value_grad, "
      "Tensor "
      "out_grad, Tensor? lse_grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor "
      "query_ends, Tensor key_ends, Tensor? sinks, Tensor numbers, bool at_end) -> ()");
  library.def(
      "attention_decode(Tensor(a!) out, Tensor(b!) lse, Tensor query, Tensor key, Tensor value, Tensor "
      "positions, Tensor? sinks, Tensor numbers) -> ()");
  library.def("attention_weights(Tensor(a!) weights, Tensor query, Tensor key, Tensor lse, bool mean, " EXTRAS
              ") -> ()");
}

#if defined(__AMX_BF16__)

STABLE_TORCH_LIBRARY_FRAGMENT(PYARCH_NAMESPACE, library) { library.def("permit_tile_registers() -> bool"); }

STABLE_TORCH_LIBRARY_IMPL(PYARCH_NAMESPACE, CompositeExplicitAutograd, library) {
  library.impl("permit_tile_registers", TORCH_BOX(&pyarch::permit_tile_registers));
}

#endif

STABLE_TORCH_LIBRARY_IMPL(PYARCH_NAMESPACE, CPU, library) {
  library.impl("attention_forward", TORCH_BOX(&pyarch::forward));
  library.impl("attention_forward_and_weights", TORCH_BOX(&pyarch::forward_and_weights));
  library.impl("attention_backward", TORCH_BOX(&pyarch::backward));
  library.impl("attention_varlen_forward", TORCH_BOX(&pyarch::varlen_forward));
  library.impl("attention_varlen_backward", TORCH_BOX(&pyarch::varlen_backward));
  library.impl("attention_decode", TORCH_BOX(&pyarch::decode));
  library.impl("attention_weights", TORCH_BOX(&pyarch::weights));
}
