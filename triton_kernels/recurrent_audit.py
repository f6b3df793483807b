"""What the compile audit builds for recurrent layers, and what must show in the machine code: data.

One case is one layer; its launches are planned from meta tensors exactly as a call plans them, so together
the cases reach every row of configs/recurrent.json on every architecture (a test holds that). A case that an
architecture refuses (the weight does not stay on its chip) has no launches there.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .launch import Launch, Requirement
from .recurrent_plan import (
    Layer,
    plan_resident_backward,
    plan_resident_forward,
    plan_step_backward,
    plan_step_forward,
    precision_on,
    refusals_of_resident,
)

BF16, FP32 = torch.bfloat16, torch.float32
STEPS, BATCH = 128, 64
# The least share of 128-bit loads where rows are multiples of 16 units; loads of one number (a step's first
# row, a length) are the others. AMD's matrix layout stores 8 bytes a lane, so stores declare nothing.
WIDE_LOADS = {
    "recurrent_resident_forward_kernel": 0.35,
    "recurrent_resident_backward_kernel": 0.2,
    "recurrent_step_forward_kernel": 0.5,
    "recurrent_step_backward_kernel": 0.9,
}


@dataclass(frozen=True)
class AuditCase:
    """One layer with biases, all residuals and all gradients; two directions are packed."""

    mode: str
    hidden_size: int
    dtype: torch.dtype = BF16
    precision: str = "ieee"
    path: str = "resident"
    directions: int = 1

    @property
    def label(self) -> str:
        kind = "bf16" if self.dtype == BF16 else f"fp32 {self.precision}"
        ways = "packed bidirectional" if self.directions == 2 else "unidirectional"
        return f"{self.mode} {self.path} H {self.hidden_size} {kind} {ways}"

    def requirement(self, kernel: str) -> Requirement:
        """Tensor cores wherever a product has 16-bit or tf32 operands: mma.sync (HMMA) on NVIDIA's, because
        a batch tile of 16 rows is below the 64 that Hopper's warp-group product takes."""
        aligned = self.hidden_size % 16 == 0 and self.hidden_size >= 64
        return Requirement(
            wide_loads=WIDE_LOADS[kernel] if aligned else 0.0,
            tensor_core=self.path == "resident" and (self.dtype == BF16 or self.precision == "tf32"),
        )

    def layer(self, architecture: str) -> Layer:
        return Layer(
            mode=self.mode, dtype=self.dtype,
            precision=precision_on(architecture, self.dtype, self.precision),
            steps=STEPS, batch=BATCH, rows=STEPS * BATCH, hidden_size=self.hidden_size, proj_size=0,
            directions=self.directions, packed=self.directions == 2, capturing=False,
            architecture=architecture,
        )  # fmt: skip

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta")

    def launches(self, architecture: str) -> list[Launch]:
        """Every launch of the forward and of a backward that needs all gradients."""
        layer = self.layer(architecture)
        return self.resident_launches(layer) if self.path == "resident" else self.step_launches(layer)

    def resident_launches(self, layer: Layer) -> list[Launch]:
        D, B, N, H = layer.directions, layer.batch, layer.rows, layer.hidden_size
        lstm, gru = layer.mode == "lstm", layer.mode == "gru"
        state = self.empty(D, B, H)
        states = (state, state if lstm else None)
        index = None
        if layer.packed:
            index = self.empty(STEPS, dtype=torch.int64), self.empty(B, dtype=torch.int64)
        output = self.empty(N, D * H)
        gates = self.empty(D, N, 4 * H) if lstm or gru else None
        cells = self.empty(D, N, H, dtype=FP32) if lstm else None
        w = self.empty(D, layer.gates * H, H)
        launches = []
        if not refusals_of_resident(layer, "forward"):
            xg = self.empty(N, D * layer.gates * H, dtype=FP32)
            b_hn = self.empty(D, H, dtype=FP32) if gru else None
            results = (output, state, states[1], gates, cells)
            launches.append(plan_resident_forward(layer, xg, w, b_hn, states, index, results))
        if not refusals_of_resident(layer, "backward"):
            dpre = self.empty(D, N, (4 if lstm or gru else 1) * H)
            incoming = (output, state, states[1])
            saved, results = (output, gates, cells), (dpre, state, states[1])
            launches.append(plan_resident_backward(layer, incoming, w, states, index, saved, results))
        return launches

    def step_launches(self, layer: Layer) -> list[Launch]:
        B, H = layer.batch, layer.hidden_size
        lstm, gru = layer.mode == "lstm", layer.mode == "gru"
        sums, rows = self.empty(B, layer.gates * H, dtype=FP32), self.empty(B, H)
        carry = self.empty(B, H, dtype=FP32) if lstm or gru else None
        bias = self.empty(layer.gates * H)
        saved = (
            self.empty(B, 4 * H) if lstm or gru else None,
            self.empty(B, H, dtype=FP32) if lstm else None,
        )
        before = {"lstm": saved[1], "gru": rows}.get(layer.mode)
        start = None if before is None else rows
        dpre = self.empty(B, (4 if lstm or gru else 1) * H)
        output = None if lstm or gru else rows
        dh = self.empty(B, H, dtype=FP32)
        return [
            plan_step_forward(layer, sums, sums, (bias, bias), carry, rows, rows, saved),
            plan_step_backward(layer, rows, dh, carry, before, start, output, saved, dpre),
        ]

    def floor(self) -> dict[str, int]:
        """Least bytes and floating-point operations of the recurrence, forward and backward: each tensor
        moved once, the recurrent weight too (the input side's products are torch's)."""
        layer = self.layer("default")
        rows = BATCH if self.path == "step" else layer.rows
        states = layer.directions * rows * layer.hidden_size
        kept = {"lstm": 4 * self.dtype.itemsize + 4, "gru": 4 * self.dtype.itemsize}.get(self.mode, 0)
        weight = layer.directions * layer.gates * layer.hidden_size**2
        gates = layer.gates if layer.cell == "rnn" else 4
        flops = 2 * rows * weight if self.path == "resident" else 0
        weight_bytes = weight * self.dtype.itemsize if self.path == "resident" else 0
        return {
            "forward_bytes": states * (4 * layer.gates + self.dtype.itemsize + kept) + weight_bytes,
            "forward_flops": flops,
            "backward_bytes": states * ((gates + 1) * self.dtype.itemsize + kept) + weight_bytes,
            "backward_flops": flops,
        }


AUDIT = (
    AuditCase("lstm", 64, directions=2),
    AuditCase("gru", 64, directions=2),
    AuditCase("rnn_tanh", 64, directions=2),
    AuditCase("lstm", 128),
    AuditCase("gru", 128),
    AuditCase("rnn_tanh", 128),
    AuditCase("rnn_relu", 256),
    AuditCase("lstm", 100, directions=2),
    AuditCase("gru", 100, directions=2),
    AuditCase("lstm", 64, FP32, directions=2),
    AuditCase("gru", 64, FP32, directions=2),
    AuditCase("rnn_tanh", 64, FP32, directions=2),
    AuditCase("lstm", 64, FP32, "tf32"),
    AuditCase("gru", 64, FP32, "tf32"),
    AuditCase("gru", 128, FP32, "tf32"),
    AuditCase("rnn_tanh", 128, FP32, "tf32"),
    AuditCase("lstm", 1024, path="step"),
    AuditCase("gru", 1024, path="step"),
    AuditCase("rnn_tanh", 1024, path="step"),
    AuditCase("lstm", 1024, FP32, path="step"),
)
