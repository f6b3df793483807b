"""What the compile audit builds for attention, and what must show in the machine code: data.

One case is one call; its launches are planned from meta tensors exactly as a call plans them, so together the
cases reach every row of configs/attention.json on every architecture (a test holds that).
"""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from .attention_backward import Inputs, plan_bias, plan_delta, plan_distance, plan_dkdv, plan_dq
from .attention_call import Call, pattern_of, precision_on
from .attention_plan import plan_forward, plan_weights
from .launch import Launch, Requirement

BF16, FP32 = torch.bfloat16, torch.float32
BATCH, HEADS, TOKENS = 2, 8, 1000
FIRST_ORDER = ("forward", "dkdv", "dq")
WITH_BIAS = (*FIRST_ORDER, "weights", "bias")
BY_DISTANCE = (*FIRST_ORDER, "weights", "distance")
# The least share of 128-bit loads of plain calls; each residual of a query (lse, delta) is a load of its own.
WIDE_LOADS = {
    "attention_forward_kernel": 0.5,
    "attention_backward_dkdv_kernel": 0.15,
    "attention_backward_dq_kernel": 0.4,
}
# The warp-group product of Hopper and mma.sync of Ampere; other architectures have one kind alone. The former
# takes 64 rows: above this width, and where scores are changed, not every kernel has registers for so many.
OPCODES = {"sm_80": "HMMA", "sm_90": "HGMMA"}
WIDEST_OF_64_ROWS = 128


@dataclass(frozen=True)
class AuditCase:
    """One call of 1000 tokens; `passes` names its kernels. `changed`: with a window, bias, padding, sinks,
    softcap and dropout; `by_distance`: with a bias of distances in the other's place; `scattered`: with a
    window, a bool mask, a global mask and dropout."""

    head_dim: int
    dtype: torch.dtype = BF16
    precision: str = "ieee"
    passes: tuple[str, ...] = FIRST_ORDER
    is_causal: bool = False
    changed: bool = False
    by_distance: bool = False
    scattered: bool = False
    kv_heads: int = HEADS

    @property
    def label(self) -> str:
        kind = "bf16" if self.dtype == BF16 else f"fp32 {self.precision}"
        parts = (
            ["causal"] * self.is_causal
            + ["changed"] * self.changed
            + ["by distance"] * self.by_distance
            + ["scattered"] * self.scattered
            + ["grouped"] * (self.kv_heads < HEADS)
        )
        return " ".join([f"D {self.head_dim} {kind}", *(parts or ["dense"])])

    def requirement(self, kernel: str) -> Requirement:
        """Tensor cores where a product has 16-bit or tf32 operands, wide loads where no score is tested."""
        multiplies = kernel != "attention_delta_kernel"
        plain = not (self.changed or self.scattered)
        slim = plain and (self.head_dim <= WIDEST_OF_64_ROWS or kernel == "attention_forward_kernel")
        return Requirement(
            wide_loads=WIDE_LOADS.get(kernel, 0.0) if plain else 0.0,
            tensor_core=multiplies and (self.dtype == BF16 or self.precision == "tf32"),
            opcodes=OPCODES if multiplies and slim and self.dtype == BF16 else {},
        )

    def extras(self) -> SimpleNamespace:
        bytes_of = {"dtype": torch.bool}
        return SimpleNamespace(
            mask=self.empty(BATCH, 1, TOKENS, TOKENS, **bytes_of) if self.scattered else None,
            bias=self.empty(1, HEADS, TOKENS, TOKENS) if self.changed and not self.by_distance else None,
            padding=self.empty(BATCH, TOKENS, **bytes_of) if self.changed else None,
            global_mask=self.empty(BATCH, TOKENS, **bytes_of) if self.scattered else None,
            sinks=self.empty(HEADS) if self.changed else None,
            seed=self.empty(dtype=torch.int64),
            distance_bias=self.empty(1, HEADS, 2 * TOKENS - 1, dtype=FP32) if self.by_distance else None,
        )

    def call(self, architecture: str) -> Call:
        windowed = self.changed or self.scattered
        settings = SimpleNamespace(
            is_causal=self.is_causal, left=200 if windowed else None, right=100 if windowed else None,
            dilation=1, global_tokens=0, query_offset=0, softcap=20.0 if self.changed else 0.0,
            dropout_p=0.1 if windowed else 0.0,
        )  # fmt: skip
        return Call(
            dtype=self.dtype, precision=precision_on(architecture, self.dtype, self.precision),
            architecture=architecture, batch=BATCH, heads=HEADS, kv_heads=self.kv_heads,
            queries=TOKENS, keys=TOKENS, head_dim=self.head_dim, value_dim=self.head_dim,
            scale=self.head_dim**-0.5,
            has_mask=self.scattered, has_bias=self.changed, **pattern_of(settings, self.scattered),
        )  # fmt: skip

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta")

    def launches(self, architecture: str) -> list[Launch]:
        """The launches of the case's passes."""
        if self.precision == "tf32" and not architecture.startswith("sm_"):
            return []
        call, extras = self.call(architecture), self.extras()
        q, out = (self.empty(BATCH, HEADS, TOKENS, self.head_dim) for _ in range(2))
        k, v = (self.empty(BATCH, self.kv_heads, TOKENS, self.head_dim) for _ in range(2))
        lse = self.empty(BATCH, HEADS, TOKENS, dtype=FP32)
        mean = self.empty(BATCH, TOKENS, TOKENS)
        inputs = Inputs(q, k, v, out, lse, lse, extras)
        plans = {
            "forward": lambda: plan_forward(call, q, k, v, extras, out, lse),
            "weights": lambda: plan_weights(call, q, k, lse, extras, mean, True),
            "delta": lambda: plan_delta(call, out, out, None, lse),
            "dkdv": lambda: plan_dkdv(call, inputs, k, v),
            "dq": lambda: plan_dq(call, inputs, q),
            "bias": lambda: plan_bias(call, inputs, extras.bias)[0],
            "distance": lambda: plan_distance(call, inputs, extras.distance_bias)[0],
        }
        return [plans[name]() for name in self.passes]

    def floor(self) -> dict[str, int]:
        """Least bytes and floating-point operations of the forward (two products) and of the backward (five),
        each tensor moved once; a causal call needs half of the operations."""
        rows = BATCH * HEADS * TOKENS
        moved = BATCH * (HEADS + self.kv_heads) * TOKENS * self.head_dim * self.dtype.itemsize
        product = 2 * rows * TOKENS * self.head_dim // (2 if self.is_causal else 1)
        return {
            "forward_bytes": 2 * moved + 4 * rows,
            "forward_flops": 2 * product,
            "backward_bytes": 4 * moved + 4 * rows,
            "backward_flops": 5 * product,
        }


