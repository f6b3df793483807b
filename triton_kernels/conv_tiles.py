"""Tiles of a depthwise convolution: how a program's lanes map to positions, and how columns come and go.

Legend (this folder's convolution files):
    N batch, C channels (of the tensor at hand), D H W input size, OD OH OW output size; 1-D and 2-D inputs
    have D = H = 1 or D = 1. Taps KD KH KW, strides SD SH SW, dilations DD DH DW, padding before PD PH PW. A
    *strip* is TW adjacent columns of one row (n, d, h); a *lane* is one strip of one channel.

A tile has BLOCK_P strips and BLOCK_C channels. Its shape is [BLOCK_P, BLOCK_C] when channels are adjacent
in memory (C_LAST) and [BLOCK_C, BLOCK_P] otherwise, so that the last dimension is always the one adjacent
in memory. Every lane holds its TW columns as a Python tuple of TW tiles: windows slide over columns in
registers, because a column's number is known when the kernel is compiled.

How columns reach memory (ACCESS, chosen on the host for each tensor):
    SCATTERED   any strides, one column at a time;
    CHANNELS    one column at a time, whose channels are adjacent and 16-byte aligned;
    WIDTH       COUNT columns at once, adjacent and aligned, none straddling the row's end;
    PACKED      (stores) COUNT columns at once, adjacent, alignment unknown.
"""

import triton
import triton.language as tl

SCATTERED = tl.constexpr(0)
CHANNELS = tl.constexpr(1)
WIDTH = tl.constexpr(2)
PACKED = tl.constexpr(3)

ZEROS = tl.constexpr(0)
REFLECT = tl.constexpr(1)
REPLICATE = tl.constexpr(2)
CIRCULAR = tl.constexpr(3)


@triton.jit
def source_index(q, size, MODE: tl.constexpr):
    """Index that padded position q reads along a dimension of that size, and whether it reads memory at
    all."""
    if MODE == REFLECT:
        index = tl.where(q < 0, -q, tl.where(q >= size, 2 * (size - 1) - q, q))
    elif MODE == REPLICATE:
        index = tl.minimum(tl.maximum(q, 0), size - 1)
    elif MODE == CIRCULAR:
        index = tl.where(q < 0, q + size, tl.where(q >= size, q - size, q))
    else:
        index = q
    return index, (index >= 0) & (index < size)


@triton.jit
def padded_image(i, image, size, BEFORE: tl.constexpr, AFTER: tl.constexpr, MODE: tl.constexpr):
    """The padded position number `image` that reads index i (0 is i itself), and whether there is one.

    The inverse of `source_index`: images 1 and 2 mirror or wrap the index; under "replicate" images 1 ..
    BEFORE copy the first index and BEFORE + 1 .. BEFORE + AFTER the last.
    """
    if MODE == REFLECT:
        q = tl.where(image == 0, i, tl.where(image == 1, -i, 2 * (size - 1) - i))
        before = (image == 1) & (i >= 1) & (i <= BEFORE)
        after = (image == 2) & (i <= size - 2) & (i >= size - 1 - AFTER)
        exists = (image == 0) | before | after
    elif MODE == REPLICATE:
        q = tl.where(image == 0, i, tl.where(image <= BEFORE, -image, size - 1 + image - BEFORE))
        before = (image <= BEFORE) & (i == 0)
        after = (image > BEFORE) & (i == size - 1)
        exists = (image == 0) | before | after
    elif MODE == CIRCULAR:
        q = i + tl.where(image == 0, 0, tl.where(image == 1, -size, size))
        exists = (q >= -BEFORE) & (q < size + AFTER)
    else:
        q = i
        exists = i >= 0
    return q, exists & (i >= 0) & (i < size)


@triton.jit
def dividend_index(z, size, STEP: tl.constexpr):
    """z // STEP where STEP divides z and the quotient lies in 0 .. size - 1; else not valid."""
    quotient = z // STEP
    return quotient, (z >= 0) & (z % STEP == 0) & (quotient < size)


@triton.jit
def along_positions(lanes, C_LAST: tl.constexpr):
    """Per-strip values [BLOCK_P] shaped to broadcast over a tile."""
    return lanes[:, None] if C_LAST else lanes[None, :]


@triton.jit
def along_channels(lanes, C_LAST: tl.constexpr):
    """Per-channel values [BLOCK_C] shaped to broadcast over a tile."""
    return lanes[None, :] if C_LAST else lanes[:, None]


