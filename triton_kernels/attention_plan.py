"""From tensors to the launches of attention's forward and of its weights.

Plans need shapes, strides and dtypes only, so meta tensors do: the compile audit builds the same launches as
a call. Legend: see attention_mask.
"""

from dataclasses import replace

from torch import Tensor

from .attention_call import Call, Starts, alignment_of, extras_named, starts_named, strides_named, tiles_of
from .attention_forward import attention_forward_kernel
from .attention_tiles import pieces_of
from .attention_weights import attention_weights_kernel
from .launch import Launch


def arguments_of(kernel, *sources: dict) -> dict:
    """Those of the sources' entries that a kernel takes."""
    named = {name: value for source in sources for name, value in source.items()}
    return {name: named[name] for name in kernel.arg_names if name in named}


def plan_forward(
    call: Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    extras,
    out: Tensor,
    lse: Tensor,
    starts: Starts | None = None,
) -> Launch:
    """The one launch of the forward."""
    tile = call.tile("forward")
    blocks = tiles_of(call, call.queries, tile.block_m)
    (block_d, rest_d), (block_dv, rest_dv) = pieces_of(call.head_dim), pieces_of(call.value_dim)
    plain = not (call.has_bias or extras.padding is not None or call.softcap)
    named = extras_named(extras, call) | call.numbers() | starts_named(starts)
    named |= strides_named(query, "q", "bhtd") | strides_named(key, "k", "bhtd")
    named |= strides_named(value, "v", "bhtd") | strides_named(out, "o", "bhtd")
    named |= dict(
        q_ptr=query, k_ptr=key, v_ptr=value, sinks_ptr=extras.sinks, out_ptr=out, lse_ptr=lse, blocks=blocks
    )
    return Launch(
        kernel=attention_forward_kernel,
        grid=call.batch * call.heads * blocks,
        arguments=arguments_of(attention_forward_kernel, named),
        constants=call.flags() | dict(
            D=call.head_dim, DV=call.value_dim, FOLDED=plain and call.scale >= 0, AT_END=call.at_end,
            PRECISION=call.precision, ALIGN=alignment_of(query, key, value),
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            BLOCK_D=block_d, REST_D=rest_d, BLOCK_DV=block_dv, REST_DV=rest_dv,
        ),
        options=tile.options(),
    )  # fmt: skip


def plan_weights(
    call: Call, query: Tensor, key: Tensor, lse: Tensor, extras, weights: Tensor, mean: bool
) -> Launch:
    """The one launch that writes the weights; `mean` says whether a program adds all heads."""
    tile = call.tile("weights")
    # Every weight is written, whatever its residue class.
    call = replace(call, tiles_of_neighbours=True)
    row_blocks, col_blocks = -(-call.queries // tile.block_m), -(-call.keys // tile.block_n)
    block_d, rest_d = pieces_of(call.head_dim)
    named = extras_named(extras, call) | call.numbers()
    named |= strides_named(query, "q", "bhtd") | strides_named(key, "k", "bhtd")
    named |= strides_named(lse, "l", "bht")
    named |= dict(
        q_ptr=query, k_ptr=key, lse_ptr=lse, weights_ptr=weights, heads=call.heads if mean else 1,
        row_blocks=row_blocks, col_blocks=col_blocks,
    )  # fmt: skip
    return Launch(
        kernel=attention_weights_kernel,
        grid=call.batch * (1 if mean else call.heads) * row_blocks * col_blocks,
        arguments=arguments_of(attention_weights_kernel, named),
        constants=call.flags() | dict(
            D=call.head_dim, PRECISION=call.precision, ALIGN=alignment_of(query, key),
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_D=block_d, REST_D=rest_d,
        ),
        options=tile.options(),
    )  # fmt: skip
