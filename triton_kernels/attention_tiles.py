"""How the attention kernels cut a head's width into pieces, and read rows of queries, keys and values.

The sides of a matrix product are powers of two, so a width is padded to one, or to two pieces where these
waste less: 80 is 64 + 16, 96 is 64 + 32, 192 is 128 + 64. Legend: see attention_mask.
"""

import triton
import triton.language as tl

NARROWEST = 16


def pieces_of(width: int) -> tuple[int, int]:
    """(first, second) powers of two that hold a width together; second is 0 where one does as well."""
    whole = max(triton.next_power_of_2(width), NARROWEST)
    first = whole // 2
    second = max(triton.next_power_of_2(width - first), NARROWEST) if width > first else whole
    return (first, second) if NARROWEST <= first and first + second < whole else (whole, 0)


@triton.jit
def load_piece(ptr, offsets, exist, stride_d, D: tl.constexpr, BEGIN: tl.constexpr, WIDTH: tl.constexpr):
    """Columns BEGIN to BEGIN + WIDTH of the rows at `offsets` (int64), in their own type. [rows, WIDTH]

    Zero beyond D, and where `exist` [rows] is False; None says that all rows exist.
    """
    columns = BEGIN + tl.arange(0, WIDTH)
    pointers = ptr + offsets[:, None] + columns.to(tl.int64)[None, :] * stride_d
    if exist is None:
        if BEGIN + WIDTH <= D:
            piece = tl.load(pointers)
        else:
            piece = tl.load(pointers, mask=(columns < D)[None, :], other=0.0)
    elif BEGIN + WIDTH <= D:
        piece = tl.load(pointers, mask=exist[:, None], other=0.0)
    else:
        piece = tl.load(pointers, mask=exist[:, None] & (columns < D)[None, :], other=0.0)
    return piece


@triton.jit
def store_piece(
    ptr, value, offsets, exist, stride_d, D: tl.constexpr, BEGIN: tl.constexpr, WIDTH: tl.constexpr
):
    """Write what `load_piece` would read, rounded to the pointer's type."""
    columns = BEGIN + tl.arange(0, WIDTH)
    pointers = ptr + offsets[:, None] + columns.to(tl.int64)[None, :] * stride_d
    inside = exist[:, None] & (columns < D)[None, :]
    tl.store(pointers, value.to(ptr.dtype.element_ty), mask=inside)