@triton.jit
def strip_positions(block, total, depth, height, strips, BLOCK_P: tl.constexpr, C_LAST: tl.constexpr):
    """(n, d, h, strip, valid) of the strips of one block; strips run fastest, then rows, planes and
    images."""
    flat = block * BLOCK_P + tl.arange(0, BLOCK_P)
    rows = flat // strips
    planes = rows // height
    return (
        along_positions(planes // depth, C_LAST),
        along_positions(planes % depth, C_LAST),
        along_positions(rows % height, C_LAST),
        along_positions(flat % strips, C_LAST),
        along_positions(flat < total, C_LAST),
    )


@triton.jit
def channel_lanes(block, channels, BLOCK_C: tl.constexpr, VECTOR: tl.constexpr, C_LAST: tl.constexpr):
    """Channel numbers of one block and whether they exist; `channels` is a multiple of VECTOR."""
    lanes = block * BLOCK_C + tl.arange(0, BLOCK_C)
    # Comparing whole vectors tells the compiler that a mask never splits one.
    valid = (lanes // VECTOR) * VECTOR < channels
    return along_channels(lanes, C_LAST), along_channels(valid, C_LAST)


@triton.jit
def unpack(tile, ROWS: tl.constexpr, LANES: tl.constexpr, COUNT: tl.constexpr):
    """[ROWS, LANES, COUNT] as a tuple of COUNT tiles [ROWS, LANES]; stays in registers."""
    if COUNT == 1:
        return (tl.reshape(tile, [ROWS, LANES]),)
    else:
        even, odd = tl.split(tl.reshape(tile, [ROWS, LANES, COUNT // 2, 2]))
        evens = unpack(even, ROWS, LANES, COUNT // 2)
        odds = unpack(odd, ROWS, LANES, COUNT // 2)
        columns = ()
        for i in tl.static_range(COUNT // 2):
            columns = columns + (evens[i], odds[i])
        return columns


@triton.jit
def pack(columns, ROWS: tl.constexpr, LANES: tl.constexpr, COUNT: tl.constexpr):
    """The inverse of `unpack`."""
    if COUNT == 1:
        return tl.reshape(columns[0], [ROWS, LANES, 1])
    else:
        evens = pack(columns[0::2], ROWS, LANES, COUNT // 2)
        odds = pack(columns[1::2], ROWS, LANES, COUNT // 2)
        return tl.reshape(tl.join(evens, odds), [ROWS, LANES, COUNT])


@triton.jit
def zero_columns(ROWS: tl.constexpr, LANES: tl.constexpr, COUNT: tl.constexpr):
    """COUNT fp32 tiles of zeros."""
    columns = ()
    for _ in tl.static_range(COUNT):
        columns = columns + (tl.zeros([ROWS, LANES], tl.float32),)
    return columns


@triton.jit
def whole_vectors(offsets, COUNT: tl.constexpr):
    """The same offsets, all multiples of COUNT, written so that AMD's compiler keeps the knowledge as
    well."""
    return offsets // COUNT * COUNT


@triton.jit
def load_columns(
    base_ptr, row, row_valid, first, size, stride,
    COUNT: tl.constexpr, ACCESS: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Columns first .. first + COUNT - 1 of each lane's row in fp32, 0 where invalid, and the lanes'
    validity.

    row: tile of offsets of column 0 from base_ptr; first: per-strip column numbers. COUNT is 1 unless
    ACCESS is WIDTH, and then `first` and `size` are multiples of COUNT, so that one validity serves all
    COUNT columns.
    """
    index, inside = source_index(first, size, MODE)
    valid = row_valid & inside
    if ACCESS == WIDTH:
        offsets = whole_vectors(row, COUNT) + index.to(tl.int64)
        wide = offsets[:, :, None] + tl.arange(0, COUNT)[None, None, :]
        pointers = base_ptr + tl.multiple_of(wide, [1, 1, COUNT])
        tile = tl.load(pointers, mask=valid[:, :, None], other=0.0)
        columns = unpack(tile.to(tl.float32), row.shape[0], row.shape[1], COUNT)
    else:
        offsets = row + index.to(tl.int64) * stride
        if ACCESS == CHANNELS:
            offsets = tl.multiple_of(offsets, [1, 128 // base_ptr.dtype.element_ty.primitive_bitwidth])
        columns = (tl.load(base_ptr + offsets, mask=valid, other=0.0).to(tl.float32),)
    return columns, valid


@triton.jit
def load_strip(
    base_ptr, row, row_valid, first, size, stride,
    TW: tl.constexpr, COUNT: tl.constexpr, ACCESS: tl.constexpr,
):  # fmt: skip
    """All TW columns of each lane's strip, in chunks of COUNT, and the validity of each column."""
    columns = ()
    valids = ()
    for chunk in tl.static_range(TW // COUNT):
        chunk_first = first + chunk * COUNT
        loaded, valid = load_columns(
            base_ptr, row, row_valid, chunk_first, size, stride, COUNT, ACCESS, ZEROS
        )
        columns = columns + loaded
        for _ in tl.static_range(COUNT):
            valids = valids + (valid,)
    return columns, valids


@triton.jit
def store_columns(
    columns, base_ptr, row, row_valid, first, size, stride, TW: tl.constexpr, ACCESS: tl.constexpr
):
    """Round the TW columns of each lane's strip to the tensor's dtype and store those inside the row."""
    ELEMENT: tl.constexpr = base_ptr.dtype.element_ty
    if ACCESS == WIDTH or ACCESS == PACKED:
        number = tl.arange(0, TW)[None, None, :]
        row = whole_vectors(row, TW) if ACCESS == WIDTH else row
        offsets = (row + first.to(tl.int64))[:, :, None] + number
        if ACCESS == WIDTH:
            offsets = tl.multiple_of(offsets, [1, 1, TW])
            valid = (row_valid & (first < size))[:, :, None]
        else:
            valid = row_valid[:, :, None] & (first[:, :, None] + number < size)
        tile = pack(columns, row.shape[0], row.shape[1], TW)
        tl.store(base_ptr + offsets, tile.to(ELEMENT), mask=valid)
    else:
        for t in tl.static_range(TW):
            column = first + t
            offsets = row + column.to(tl.int64) * stride
            if ACCESS == CHANNELS:
                offsets = tl.multiple_of(offsets, [1, 128 // ELEMENT.primitive_bitwidth])
            tl.store(base_ptr + offsets, columns[t].to(ELEMENT), mask=row_valid & (column < size))
