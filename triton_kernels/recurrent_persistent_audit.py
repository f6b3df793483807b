"""What the compile audit builds for the persistent recurrent kernels, and what their machine code must show.

One case is one layer; its launches are planned from meta tensors exactly as a call on a GPU plans them, so
together the cases reach every row of configs/recurrent_persistent.json on every architecture (a test holds
that). A kernel that an architecture refuses has no launch there.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .launch import Launch, Requirement
from .recurrent_persistent import Place, plan_backward, plan_forward, refusals
from .recurrent_plan import Layer, precision_on

BF16, FP32 = torch.bfloat16, torch.float32
STEPS = 128
# Multiprocessors of the GPUs that the targets stand for: A100, H100 and H200, B200, MI300X.
MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}


@dataclass(frozen=True)
class AuditCase:
    """One layer with biases, all residuals and all gradients; two directions are packed."""

    mode: str
    hidden_size: int
    batch: int = 16
    dtype: torch.dtype = BF16
    precision: str = "ieee"
    directions: int = 1

    @property
    def label(self) -> str:
        kind = "bf16" if self.dtype == BF16 else f"fp32 {self.precision}"
        ways = " packed bidirectional" if self.directions == 2 else ""
        return f"{self.mode} persistent H {self.hidden_size} B {self.batch} {kind}{ways}"

    def requirement(self, kernel: str) -> Requirement:
        """Tensor cores for 16-bit and tf32 operands. Loads of dpre, the backward's most, in whole vectors
        where rows are aligned; the forward declares none, as AMD's matrix layout loads h in halves of one."""
        if not kernel.startswith("recurrent_persistent"):
            return Requirement()
        wide = kernel.endswith("backward_kernel") and self.hidden_size % 64 == 0
        tensor_core = self.dtype == BF16 or self.precision == "tf32"
        return Requirement(wide_loads=0.5 if wide else 0.0, tensor_core=tensor_core)

    def layer(self, architecture: str) -> Layer:
        return Layer(
            mode=self.mode, dtype=self.dtype,
            precision=precision_on(architecture, self.dtype, self.precision), steps=STEPS, batch=self.batch,
            rows=STEPS * self.batch, hidden_size=self.hidden_size, proj_size=0, directions=self.directions,
            packed=self.directions == 2, capturing=False, architecture=architecture,
        )  # fmt: skip

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta")

    def launches(self, architecture: str) -> list[Launch]:
        """Every launch of the forward and of a backward that needs all gradients."""
        layer = self.layer(architecture)
        place = Place(architecture, MULTIPROCESSORS[architecture])
        D, B, N, H, G = layer.directions, layer.batch, layer.rows, layer.hidden_size, layer.gates
        lstm, gated = self.mode == "lstm", G > 1
        alarm = self.empty(1, dtype=torch.int32)
        state = self.empty(D, B, H)
        states = (state, state if lstm else None)
        index = None
        if layer.packed:
            index = self.empty(STEPS, dtype=torch.int64), self.empty(B, dtype=torch.int64)
        output = self.empty(N, D * H)
        gates = self.empty(D, N, 4 * H) if gated else None
        cells = self.empty(D, N, H, dtype=FP32) if lstm else None
        w = self.empty(D, G * H, H)
        launches = []
        if not any(refusals(layer, "forward", place)):
            xg = self.empty(N, D * G * H, dtype=FP32)
            b_hn = self.empty(D, H, dtype=FP32) if self.mode == "gru" else None
            results = (output, *states, gates, cells)
            launches += plan_forward(layer, xg, w, b_hn, states, index, results, place, alarm)
        if not any(refusals(layer, "backward", place)):
            dpre = self.empty(D, N, (4 if gated else 1) * H)
            incoming, saved, results = (output, *states), (output, gates, cells), (dpre, *states)
            launches += plan_backward(layer, incoming, w, states, index, saved, results, place, alarm)
        return launches

    def floor(self) -> dict[str, int]:
        """Least bytes and floating-point operations of the recurrence, forward and backward: each tensor is
        moved once; that h and dpre are read again by every program, from the L2 cache, is not counted."""
        layer = self.layer("default")
        size = self.dtype.itemsize
        rows = layer.directions * layer.rows * layer.hidden_size
        kept = {"lstm": 4 * size + 4, "gru": 4 * size}.get(self.mode, 0)
        weight = layer.directions * layer.gates * layer.hidden_size**2
        slots = 4 if layer.gates > 1 else 1
        flops = 2 * layer.rows * weight
        return {
            "forward_bytes": rows * (4 * layer.gates + size + kept) + weight * size,
            "forward_flops": flops,
            "backward_bytes": rows * ((slots + 1) * size + kept) + weight * size,
            "backward_flops": flops,
        }


AUDIT = (
    AuditCase("lstm", 1024),
    AuditCase("lstm", 768, batch=64),
    AuditCase("gru", 1024, batch=64),
    AuditCase("gru", 200, directions=2),
    AuditCase("rnn_tanh", 1024),
    AuditCase("rnn_tanh", 1024, batch=64),
    AuditCase("lstm", 512, dtype=FP32, precision="tf32"),
    AuditCase("rnn_relu", 1024, dtype=FP32, precision="tf32"),
)
