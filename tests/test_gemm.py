"""The matrix product under the C++ kernels, for each instruction set that this CPU has, held to float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyarch import hardware, native
from tests.compare import check

OPERATOR = "matmul"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = {  # what stands in memory, and how the operand is a view of it
    "plain": lambda rows, columns, make: make(rows, columns),
    "transposed": lambda rows, columns, make: make(columns, rows).t(),
    "sliced": lambda rows, columns, make: make(rows + 2, columns + 3)[1:-1, 1:-2],
    "sliced transposed": lambda rows, columns, make: make(columns + 1, rows + 5)[1:, 2:-3].t(),
    "every second": lambda rows, columns, make: make(2 * rows, 2 * columns)[::2, ::2],
    "one row, repeated": lambda rows, columns, make: make(1, columns).expand(rows, columns),
}
TRANSPOSES = [(a, b) for a in ("plain", "transposed") for b in ("plain", "transposed")]
ODD_LAYOUTS = [
    ("sliced", "sliced transposed"),
    ("sliced transposed", "sliced"),
    ("every second", "every second"),
    ("one row, repeated", "one row, repeated"),
]
SHAPES = [  # m, n, k
    (1, 1, 1),
    (3, 5, 31),
    (5, 33, 3),
    (15, 31, 33),
    (13, 193, 1),
    (29, 65, 600),
    (33, 3, 1025),
    (1025, 1, 33),
    (1, 1025, 193),
    (193, 100, 257),
]
BLOCKS = (1200, 700, 531)  # more rows, and more sums that wait, than one block takes; three stretches of k

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(params=hardware.CPU_INSTRUCTION_SETS)
def matmul(request):
    """The operator of one instruction set, or a skip with what is missing."""
    if (problem := native.load(request.param)) is not None:
        pytest.skip(problem)
    return native.operators(request.param).matmul


def whole_numbers(dtype):
    """A maker of small whole numbers, whose products float32 adds without rounding, in any order."""
    return lambda *shape: torch.randint(-4, 5, shape).to(dtype)


def random_numbers(dtype):
    return lambda *shape: torch.randn(*shape).to(dtype)


def operands(shape, layouts, make):
    m, n, k = shape
    return LAYOUTS[layouts[0]](m, k, make), LAYOUTS[layouts[1]](k, n, make)


def check_product(matmul, shape, layouts, dtype, out_dtype):
    """Product, product with a bias, and product with a bias added to what is there."""
    a, b = operands(shape, layouts, random_numbers(dtype))
    m, n, _ = shape
    start, bias = torch.randn(m, n).to(out_dtype), torch.randn(n)
    plain, biased, added = (
        torch.empty(m, n, dtype=out_dtype),
        torch.empty(m, n, dtype=out_dtype),
        start.clone(),
    )
    matmul(plain, a, b, None, False)
    matmul(biased, a, b, bias, False)
    matmul(added, a, b, bias, True)

    exact = a.double() @ b.double()
    # Of one row or column torch may make dot products, each in many partial sums. Ours sums by k alone,
    # whatever m and n are, so torch's product of many rows and columns is what it is held to.
    stock = (a.float().repeat(16, 1) @ b.float().repeat(1, 16))[:m, :n]
    for name, ours, beside in (
        ("product", plain, torch.zeros(())),
        ("with bias", biased, bias),
        ("accumulated", added, bias + start.float()),
    ):
        check(name, ours, (stock + beside).to(out_dtype), exact + beside.double())


@each_dtype
@each_shape
@pytest.mark.parametrize("layouts", TRANSPOSES, ids=" ".join)
def test_gemm_against_float64(matmul, layouts, shape, dtype):
    check_product(matmul, shape, layouts, dtype, dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@each_shape
def test_gemm_keeps_float32_where_asked(matmul, shape, dtype):
    check_product(matmul, shape, ("plain", "transposed"), dtype, torch.float32)


@each_dtype
@pytest.mark.parametrize("layouts", ODD_LAYOUTS, ids=" by ".join)
def test_gemm_takes_any_strides(matmul, layouts, dtype):
    check_product(matmul, (37, 45, 71), layouts, dtype, dtype)


def check_exact(matmul, shape, layouts, dtype):
    """Sums of whole numbers are exact over the whole of k, and rounded once."""
    a, b = operands(shape, layouts, whole_numbers(dtype))
    m, n, _ = shape
    start, bias = torch.randint(-99, 100, (m, n)).to(dtype), torch.randint(-99, 100, (n,)).float()
    ours = start.clone()
    matmul(ours, a, b, bias, True)
    assert torch.equal(ours, (a.double() @ b.double() + bias.double() + start.double()).to(dtype))


@each_dtype
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(*[st.integers(1, 90)] * 2, st.integers(1, 700)),
    layouts=st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 2),
)
def test_gemm_drawn(matmul, dtype, shape, layouts):
    check_exact(matmul, shape, layouts, dtype)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("layouts", TRANSPOSES, ids=" ".join)
@each_dtype
def test_gemm_of_several_blocks(matmul, layouts, dtype, threads):
    torch.set_num_threads(threads)
    check_exact(matmul, BLOCKS, layouts, dtype)


@each_dtype
@pytest.mark.parametrize("shape", [(0, 5, 7), (5, 0, 7), (0, 0, 0)], ids=str)
def test_gemm_of_nothing_writes_nothing(matmul, shape, dtype):
    m, n, k = shape
    around = torch.full((m + 2, n + 2), 3.0, dtype=dtype)
    matmul(
        around[1:-1, 1:-1], torch.ones(m, k, dtype=dtype), torch.ones(k, n, dtype=dtype), torch.ones(n), False
    )
    assert torch.equal(around, torch.full_like(around, 3.0))


@each_dtype
def test_gemm_over_no_k_is_zero_or_what_is_added(matmul, dtype):
    a, b = torch.empty(20, 0, dtype=dtype), torch.empty(0, 37, dtype=dtype)
    start, bias = torch.randn(20, 37).to(dtype), torch.randn(37)
    out = torch.empty(20, 37, dtype=dtype)
    matmul(out, a, b, None, False)
    assert torch.equal(out, torch.zeros_like(out))
    matmul(out, a, b, bias, False)
    assert torch.equal(out, bias.to(dtype).expand(20, 37))
    out = start.clone()
    matmul(out, a, b, bias, True)
    assert torch.equal(out, (bias + start.float()).to(dtype))


@each_dtype
@pytest.mark.parametrize("shape", [(40, 45, 33), (7, 100, 600)], ids=str)
def test_gemm_writes_its_target_only(matmul, shape, dtype):
    m, n, _ = shape
    a, b = operands(shape, ("plain", "plain"), whole_numbers(dtype))
    around = torch.full((m + 2, n + 9), 3.0, dtype=dtype)
    out = around[1:-1, 4:-5]
    matmul(out, a, b, None, False)
    assert torch.equal(out, (a.double() @ b.double()).to(dtype))
    out.fill_(3.0)
    assert torch.equal(around, torch.full_like(around, 3.0))


@each_dtype
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layouts", TRANSPOSES, ids=" ".join)
def test_gemm_nan_stays_in_its_row_and_column(matmul, layouts, value, dtype):
    for shape in [(31, 37, 35), (5, 70, 1), (16, 33, 513)]:
        m, n, k = shape
        for row, column in ((0, n - 1), (m // 2, n // 2), (m - 1, 0)):
            a, b = operands(shape, layouts, whole_numbers(dtype))
            a[row, k - 1] = b[0, column] = value
            out = torch.empty(m, n, dtype=dtype)
            matmul(out, a, b, None, False)
            expected = (a.double() @ b.double()).to(dtype)
            assert not expected.isfinite().all() and expected.isfinite().any()
            assert torch.equal(out.nan_to_num(nan=9e4), expected.nan_to_num(nan=9e4))


@each_dtype
@pytest.mark.parametrize("layouts", TRANSPOSES, ids=" ".join)
def test_gemm_gives_the_same_bits_again_and_with_any_threads(matmul, layouts, dtype):
    shape = (301, 270, 700)
    a, b = operands(shape, layouts, random_numbers(dtype))
    results = []
    for threads in (1, 1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(torch.empty(*shape[:2], dtype=dtype))
        matmul(results[-1], a, b, torch.arange(270.0), False)
    assert all(torch.equal(results[0], other) for other in results[1:])


@each_dtype
def test_gemm_gives_a_row_the_same_bits_alone(matmul, dtype):
    """A row's sums do not depend on its neighbours: batched and single calls agree."""
    a, b = operands((30, 50, 300), ("plain", "transposed"), random_numbers(dtype))
    together, alone = torch.empty(30, 50, dtype=dtype), torch.empty(30, 50, dtype=dtype)
    matmul(together, a, b, None, False)
    for row in range(30):
        matmul(alone[row : row + 1], a[row : row + 1], b, None, False)
    assert torch.equal(together, alone)


