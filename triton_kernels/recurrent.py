"""Recurrent layers on Triton: the host side of the operator's forward and backward.

recurrent_paths decides which kernels run. Legend: see recurrent_tiles; I is the input size, P the size of h
(proj_size, or H).
"""

import torch
from torch import Tensor

from . import recurrent_persistent
from .recurrent_paths import checked_path, path_of
from .recurrent_persistent import place_of
from .recurrent_plan import (
    Layer,
    plan_resident_backward,
    plan_resident_forward,
    precision_on,
)
from .recurrent_products import (
    Weights,
    grad_input,
    grad_weights,
    input_side,
    product,
    states_before,
    weights_of,
)
from .recurrent_steps import backward_direction, forward_direction
from .tuning import architecture_of

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def fp32_precision() -> str:
    """ "tf32" where torch lets cuDNN's recurrent layers use it, else "ieee"."""
    if hasattr(torch.backends.cudnn, "rnn"):
        return "tf32" if torch.backends.cudnn.rnn.fp32_precision == "tf32" else "ieee"
    return "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"


def layer_of(mode: str, input: Tensor, h0: Tensor, sides: list[Weights], batch_sizes: Tensor | None) -> Layer:
    """The metadata of a call.

    Raises:
        NotImplementedError: a dtype without a kernel.
    """
    if input.dtype not in DTYPES:
        raise NotImplementedError(f"dtype={input.dtype}, needs float32, float16 or bfloat16")
    on_gpu = input.device.type == "cuda"
    packed = batch_sizes is not None
    architecture = architecture_of(input.device)
    return Layer(
        mode=mode,
        dtype=input.dtype,
        precision=precision_on(architecture, input.dtype, fp32_precision()),
        steps=len(batch_sizes) if packed else input.shape[0],
        batch=h0.shape[1],
        rows=input.shape[0] if packed else input.shape[0] * input.shape[1],
        hidden_size=sides[0].w_ih.shape[0] // (4 if mode == "lstm" else 3 if mode == "gru" else 1),
        proj_size=0 if sides[0].w_hr is None else h0.shape[2],
        directions=len(sides),
        packed=packed,
        capturing=on_gpu and torch.cuda.is_current_stream_capturing(),
        architecture=architecture,
    )


def sizes_of(layer: Layer, batch_sizes: Tensor | None) -> list[int]:
    """Sequences active at each step."""
    return batch_sizes.tolist() if batch_sizes is not None else [layer.batch] * layer.steps


