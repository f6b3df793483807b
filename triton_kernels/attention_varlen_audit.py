"""What the compile audit builds for attention over sequences of unequal length: data.

The kernels and tiles are those of attention_audit; these cases show that finding a sequence costs no kernel
its registers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .attention_audit import BF16, FP32, OPCODES, WIDEST_OF_64_ROWS
from .attention_backward import Inputs, plan_dkdv, plan_dq
from .attention_call import Call, Starts, precision_on
from .attention_mask import FAR
from .attention_plan import plan_forward
from .attention_varlen import as_batch, extras_of
from .launch import Launch, Requirement

SEQUENCES, TOKENS, HEADS, KV_HEADS = 7, 2000, 8, 2
# The least share of 128-bit loads: finding a sequence takes a handful of small ones.
WIDE_LOADS = {
    "attention_forward_kernel": 0.4,
    "attention_backward_dkdv_kernel": 0.1,
    "attention_backward_dq_kernel": 0.4,
}


@dataclass(frozen=True)
class AuditCase:
    """One causal call on 7 sequences, the last query of each at its last key; `changed`: with a window, sinks
    and softcap."""

    head_dim: int
    dtype: torch.dtype = BF16
    precision: str = "ieee"
    passes: tuple[str, ...] = ("forward", "dkdv", "dq")
    changed: bool = False

    @property
    def label(self) -> str:
        kind = "bf16" if self.dtype == BF16 else f"fp32 {self.precision}"
        return f"sequences D {self.head_dim} {kind} {'changed' if self.changed else 'causal'}"

    def requirement(self, kernel: str) -> Requirement:
        """As of the same kernels on a batch, but for what finds a sequence."""
        slim = self.head_dim <= WIDEST_OF_64_ROWS or kernel == "attention_forward_kernel"
        return Requirement(
            wide_loads=0.0 if self.changed else WIDE_LOADS[kernel],
            tensor_core=self.dtype == BF16 or self.precision == "tf32",
            opcodes=OPCODES if slim and self.dtype == BF16 and not self.changed else {},
        )

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta")

    def launches(self, architecture: str) -> list[Launch]:
        """The launches of the case's passes."""
        if self.precision == "tf32" and not architecture.startswith("sm_"):
            return []
        call = Call(
            dtype=self.dtype, precision=precision_on(architecture, self.dtype, self.precision),
            architecture=architecture, batch=1, heads=HEADS, kv_heads=KV_HEADS, queries=TOKENS, keys=TOKENS,
            head_dim=self.head_dim, value_dim=self.head_dim, scale=self.head_dim**-0.5, ahead=0,
            left=200 if self.changed else FAR.value, softcap=20.0 if self.changed else 0.0,
            sequences=SEQUENCES, at_end=True,
        )  # fmt: skip
        extras = extras_of(self.empty(HEADS) if self.changed else None)
        query, out = (as_batch(self.empty(TOKENS, HEADS, self.head_dim)) for _ in range(2))
        key, value = (as_batch(self.empty(TOKENS, KV_HEADS, self.head_dim)) for _ in range(2))
        lse = self.empty(1, HEADS, TOKENS, dtype=FP32)
        starts = Starts(*(self.empty(SEQUENCES + 1, dtype=torch.int32) for _ in range(2)))
        inputs = Inputs(query, key, value, out, lse, lse, extras, starts)
        plans = {
            "forward": lambda: plan_forward(call, query, key, value, extras, out, lse, starts),
            "dkdv": lambda: plan_dkdv(call, inputs, key, value),
            "dq": lambda: plan_dq(call, inputs, query),
        }
        return [plans[name]() for name in self.passes]

    def floor(self) -> dict[str, int]:
        """Least bytes of the forward and of the backward, each tensor moved once; the operations depend on
        the lengths."""
        moved = TOKENS * (HEADS + KV_HEADS) * self.head_dim * self.dtype.itemsize
        rows = 4 * HEADS * TOKENS
        return {"forward_bytes": 2 * moved + rows, "backward_bytes": 4 * moved + rows}


AUDIT = (
    AuditCase(64),
    AuditCase(128),
    AuditCase(256),
    AuditCase(128, changed=True),
    AuditCase(64, FP32, changed=True),
    AuditCase(128, FP32, passes=("dkdv", "dq")),
    AuditCase(128, FP32, "tf32"),
)