ERRORS = {
    "shapes": (dict(a=torch.ones(4, 6)), r"needs out \(m, n\), a \(m, k\), b \(k, n\)"),
    "gaps": (dict(out=torch.ones(4, 6)[:, ::2]), "needs rows of out without gaps"),
    "two dtypes": (dict(b=torch.ones(5, 3, dtype=torch.float16)), "needs a and b of one dtype"),
    "float64": (
        dict(a=torch.ones(4, 5).double(), b=torch.ones(5, 3).double()),
        "matmul: needs float32, bfloat16 or float16",
    ),
    "out": (dict(out=torch.ones(4, 3).bfloat16()), "needs out in float32 or the dtype of a"),
    "bias dtype": (dict(bias=torch.ones(3).bfloat16()), r"needs a contiguous float32 bias \(n\)"),
    "bias size": (dict(bias=torch.ones(4)), r"needs a contiguous float32 bias \(n\)"),
}


@pytest.mark.parametrize("arguments, message", ERRORS.values(), ids=ERRORS)
def test_gemm_refuses(matmul, arguments, message):
    call = dict(out=torch.ones(4, 3), a=torch.ones(4, 5), b=torch.ones(5, 3), bias=None, accumulate=False)
    with pytest.raises(RuntimeError, match=message):
        matmul(**{**call, **arguments})
