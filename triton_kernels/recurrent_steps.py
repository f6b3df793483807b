"""A recurrent layer step by step: one product and one pointwise launch a step, for any hidden size.

    hg = h W_hh^T,   (h, c) = gates(xg[t] + hg, ..)            (lstm with a projection: h = w_hr (o tanh(c)))

For cells, projections, and weights too large to stay on chip, where a large batch makes the product itself
worth a launch. Nothing here waits for the device, so a CUDA graph can capture it. Legend: see
recurrent_tiles; P is the size of h (proj_size, or H).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .recurrent_plan import Layer, plan_step_backward, plan_step_forward
from .recurrent_products import Weights, gate_sides, product

# Bytes of input-side products held at a time: about what stays in a GPU's last-level cache.
CHUNK_BYTES = 32 << 20


def chunks_of(sizes: list[int], row_bytes: int, reverse: bool) -> Iterator[list[int]]:
    """The steps in the direction's order, in groups whose rows take at most CHUNK_BYTES (or one step)."""
    chunk, held = [], 0
    for t in reversed(range(len(sizes))) if reverse else range(len(sizes)):
        if chunk and held + sizes[t] * row_bytes > CHUNK_BYTES:
            yield chunk
            chunk, held = [], 0
        chunk.append(t)
        held += sizes[t] * row_bytes
    yield chunk


def begins_of(sizes: list[int]) -> list[int]:
    """First row of every step, and after them the number of rows."""
    begins = [0]
    for size in sizes:
        begins.append(begins[-1] + size)
    return begins


def forward_direction(
    layer: Layer, rows: Tensor, start: tuple[Tensor, Tensor | None], side: Weights, sizes: list[int],
    reverse: bool, output: Tensor, saved: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Walk one direction's steps.

    Args:
        rows: (N, I) input.
        start: (h0, c0), each (B, P) and (B, H).
        output: (N, P), a view of this direction's columns, written here.
        saved: (gates, cells) of this direction, written here unless None.

    Returns:
        (h_n, c_n) in the input's dtype.
    """
    begins = begins_of(sizes)
    state = start[0].contiguous().clone()
    carry = None
    if layer.cell != "rnn":
        carry = torch.empty(layer.batch, layer.hidden_size, dtype=torch.float32, device=rows.device)
        carry.copy_(start[1] if layer.cell == "lstm" else start[0])
    biases = (None, None) if side.b_ih is None else (side.b_ih.contiguous(), side.b_hh.contiguous())
    hidden = state
    if side.w_hr is not None:
        hidden = torch.empty(layer.batch, layer.hidden_size, dtype=rows.dtype, device=rows.device)
    for chunk in chunks_of(sizes, 4 * side.w_ih.shape[0], reverse):
        first = begins[min(chunk)]
        xg = product(rows[first : begins[max(chunk) + 1]], side.w_ih.t(), torch.float32)
        for t in chunk:
            step, size = slice(begins[t], begins[t + 1]), sizes[t]
            hg = product(state[:size], side.w_hh.t(), torch.float32)
            plan_step_forward(
                layer,
                xg[begins[t] - first : begins[t + 1] - first],
                hg,
                biases,
                None if carry is None else carry[:size],
                hidden[:size],
                output[step] if side.w_hr is None else None,
                (None if saved[0] is None else saved[0][step], None if saved[1] is None else saved[1][step]),
            ).run(rows.device)
            if side.w_hr is not None:
                state[:size] = product(hidden[:size], side.w_hr.t(), rows.dtype)
                output[step] = state[:size]
    return state, carry.to(rows.dtype) if layer.cell == "lstm" else None


def backward_direction(
    layer: Layer, incoming: tuple[Tensor | None, ...], start: tuple[Tensor, Tensor | None], side: Weights,
    sizes: list[int], reverse: bool, output: Tensor, saved: tuple[Tensor | None, Tensor | None],
    dpre: Tensor, dprojected: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Walk one direction's steps back.

    Args:
        incoming: gradients of this direction's output (N, P), h_n (B, P) and c_n (B, H), each or None.
        start, output, saved: as in `forward_direction`.
        dpre: (N, K*H), written here.
        dprojected: (N, P), the gradient of every projected h, written here; None without a projection.

    Returns:
        Gradients of h0 and c0 in float32.
    """
    begins = begins_of(sizes)
    grad_output, grad_h_n, grad_c_n = incoming
    size_of_h = layer.proj_size or layer.hidden_size
    dh = torch.zeros(layer.batch, size_of_h, dtype=torch.float32, device=dpre.device)
    if grad_h_n is not None:
        dh.copy_(grad_h_n)
    carry = None
    if layer.cell != "rnn":
        carry = torch.zeros(layer.batch, layer.hidden_size, dtype=torch.float32, device=dpre.device)
        if layer.cell == "lstm" and grad_c_n is not None:
            carry.copy_(grad_c_n)
    states = {"lstm": saved[1], "gru": output, "rnn": None}[layer.cell]
    start_state = {"lstm": start[1], "gru": start[0], "rnn": None}[layer.cell]
    if start_state is not None:
        start_state = start_state.contiguous()

    for t in range(len(sizes)) if reverse else reversed(range(len(sizes))):
        step, size = slice(begins[t], begins[t + 1]), sizes[t]
        before = None
        if states is not None:
            t_before = t + 1 if reverse else t - 1
            exists = 0 <= t_before < len(sizes)
            followers = min(size, sizes[t_before]) if exists else 0
            first = begins[t_before] if exists else 0
            before = states[first : first + followers]
        grad_step = None if grad_output is None else grad_output[step]
        dh_step = dh[:size]
        if dprojected is not None:
            dprojected[step] = dh_step if grad_step is None else dh_step + grad_step
            dh_step, grad_step = product(dprojected[step], side.w_hr, torch.float32), None
        plan_step_backward(
            layer,
            grad_step,
            dh_step,
            None if carry is None else carry[:size],
            before,
            None if start_state is None else start_state[:size],
            output[step] if layer.cell == "rnn" else None,
            (None if saved[0] is None else saved[0][step], None if saved[1] is None else saved[1][step]),
            dpre[step],
        ).run(dpre.device)
        product(gate_sides(dpre[step], layer.mode)[1], side.w_hh, torch.float32, out=dh[:size])
    if layer.cell == "gru":
        dh += carry
    return dh, carry if layer.cell == "lstm" else None
