"""Attention's backward on Triton: which kernels run, with which tiles, and the host side.

One kernel makes delta, one dk and dv, one dq, one the gradient of a bias, one that of a bias of distances;
what nobody needs is not launched. No sum is made by atomics, so equal calls give equal bits. Legend: see
attention_backward_tiles; Hk key and value heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from .attention_backward_bias import attention_backward_bias_kernel
from .attention_backward_distance import attention_backward_distance_kernel
from .attention_backward_dkdv import attention_backward_dkdv_kernel
from .attention_backward_dq import attention_backward_dq_kernel
from .attention_call import (
    Call,
    Starts,
    alignment_of,
    broadcast_strides,
    extras_named,
    starts_named,
    strides_named,
    tiles_of,
)
from .attention_delta import attention_delta_kernel
from .attention_plan import arguments_of
from .attention_tiles import NARROWEST
from .launch import Launch

# Elements of out that one program of the delta kernel reads, and programs that share a small bias's readers.
DELTA_ELEMENTS = 4096
BIAS_PROGRAMS = 512

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def width_of(number: int) -> int:
    """The width of a tile that holds `number` columns."""
    return max(NARROWEST, 1 << max(number - 1, 0).bit_length())


@dataclass(frozen=True)
class Inputs:
    """What the kernels of dq, of dk and dv, and of the bias read; delta None where dv alone is wanted."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad_out: Tensor
    lse: Tensor
    delta: Tensor | None
    extras: tuple
    starts: Starts | None = None

    def launch(
        self, kernel, name: str, programs: int, call: Call, arguments: dict, constants: dict[str, bool]
    ) -> Launch:
        """A kernel with the tile of the table's row `name`, over so many tiles of residue classes."""
        tile = call.tile(name)
        tensors = (self.query, self.key, self.value, self.grad_out)
        named = extras_named(self.extras, call) | call.numbers() | starts_named(self.starts) | arguments
        for tensor, letter in zip(tensors, "qkvy", strict=True):
            named |= strides_named(tensor, letter, "bhtd")
        named |= dict(zip(("q_ptr", "k_ptr", "v_ptr", "do_ptr"), tensors, strict=True))
        named |= dict(lse_ptr=self.lse, delta_ptr=self.delta)
        flags = call.flags() | dict(
            D=call.head_dim, DV=call.value_dim, AT_END=call.at_end, PRECISION=call.precision,
            ALIGN=alignment_of(*tensors), BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            BLOCK_D=width_of(call.head_dim), BLOCK_DV=width_of(call.value_dim),
        )  # fmt: skip
        return Launch(
            kernel=kernel,
            grid=programs,
            arguments=arguments_of(kernel, named),
            constants={name: value for name, value in flags.items() if name in kernel.arg_names} | constants,
            options=tile.options(),
        )


