// What the bindings of every family share: they unpack tensors into pointers, and lend torch's threads to the kernels.
//
// Kernels are bound through torch's stable ABI, each family in a file of its own. The operator namespace is a macro: one
// a library, so that every instruction set's kernels can be loaded side by side.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "vec.h"

namespace pyarch {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Integers = std::vector<int64_t>;

inline void on_torch_threads(int64_t tasks, const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(0, tasks, 1, body);
}

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

template <class T>
T* data(const std::optional<Tensor>& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

// Memory for a kernel to work in, from torch's allocator, as long as this lives.
struct Scratch {
  const Tensor& beside;
  std::optional<Tensor> memory = {};

  void* operator()(int64_t bytes) {
    memory = torch::stable::new_empty(beside, {bytes}, ScalarType::Byte);
    return data<void>(*memory);
  }
};

// Calls body with a value of the element type that the tensor holds; `caller` is named where it holds another.
template <class Body>
void with_element_type(const char* caller, const Tensor& tensor, Body&& body) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::BFloat16:
      return body(bfloat16{});
    case ScalarType::Half:
      return body(float16{});
    default:
      STD_TORCH_CHECK(false, caller, ": needs float32, bfloat16 or float16");
  }
}

}  // namespace pyarch