def index_of(batch_sizes: Tensor | None, batch: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """(first row of each step, steps of each sequence) on the device, copied there without waiting."""
    if batch_sizes is None:
        return None
    starts = batch_sizes.cumsum(0) - batch_sizes
    shorter = torch.searchsorted(batch_sizes.flip(0), torch.arange(batch), right=True)
    both = torch.cat([starts, len(batch_sizes) - shorter])
    if device.type == "cuda":
        both = both.pin_memory().to(device, non_blocking=True)
    return both[: len(batch_sizes)], both[len(batch_sizes) :]


def stacked(tensors: list[Tensor]) -> Tensor:
    """(D, *shape), contiguous; a view where there is one direction."""
    return tensors[0].contiguous()[None] if len(tensors) == 1 else torch.stack(tensors)


def rows_of(tensor: Tensor, layer: Layer) -> Tensor:
    """(N, features) of a tensor (T, B, features) or (N, features); a view where its strides allow."""
    return tensor if layer.packed else tensor.reshape(layer.rows, tensor.shape[-1])


def forward(
    mode: str,
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    save: bool,
    path: str | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """One recurrent layer, all its directions: (h[t], c[t]) = gates(x[t], h[t-1], c[t-1]).

    Args:
        mode: "lstm", "gru", "rnn_tanh" or "rnn_relu".
        input: (T, B, I) of any strides, or packed (N, I); float32, float16 or bfloat16.
        h0: (D, B, P); c0: (D, B, H) for lstm, else None.
        weights: a direction after the other, w_ih, w_hh, then b_ih, b_hh and w_hr where there are such.
        batch_sizes: sequences of each step, int64 on the CPU, non-increasing; None unless packed.
        save: whether a backward will follow.
        path: "resident", "persistent" or "step"; None lets recurrent_paths choose.

    Returns:
        (output, h_n, c_n or None, gates, cells), freshly allocated; gates (D, N, 4*H) are i f g o or r z n
        and W_hn h + b_hn, cells (D, N, H) float32; both of shape (0,) where not saved or not needed.

    Raises:
        NotImplementedError: a dtype without a kernel, or a path that cannot take the call.
        ValueError: no path of that name.
    """
    sides = weights_of(weights, h0.shape[0])
    layer = layer_of(mode, input, h0, sides, batch_sizes)
    place = place_of(input.device)
    path = checked_path(path, layer, "forward", place) if path else path_of(layer, "forward", place)
    D, B, P, H = layer.directions, layer.batch, h0.shape[2], layer.hidden_size
    shape = (layer.rows, D * P) if layer.packed else (layer.steps, B, D * P)
    output = input.new_empty(shape)
    h_n = input.new_empty((D, B, P))
    c_n = input.new_empty((D, B, H)) if mode == "lstm" else None
    gates = cells = None
    if save and layer.cell != "rnn":
        gates = input.new_empty((D, layer.rows, 4 * H))
    if save and mode == "lstm":
        cells = torch.empty((D, layer.rows, H), dtype=torch.float32, device=input.device)
    if layer.rows > 0:
        call = layer, rows_of(input, layer), h0, c0, sides, batch_sizes, (output, h_n, c_n, gates, cells)
        forward_by_steps(*call) if path == "step" else forward_on_chip(*call, path)
    none = input.new_empty(0)
    none_in_fp32 = torch.empty(0, dtype=torch.float32, device=input.device)
    return output, h_n, c_n, none if gates is None else gates, none_in_fp32 if cells is None else cells


def forward_on_chip(layer, rows, h0, c0, sides, batch_sizes, results, path) -> None:
    """Run the steps by one of the paths that keep the weight on chip."""
    b_hn = None
    if layer.mode == "gru" and sides[0].b_hh is not None:
        b_hn = stacked([side.b_hh[2 * layer.hidden_size :].float() for side in sides])
    arguments = (
        input_side(rows, sides, layer.mode),
        stacked([side.w_hh for side in sides]),
        b_hn,
        (h0.contiguous(), None if c0 is None else c0.contiguous()),
        index_of(batch_sizes, layer.batch, rows.device),
        results,
    )
    if path == "persistent":
        recurrent_persistent.forward(layer, *arguments)
    else:
        plan_resident_forward(layer, *arguments).run(rows.device)


def forward_by_steps(layer, rows, h0, c0, sides, batch_sizes, results) -> None:
    output, h_n, c_n, gates, cells = results
    P = h_n.shape[2]
    columns = output.view(layer.rows, layer.directions * P)
    sizes = sizes_of(layer, batch_sizes)
    for d, side in enumerate(sides):
        last_h, last_c = forward_direction(
            layer,
            rows,
            (h0[d], None if c0 is None else c0[d]),
            side,
            sizes,
            d == 1,
            columns[:, d * P : (d + 1) * P],
            (None if gates is None else gates[d], None if cells is None else cells[d]),
        )
        h_n[d] = last_h
        if c_n is not None:
            c_n[d] = last_c


def backward(
    mode: str,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    output: Tensor,
    gates: Tensor,
    cells: Tensor,
    needs: tuple[bool, ...],
    path: str | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor | None]]:
    """Gradients of `forward`'s input, h0, c0 and weights; None where not needed. Bitwise repeatable.

    Args:
        grad_output, grad_h_n, grad_c_n: shaped as output, h_n and c_n, any strides; None means zero.
        output, gates, cells: as a forward with save=True returns them, whatever backend it ran on.
        needs: whether to compute the gradient of input, of h0, of c0, and of each weight. The other
            arguments are those of `forward`.

    Returns:
        (grad_input, grad_h0, grad_c0, grad_weights), contiguous, in the input's dtype; grad_weights is as
        long as weights. Sums in float32, rounded once.

    Raises:
        NotImplementedError: a dtype without a kernel, or a path that cannot take the call.
        ValueError: no path of that name.
    """
    sides = weights_of(weights, h0.shape[0])
    layer = layer_of(mode, input, h0, sides, batch_sizes)
    place = place_of(input.device)
    path = checked_path(path, layer, "backward", place) if path else path_of(layer, "backward", place)
    D, P = layer.directions, h0.shape[2]
    each = len(weights) // D
    if layer.rows == 0:
        return empty_batch(input, h0, c0, weights, needs)
    rows = rows_of(input, layer)
    columns = output.view(layer.rows, D * P)
    incoming = (None if grad_output is None else rows_of(grad_output, layer), grad_h_n, grad_c_n)
    saved = (columns, gates if layer.cell != "rnn" else None, cells if mode == "lstm" else None)
    dpre = input.new_empty((D, layer.rows, (1 if layer.cell == "rnn" else 4) * layer.hidden_size))
    dprojected = input.new_empty((D, layer.rows, P)) if layer.proj_size else None
    grad_h0 = input.new_empty(h0.shape) if needs[1] else None
    grad_c0 = input.new_empty(c0.shape) if c0 is not None and needs[2] else None
    call = layer, incoming, h0, c0, sides, batch_sizes, saved, (dpre, dprojected, grad_h0, grad_c0)
    backward_by_steps(*call) if path == "step" else backward_on_chip(*call, path)

    grads: list[Tensor | None] = []
    sizes = sizes_of(layer, batch_sizes)
    for d in range(D):
        wanted = needs[3 + d * each : 3 + (d + 1) * each]
        h = columns[:, d * P : (d + 1) * P]
        before = states_before(h, h0[d], sizes, d == 1) if wanted[1] else None
        four = (*wanted[:2], *(wanted[2:4] if each >= 4 else (False, False)))
        some = grad_weights(dpre[d], rows, before, mode, four)
        grads += some[: 4 if each >= 4 else 2]
        if layer.proj_size:
            grads.append(grad_projection(layer, dprojected[d], gates[d], cells[d]) if wanted[-1] else None)
    dx = grad_input(dpre, sides, mode, input.dtype).view(input.shape) if needs[0] else None
    return dx, grad_h0, grad_c0, grads


def grad_projection(layer: Layer, dprojected: Tensor, gates: Tensor, cells: Tensor) -> Tensor:
    """Gradient of w_hr (P, H): the projected h were o * tanh(c), rounded as the forward rounded them."""
    hidden = (gates[:, 3 * layer.hidden_size :].float() * cells.tanh()).to(layer.dtype)
    return product(dprojected.t(), hidden, torch.float32).to(layer.dtype)


def backward_on_chip(layer, incoming, h0, c0, sides, batch_sizes, saved, results, path) -> None:
    """Run the steps back by one of the paths that keep the weight on chip."""
    dpre, _, grad_h0, grad_c0 = results
    last = [None if grad is None else grad.contiguous() for grad in incoming[1:]]
    arguments = (
        (incoming[0], *last),
        stacked([side.w_hh for side in sides]),
        (h0.contiguous(), None if c0 is None else c0.contiguous()),
        index_of(batch_sizes, layer.batch, dpre.device),
        saved,
        (dpre, grad_h0, grad_c0),
    )
    if path == "persistent":
        recurrent_persistent.backward(layer, *arguments)
    else:
        plan_resident_backward(layer, *arguments).run(dpre.device)


def backward_by_steps(layer, incoming, h0, c0, sides, batch_sizes, saved, results) -> None:
    dpre, dprojected, grad_h0, grad_c0 = results
    output, gates, cells = saved
    P = h0.shape[2]
    sizes = sizes_of(layer, batch_sizes)
    for d, side in enumerate(sides):
        columns = slice(d * P, (d + 1) * P)
        first_h, first_c = backward_direction(
            layer,
            (
                None if incoming[0] is None else incoming[0][:, columns],
                *(None if grad is None else grad[d] for grad in incoming[1:]),
            ),
            (h0[d], None if c0 is None else c0[d]),
            side,
            sizes,
            d == 1,
            output[:, columns],
            (None if gates is None else gates[d], None if cells is None else cells[d]),
            dpre[d],
            None if dprojected is None else dprojected[d],
        )
        if grad_h0 is not None:
            grad_h0[d] = first_h
        if grad_c0 is not None:
            grad_c0[d] = first_c


def empty_batch(input, h0, c0, weights, needs):
    """The gradients of a call without rows: empty ones, and zeros for the weights."""
    tensors = (input, h0, c0, *weights)
    grads = [
        torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        if tensor is not None and need
        else None
        for tensor, need in zip(tensors, needs, strict=True)
    ]
    return *grads[:3], grads[3:]
