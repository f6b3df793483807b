"""The rates of a call beside the roofline of its machine, whose two ceilings were measured in the same run.

A call of F operations that must move B bytes has the intensity F / B. It can run at no more than
min(P, C F / B), with P the rate of torch.mm in the call's dtype and C the speed of a copy beyond the caches
(Williams, Waterman, Patterson 2009, doi:10.1145/1498765.1498785). A share above 1 is data that caches held.
"""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.twins import Twins

MEMORY, COMPUTE = "memory", "compute"


def minimum_bytes(pass_name: str, twins: Twins, output_elements: Iterable[int]) -> int:
    """Bytes that a pass must move: each tensor it needs read once, each that it returns written once.

    The forward reads inputs and parameters and writes the outputs; the backward reads the cotangent, inputs
    and parameters and writes a gradient for each leaf. Of an expanded cotangent there is one element.
    """
    element_bytes = twins.inputs[0].element_size()
    leaves = sum(each.numel() for each in twins.leaves(twins.ours).values())
    given = sum(each.numel() for each in twins.inputs[len(twins.learned) :]) + leaves
    forward = given + sum(output_elements)
    cotangent = twins.cotangent.untyped_storage().nbytes() // twins.cotangent.element_size()
    backward = cotangent + given + leaves
    return {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward}[pass_name] * element_bytes


def rates(flop: int, moved: int, ms: float) -> dict[str, float]:
    """What a row says of its work: operations, bytes, and how fast they were done in `ms` milliseconds."""
    return {
        "flop": flop,
        "bytes": moved,
        "gflop_per_s": flop / (ms * 1e-3) / 1e9,
        "gb_per_s": moved / (ms * 1e-3) / 1e9,
    }


def roofline(attained: dict[str, float], matmul_gflop_per_s: float, copy_gb_per_s: float) -> dict:
    """The intensity of a call in operations a byte, which ceiling bounds it, and its share of that."""
    intensity = attained["flop"] / attained["bytes"]
    under_memory = copy_gb_per_s * intensity
    bound = min(matmul_gflop_per_s, under_memory)
    return {
        "intensity": intensity,
        "bound": MEMORY if under_memory < matmul_gflop_per_s else COMPUTE,
        "share": attained["gflop_per_s"] / bound,
    }
