"""Compiled FlexAttention for the operator of attention: dense, causal, windowed, with grouped heads.

On a CPU torch's FlexAttention has no backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.attention_cases import OPERATOR, AttentionCase
from benchmarks.attention_modules import Flex
from benchmarks.peers import Prepared, stock_module, timed
from benchmarks.peers.compile import require_compiler, start_afresh
from benchmarks.suites import Absent
from benchmarks.twins import Twins, call_of


def prepare(twins: Twins, pass_name: str, case) -> Prepared:
    """FlexAttention with the block mask of the case, made beforehand, under the timed call of the pass."""
    if not isinstance(case, AttentionCase):
        raise Absent("FlexAttention computes attention alone")
    stock_module(twins, case)
    device = twins.inputs[0].device.type
    if case.form != OPERATOR:
        raise Absent(f"FlexAttention computes the operator of attention, not {case.form}")
    if device == "cpu" and pass_name != "fwd":
        raise Absent("FlexAttention has no backward on a CPU")
    require_compiler(device)
    start_afresh(twins)
    flex = Flex(case, device)

    def outputs() -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(pass_name != "fwd"):
            return tuple(each.detach() for each in twins.forward(flex, twins.inputs))

    with torch.set_grad_enabled(pass_name != "fwd"):
        call, seconds = timed(lambda: call_of(pass_name, twins, flex))
    return Prepared(call, outputs, seconds)
