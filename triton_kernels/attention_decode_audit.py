"""What the compile audit builds for attention on a cache: data.

Together the cases reach every row of "decode" in configs/attention.json on every architecture.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .attention_audit import BF16, FP32
from .attention_call import Call, precision_on
from .attention_decode import plan_combine, plan_stretches
from .attention_mask import FAR
from .launch import Launch, Requirement

BATCH, HEADS, KV_HEADS, PLACES, SPLITS = 3, 32, 8, 4000, 11
# The least share of 128-bit loads; m and l of a stretch are loads of their own.
WIDE_LOADS = {"attention_decode_kernel": 0.4, "attention_combine_kernel": 0.2}


@dataclass(frozen=True)
class AuditCase:
    """One new token on a cache of 4000 places; `changed`: with a window, sinks and softcap."""

    head_dim: int
    dtype: torch.dtype = BF16
    precision: str = "ieee"
    changed: bool = False

    @property
    def label(self) -> str:
        kind = "bf16" if self.dtype == BF16 else f"fp32 {self.precision}"
        return f"decode D {self.head_dim} {kind}{' changed' if self.changed else ''}"

    def requirement(self, kernel: str) -> Requirement:
        multiplies = kernel == "attention_decode_kernel"
        return Requirement(
            wide_loads=WIDE_LOADS[kernel],
            tensor_core=multiplies and (self.dtype == BF16 or self.precision == "tf32"),
        )

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta")

    def launches(self, architecture: str) -> list[Launch]:
        """The launches of the stretches and of their sum."""
        if self.precision == "tf32" and not architecture.startswith("sm_"):
            return []
        call = Call(
            dtype=self.dtype, precision=precision_on(architecture, self.dtype, self.precision),
            architecture=architecture, batch=BATCH, heads=HEADS, kv_heads=KV_HEADS, queries=1, keys=PLACES,
            head_dim=self.head_dim, value_dim=self.head_dim, scale=self.head_dim**-0.5,
            left=200 if self.changed else FAR.value, softcap=20.0 if self.changed else 0.0,
        )  # fmt: skip
        rows = (BATCH, HEADS, 1)
        query, out = (self.empty(*rows, self.head_dim) for _ in range(2))
        key, value = (self.empty(BATCH, KV_HEADS, PLACES, self.head_dim) for _ in range(2))
        positions = self.empty(BATCH, dtype=torch.int32)
        widths = ((SPLITS, self.head_dim), (SPLITS,), (SPLITS,))
        parts = tuple(self.empty(*rows, *width, dtype=FP32) for width in widths)
        sinks = self.empty(HEADS) if self.changed else None
        return [
            plan_stretches(call, query, key, value, positions, parts),
            plan_combine(call, parts, sinks, out, self.empty(*rows, dtype=FP32)),
        ]

    def floor(self) -> dict[str, int]:
        """Least bytes, each tensor moved once, and operations of the two products."""
        cache = BATCH * KV_HEADS * PLACES * self.head_dim
        moved = 2 * (cache + BATCH * HEADS * self.head_dim) * self.dtype.itemsize
        return {"forward_bytes": moved, "forward_flops": 4 * cache * HEADS // KV_HEADS}


AUDIT = (
    AuditCase(64),
    AuditCase(128, changed=True),
    AuditCase(256),
    AuditCase(128, FP32, changed=True),
    AuditCase(256, FP32),
    AuditCase(256, FP32, "tf32"),
)
