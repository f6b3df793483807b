// Attention on the CPU: softmax(scale * q k^T + ...) v without ever holding all scores, and its gradients.
//
// B batch, H heads, Hk key and value heads (query head h reads h / (H / Hk)), Tq queries, Tk keys, D and Dv sizes of a
// head. Scores, sums and everything inside are float32; results are rounded once. Nothing depends on the number of
// threads but the order in which a query's gradient is summed over key ranges, which is fixed for a number of threads.
//
// No function here knows torch; scratch comes from the caller, threads come through `ParallelFor`.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <span>

#include "parallel.h"
#include "vec.h"

namespace pyarch {

constexpr int64_t UNBOUNDED = std::numeric_limits<int64_t>::max() / 4;

struct AttentionShape {
  int64_t batch, heads, kv_heads, queries, keys, head_dim, value_dim;

  int64_t group() const { return heads / kv_heads; }
};

// A tensor (B, H, T, D) of any strides, in elements.
template <class T>
struct Heads {
  T* data;
  int64_t batch_stride, head_stride, row_stride, column_stride;

  T* at(int64_t b, int64_t h) const { return data + b * batch_stride + h * head_stride; }
};

// A tensor (B, H, Tq, Tk) of which any stride may be 0, or none.
template <class T>
struct PerScore {
  T* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0, query_stride = 0, key_stride = 0;

  T* at(int64_t b, int64_t h, int64_t i) const {
    return data + b * batch_stride + h * head_stride + i * query_stride;
  }
};

// A tensor (B, T) of booleans, or none.
struct PerToken {
  const uint8_t* data = nullptr;
  int64_t batch_stride = 0, token_stride = 0, tokens = 0;

  bool at(int64_t b, int64_t t) const {
    return t >= 0 && t < tokens && data[b * batch_stride + t * token_stride];
  }
};

// Which keys a query may see. Query i stands at position i + query_offset.
struct AttentionPattern {
  bool is_causal;
  int64_t left, right, dilation;  // UNBOUNDED, or a window in steps of the dilation
  int64_t global_tokens, query_offset;
  PerScore<const uint8_t> mask;  // true: may see
  PerToken padding;              // true: nobody sees this key
  PerToken global;               // true: sees all and is seen by all
};

// What is done to scores and probabilities. Biases and sinks are of either type.
template <class T>
struct AttentionScores {
  float scale, softcap;  // softcap 0: none
  PerScore<const T> bias;
  PerScore<const float> float_bias;
  PerScore<const float> distance_bias;  // query_stride -1, key_stride 1: one number for every j - i
  const float* sinks;                   // (H,) or null
  double dropout;                       // 0 <= dropout < 1
  uint64_t seed;
};

template <class T>
struct AttentionForward {
  AttentionShape shape;
  AttentionPattern pattern;
  AttentionScores<T> scores;
  Heads<const T> query, key, value;
  Heads<T> out;               // rows of neighbouring elements
  float* lse;                 // (B, H, Tq), natural logarithm
  int64_t lse_stride;         // of heads; those of a batch entry lie behind those of the one before
  T* weights = nullptr;       // (B, H, Tq, Tk), what the values are weighed with; or none
  bool mean_weights = false;  // or their mean over heads, (B, Tq, Tk)
};

// Gradients that nobody needs are null. Every row of query_grad, key_grad and value_grad has neighbouring elements.
template <class T>
struct AttentionBackward {
  AttentionShape shape;
  AttentionPattern pattern;
  AttentionScores<T> scores;
  Heads<const T> query, key, value, out, out_grad;
  const float* lse;
  const float* lse_grad;  // as lse, or null
  int64_t lse_stride;     // of heads
  Heads<T> query_grad, key_grad, value_grad;
  PerScore<float> bias_grad;  // holding zeros; a stride 0 sums
  bool first_bias_grad;       // or holding nothing: every score is met, once
  float* distance_grad;       // (B, H, Tq + Tk - 1), the most negative j - i first, or null
};

template <class T>
struct AttentionWeights {
  AttentionShape shape;
  AttentionPattern pattern;
  AttentionScores<T> scores;
  Heads<const T> query, key;
  const float* lse;
  T* weights;  // (B, H, Tq, Tk), or the mean over heads (B, Tq, Tk)
  bool mean;
};

// Many calls at once, of which only the lengths and the pattern differ: all threads share all of them.
template <class T>
void attention_forward(std::span<const AttentionForward<T>> calls, const GiveScratch& scratch,
                       int64_t threads, const ParallelFor& parallel);
// For few queries a key head, which see keys by causality and window alone; the forward above chooses it.
template <class T>
bool is_direct(const AttentionForward<T>& args);
template <class T>
void attention_direct(std::span<const AttentionForward<T>> calls, const GiveScratch& scratch, int64_t threads,
                      const ParallelFor& parallel);
// Biases have a gradient only where there is one call.
template <class T>
void attention_backward(std::span<const AttentionBackward<T>> calls, const GiveScratch& scratch,
                        int64_t threads, const ParallelFor& parallel);
template <class T>
void attention_weights(const AttentionWeights<T>& args, const GiveScratch& scratch, int64_t threads,
                       const ParallelFor& parallel);

}  // namespace pyarch
