"""The online softmax of attention's forward, which the dense kernel and that of decoding share.

With the running maximum m (`highest`) and sum l (`total`) of a row, in base 2, a tile of keys gives

    m' = max(m, max_j score_j),    l' = l exp2(m - m') + sum_j exp2(score_j - m')

and what is summed along with l is scaled like it (sources: attention_forward).
"""

import triton
import triton.language as tl

from .attention_mask import LN2


@triton.jit
def exponent_base(highest):
    """What scores are measured from: of rows that have seen nothing, -inf - -inf would be NaN."""
    return tl.where(highest == float("-inf"), 0.0, highest)


@triton.jit
def online_softmax(scores, factor, highest, total):
    """(exp2(score - m'), exp2(m - m'), m', l') of one more tile of scores, times `factor` in base 2."""
    next_highest = tl.maximum(highest, tl.max(scores, 1) * factor)
    base = exponent_base(next_highest)
    p = tl.math.exp2(scores * factor - base[:, None])
    rescale = tl.math.exp2(highest - base)
    return p, rescale, next_highest, total * rescale + tl.sum(p, 1)


@triton.jit
def weight_and_lse(highest, total, keep_scale):
    """(keep_scale / l, lse as a natural logarithm) of finished rows; 0 and -inf of those that saw nothing."""
    blind = total == 0.0
    total = tl.where(blind, 1.0, total)
    lse = tl.where(blind, float("-inf"), (highest + tl.math.log2(total)) * LN2)
    return tl.where(blind, 0.0, keep_scale / total), lse
