// Binds the product of two matrices; see bindings.h and gemm.h.
#include "gemm.h"

#include "bindings.h"

namespace pyarch {
namespace {

template <class T>
Operand<T> operand(const Tensor& matrix) {
  return {data<T>(matrix), matrix.stride(0), matrix.stride(1)};
}

// out = a @ b (+ bias, in float32) (+ out). Strides say what is transposed.
void matmul(const Tensor& out, const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias,
            bool accumulate) {
  const GemmShape shape{out.size(0), out.size(1), a.size(1)};
  STD_TORCH_CHECK(a.size(0) == shape.m && b.size(0) == shape.k && b.size(1) == shape.n,
                  "matmul: needs out (m, n), a (m, k), b (k, n)");
  STD_TORCH_CHECK(shape.n <= 1 || out.stride(1) == 1, "matmul: needs rows of out without gaps");
  STD_TORCH_CHECK(b.scalar_type() == a.scalar_type(), "matmul: needs a and b of one dtype");
  STD_TORCH_CHECK(!bias || (bias->scalar_type() == ScalarType::Float && bias->is_contiguous() &&
                            bias->numel() == shape.n),
                  "matmul: needs a contiguous float32 bias (n)");
  const int64_t threads = torch::stable::get_num_threads();
  with_element_type("matmul", a, [&](auto element) {
    using T = decltype(element);
    const auto multiply_into = [&](auto out_element) {
      using Out = decltype(out_element);
      Scratch scratch{a};
      gemm<T, Out>(shape, operand<T>(a), operand<T>(b), data<float>(bias), accumulate,
                   {data<Out>(out), out.stride(0)}, scratch(gemm_scratch_bytes<T, Out>(shape, threads)),
                   threads, on_torch_threads);
    };
    if (out.scalar_type() == ScalarType::Float) return multiply_into(float{});
    STD_TORCH_CHECK(out.scalar_type() == a.scalar_type(), "matmul: needs out in float32 or the dtype of a");
    multiply_into(element);
  });
}

}  // namespace
}  // namespace pyarch

STABLE_TORCH_LIBRARY_FRAGMENT(PYARCH_NAMESPACE, library) {
  library.def("matmul(Tensor(a!) out, Tensor a, Tensor b, Tensor? bias, bool accumulate) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(PYARCH_NAMESPACE, CPU, library) {
  library.impl("matmul", TORCH_BOX(&pyarch::matmul));
}