AUDIT = (
    AuditCase(64, passes=("forward", "delta", "dkdv", "dq"), is_causal=True),
    AuditCase(128),
    AuditCase(256, is_causal=True),
    AuditCase(96, passes=("forward",), is_causal=True),
    AuditCase(128, passes=WITH_BIAS, changed=True),
    AuditCase(64, passes=("dkdv", "dq"), changed=True),
    AuditCase(256, passes=("dkdv", "dq"), changed=True),
    AuditCase(256, passes=("forward",), scattered=True),
    AuditCase(128, passes=("dkdv",), changed=True, kv_heads=2),
    AuditCase(64, FP32, passes=("dkdv",), changed=True, kv_heads=2),
    AuditCase(64, FP32, passes=WITH_BIAS, changed=True),
    AuditCase(128, FP32),
    AuditCase(256, FP32, passes=("forward",)),
    AuditCase(128, FP32, "tf32", passes=WITH_BIAS, changed=True),
    AuditCase(256, FP32, "tf32", passes=("forward",)),
    AuditCase(128, passes=BY_DISTANCE, changed=True, by_distance=True),
    AuditCase(64, FP32, passes=BY_DISTANCE, changed=True, by_distance=True),
    AuditCase(128, FP32, "tf32", passes=BY_DISTANCE, changed=True, by_distance=True),
    AuditCase(128, passes=("dkdv",), changed=True, by_distance=True, kv_heads=2),
    AuditCase(64, FP32, passes=("dkdv",), changed=True, by_distance=True, kv_heads=2),
)