def plan_delta(call: Call, out: Tensor, grad_out: Tensor, grad_lse: Tensor | None, delta: Tensor) -> Launch:
    """delta (B, H, Tq) of all queries."""
    block_dv = width_of(call.value_dim)
    block_m = max(1, DELTA_ELEMENTS // block_dv)
    tiles = triton.cdiv(call.queries, block_m)
    return Launch(
        kernel=attention_delta_kernel,
        grid=call.batch * call.heads * tiles,
        arguments=dict(
            out_ptr=out, do_ptr=grad_out, dlse_ptr=grad_lse, delta_ptr=delta,
            H=call.heads, Tq=call.queries, tiles=tiles,
            **strides_named(out, "o", "bhtd"), **strides_named(grad_out, "y", "bhtd"),
            **broadcast_strides(grad_lse, "l", "bht"),
        ),
        constants=dict(
            DV=call.value_dim, ALIGN=alignment_of(out, grad_out), BLOCK_M=block_m, BLOCK_DV=block_dv
        ),
        options=dict(num_warps=4, num_stages=1),
    )  # fmt: skip


def plan_dkdv(call: Call, inputs: Inputs, dk: Tensor | None, dv: Tensor | None) -> Launch:
    """dk and dv, or one of them."""
    tiles = tiles_of(call, call.keys, call.tile("backward_dkdv").block_n)
    arguments = dict(dk_ptr=dk, dv_ptr=dv, tiles=tiles // call.step)
    arguments |= strides_named(inputs.key if dk is None else dk, "dk", "bhtd")
    arguments |= strides_named(inputs.value if dv is None else dv, "dv", "bhtd")
    return inputs.launch(
        attention_backward_dkdv_kernel,
        "backward_dkdv",
        call.batch * call.kv_heads * tiles,
        call,
        arguments,
        dict(GROUPED=call.heads > call.kv_heads, NEED_DK=dk is not None, NEED_DV=dv is not None),
    )


def plan_dq(call: Call, inputs: Inputs, dq: Tensor) -> Launch:
    """dq."""
    tiles = tiles_of(call, call.queries, call.tile("backward_dq").block_m)
    return inputs.launch(
        attention_backward_dq_kernel,
        "backward_dq",
        call.batch * call.heads * tiles,
        call,
        dict(dq_ptr=dq, tiles=tiles // call.step) | strides_named(dq, "dq", "bhtd"),
        {},
    )


def plan_bias(call: Call, inputs: Inputs, dbias: Tensor) -> tuple[Launch, Tensor]:
    """The launch that sums the bias's gradient, and where: dbias[None], or partial sums (parts, *dbias)."""
    tile = call.tile("backward_bias")
    batches, heads, rows, columns = dbias.shape
    query_tiles = triton.cdiv(call.queries, tile.block_m)
    tiles_m = 1 if rows == 1 else query_tiles
    tiles_n = 1 if columns == 1 else triton.cdiv(call.keys, tile.block_n)
    shared_heads = call.heads if heads == 1 else 1
    walked = query_tiles if rows == 1 else 1
    readers = (call.batch if batches == 1 else 1) * shared_heads * walked
    tiles = batches * heads * tiles_m * tiles_n
    each = triton.cdiv(readers, max(1, min(readers, BIAS_PROGRAMS // tiles)))
    parts = max(1, triton.cdiv(readers, max(each, 1)))
    sums = dbias[None]
    if parts > 1:
        sums = torch.empty(parts, *dbias.shape, dtype=torch.float32, device=dbias.device)
    arguments = dict(
        sum_ptr=sums, bias_batches=batches, bias_heads=heads, shared_heads=shared_heads,
        tiles_m=tiles_m, tiles_n=tiles_n, walked_m=walked, readers=readers, readers_each=each,
    )  # fmt: skip
    launch = inputs.launch(
        attention_backward_bias_kernel,
        "backward_bias",
        parts * tiles,
        replace(call, tiles_of_neighbours=True),
        arguments | strides_named(sums, "s", "nbhts"),
        dict(ONE_ROW=rows == 1, ONE_COLUMN=columns == 1),
    )
    return launch, sums


def plan_distance(call: Call, inputs: Inputs, ddistance: Tensor) -> tuple[Launch, Tensor]:
    """The launch that sums the gradient of a bias of distances, and where: one row a diagonal of tiles.

    Returns:
        The launch, and sums (parts, B', H', diagonals, 2 * BLOCK) for `of_diagonals`.
    """
    tile = call.tile("backward_bias")
    block = min(tile.block_m, tile.block_n)
    batches, heads, _ = ddistance.shape
    tiles_m, tiles_n = triton.cdiv(call.queries, block), triton.cdiv(call.keys, block)
    shared_heads = call.heads if heads == 1 else 1
    readers = (call.batch if batches == 1 else 1) * shared_heads
    diagonals = tiles_m + tiles_n - 1
    programs = batches * heads * diagonals
    each = triton.cdiv(readers, max(1, min(readers, BIAS_PROGRAMS // programs)))
    sums = torch.empty(
        triton.cdiv(readers, each), batches, heads, diagonals, 2 * block,
        dtype=torch.float32, device=ddistance.device,
    )  # fmt: skip
    arguments = dict(
        sum_ptr=sums, bias_batches=batches, bias_heads=heads, shared_heads=shared_heads,
        tiles_m=tiles_m, tiles_n=tiles_n, readers=readers, readers_each=each,
    )  # fmt: skip
    launch = inputs.launch(
        attention_backward_distance_kernel,
        "backward_bias",
        sums.shape[0] * programs,
        replace(call, tiles_of_neighbours=True),
        arguments,
        dict(BLOCK_M=block, BLOCK_N=block),
    )
    return launch, sums


def of_diagonals(sums: Tensor, queries: int, distances: int) -> Tensor:
    """(B', H', distances): what two neighbouring diagonals of tiles found, added where both reach."""
    block = sums.shape[-1] // 2
    near, far = sums.sum(0).unflatten(-1, (2, block)).unbind(-2)  # each (B', H', diagonals, BLOCK)
    added = torch.nn.functional.pad(near, (0, 0, 0, 1)) + torch.nn.functional.pad(far, (0, 0, 1, 0))
    return added.flatten(-2)[..., -queries % block :][..., :distances]


def sinks_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """dsinks[h] = -sum over (b, i) of exp(sinks[h] - lse[b, h, i]) * delta[b, h, i]."""
    weight = torch.exp(sinks.float()[:, None] - lse).masked_fill_(lse == -torch.inf, 0.0)
    return torch.empty_like(sinks).copy_(-(weight * delta).sum((0, 2)))


def run(
    call: Call,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    extras,
    needs: Sequence[bool],
    starts: Starts | None = None,
) -> Gradients:
    """Gradients (query, key, value, bias, sinks, distance_bias) of the operator; None where not needed.

    Args:
        call: the call, without its data.
        grad_out: (B, H, Tq, Dv), any strides, also expanded ones.
        grad_lse: (B, H, Tq) float32, or None for zeros.
        out, lse: what the forward returned; lse contiguous.
        needs: which of the six to compute.
        starts: of sequences in a batch of one, or None. The other arguments are those of the forward.

    Returns:
        Each in its tensor's dtype, dense, in its tensor's order of dimensions.

    Raises:
        NotImplementedError: heads wider than any tile.
    """
    if call.dropout_p >= 1:
        # Nothing of the values was used: only lse has a gradient to pass on.
        grad_out = grad_out.new_zeros(()).expand(grad_out.shape)
    likes = (query, key, value, extras.bias, extras.sinks, extras.distance_bias)
    dq, dk, dv, dbias, dsinks, ddistance = (
        torch.empty_like(like) if need else None for like, need in zip(likes, needs, strict=True)
    )
    delta = None
    launches = []
    if any(need for number, need in enumerate(needs) if number != 2):
        delta = torch.empty(lse.shape, dtype=torch.float32, device=lse.device)
        launches.append(plan_delta(call, out, grad_out, grad_lse, delta))
    inputs = Inputs(query, key, value, grad_out, lse, delta, extras, starts)
    if dk is not None or dv is not None:
        launches.append(plan_dkdv(call, inputs, dk, dv))
    if dq is not None:
        launches.append(plan_dq(call, inputs, dq))
    sums = None
    if dbias is not None and dbias.numel() > 0:
        launch, sums = plan_bias(call, inputs, dbias)
        launches.append(launch)
    of_tiles = None
    if ddistance is not None:
        if lse.numel() and call.keys:
            launch, of_tiles = plan_distance(call, inputs, ddistance)
            launches.append(launch)
        else:
            ddistance.zero_()
    for launch in launches:
        launch.run(query.device)
    if sums is not None and sums.shape[0] > 1:
        dbias.copy_(sums.sum(0))
    if of_tiles is not None:
        ddistance.copy_(of_diagonals(of_tiles, call.queries, ddistance.shape[-1]))
    if dsinks is not None:
        dsinks = sinks_gradient(extras.sinks, lse, delta)
    return dq, dk, dv, dbias, dsinks, ddistance
