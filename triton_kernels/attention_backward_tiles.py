"""One tile of attention's backward, which the kernels for dq, for dk and dv and for the bias share.

    P = exp(score - lse)              what the forward weighed values with, recomputed from q, k and lse
    ds = P * (dropout(dP) - delta)    the scores' gradient, dP = dout v^T, delta from attention_delta
    dproduct = ds * (1 - tanh^2)      with a softcap, else ds; dq and dk are made of scale * dproduct

(Dao et al., "FlashAttention", 2022, arXiv:2205.14135; Dao, "FlashAttention-2", 2023, arXiv:2307.08691.)

Queries that see nothing have lse = -inf and are given lse = +inf, with which P is zero, as those beyond Tq
are. What nothing sees may be NaN, which a zero beside it in a product does not remove: edge tiles test
visibility first, and leave rows of q, dout, k and v unread that are visible to nothing in the tile.

Legend: B, H query heads, Hk key heads, Tq, Tk, D, Dv; tiles [BLOCK_M queries, BLOCK_N keys].
"""

import triton
import triton.language as tl

from .attention_mask import LOG2E, cap, cap_slope, kept_tile, scores_in_base_2

# Whatever these are, one compilation serves.
UNSPECIALIZED = [
    "H", "Tq", "Tk", "T", "tiles", "left", "right", "ahead", "dilation", "query_offset", "global_tokens",
    "threshold", "bias_batches", "bias_heads", "shared_heads", "tiles_m", "tiles_n", "walked_m", "readers",
    "readers_each", "sequences",
]  # fmt: skip


@triton.jit
def load_residuals(lse_ptr, delta_ptr, rows, exist):
    """(lse * log2(e), delta) of queries `rows`, [BLOCK_M]; lse is +inf for those that see nothing.

    exist None says that all rows exist; delta_ptr None that no delta is wanted.
    """
    if exist is None:
        lse = tl.load(lse_ptr + rows)
    else:
        lse = tl.load(lse_ptr + rows, mask=exist, other=float("inf"))
    delta = tl.zeros_like(lse)
    if delta_ptr is not None:
        if exist is None:
            delta = tl.load(delta_ptr + rows)
        else:
            delta = tl.load(delta_ptr + rows, mask=exist, other=0.0)
    return tl.where(lse == float("-inf"), float("inf"), lse) * LOG2E, delta


@triton.jit
def score_gradients(
    product, dp, lse, delta, visible, alive, rows, cols, first_col, step, Tq, Tk,
    scale, softcap, bias_ptr, stride_bt, stride_bs, distance_ptr,
    seed, head, threshold, keep_scale,
    HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr, TESTED: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """(dropout(P), ds, dproduct) of one tile, each [BLOCK_M, BLOCK_N] float32.

    Args:
        product: q k^T; dp: dout v^T; lse, delta: from `load_residuals`.
        visible: of the tile, where TESTED.
        alive: None, or a test that broadcasts to the tile: ds is zero outside it.
        cols: keys, first_col + step * (0 ... BLOCK_N - 1).
        keep_scale: 1 / (1 - dropout_p).
    """
    scores = scores_in_base_2(
        product, rows, cols, Tq, Tk, scale, softcap, bias_ptr, stride_bt, stride_bs, distance_ptr,
        HAS_SOFTCAP, True,
    )  # fmt: skip
    p = tl.math.exp2(scores - lse[:, None])
    if TESTED:
        p = tl.where(visible, p, 0.0)
    used = p
    if HAS_DROPOUT:
        kept = kept_tile(seed, head, rows, first_col, step, threshold, CLASSES, cols.shape[0])
        used = tl.where(kept, p * keep_scale, 0.0)
        dp = tl.where(kept, dp * keep_scale, 0.0)
    ds = p * (dp - delta[:, None])
    dproduct = ds
    if HAS_SOFTCAP:
        dproduct = ds * cap_slope(cap(product * scale, softcap), softcap)
    # P is zero where nothing is visible, but what multiplies it may be NaN there.
    if TESTED:
        ds = tl.where(visible, ds, 0.0)
        dproduct = tl.where(visible, dproduct, 0.0)
    if alive is not None:
        ds = tl.where(alive, ds, 0.0)
        dproduct = tl.where(alive, dproduct, 0.0)
    return used, ds, dproduct
