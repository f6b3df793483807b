"""The peers: other ways to run a case, timed beside torch and ours. Data, and how one is made ready.

A peer's module has `prepare(twins, pass_name, case)`, which compiles or exports the twins' stock module.
Optional packages (the extra "peers") are imported when first asked for. No torch is imported here.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.attention_cases import CONTEXT, DENSE, DROPOUT, FLEX, PIECES, UNMASKED
from benchmarks.suites import Absent

if TYPE_CHECKING:
    from torch import Tensor, nn

    from benchmarks.twins import Twins

# What stands on the stock side of some rows and is not torch's way to the same result.
NO_STOCK = (DENSE, FLEX, UNMASKED, PIECES)


@dataclass(frozen=True)
class Peer:
    """A way to run a case: its name on the command line, what it is, and the module that prepares it."""

    name: str
    what: str
    module: str


PEERS = {
    peer.name: peer
    for peer in (
        Peer("compile", "torch.compile of the stock module", "benchmarks.peers.compile"),
        Peer("flex", "compiled FlexAttention", "benchmarks.peers.flex"),
        Peer("onnxruntime", "ONNX Runtime on a CPU, forward", "benchmarks.peers.onnxruntime"),
        Peer("openvino", "OpenVINO on a CPU, forward", "benchmarks.peers.openvino"),
    )
}


@dataclass(frozen=True)
class Prepared:
    """A peer ready for a case: the call to time, its outputs as torch tensors, and the seconds to get there.

    `outputs` gives the forward's tensors in the order of the twins' outputs. `compile_s` is the time of
    export, compilation and first call, less a warm one.
    """

    call: Callable[[], object]
    outputs: Callable[[], tuple[Tensor, ...]]
    compile_s: float


def prepare(name: str, twins: Twins, pass_name: str, case) -> Prepared:
    """The peer `name` on the twins' inputs, with torch's number of threads and in torch's grad mode.

    Raises Absent where it is not installed, or has no such operator, dtype, device or pass.
    """
    return importlib.import_module(PEERS[name].module).prepare(twins, pass_name, case)


def stock_module(twins: Twins, case) -> nn.Module:
    """The module of torch's that a peer compiles or exports.

    Raises Absent where none on the stock side answers the case exactly.
    """
    against, form = getattr(case, "against", ""), getattr(case, "form", "")
    if against in NO_STOCK:
        raise Absent(f"timed where the case stands against torch's own operator, not against {against}")
    if form in (DROPOUT, CONTEXT):
        raise Absent(f"{form}: nothing of its own to compare")
    return twins.stock


def timed(make: Callable[[], Callable[[], object]]) -> tuple[Callable[[], object], float]:
    """The call that `make` returns, and the seconds that making and first calling it took over a warm one."""
    start = time.perf_counter()
    call = make()
    call()
    ready = time.perf_counter()
    call()
    return call, max(0.0, 2 * ready - start - time.perf_counter())
