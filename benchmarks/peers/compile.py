"""torch.compile of the stock module: forward, backward and both, with its default settings."""

from __future__ import annotations

import shutil
import weakref

import torch
import torch._dynamo
import torch._functorch.config
from torch import Tensor
from torch._inductor import cpu_vec_isa

from benchmarks.peers import Prepared, stock_module, timed
from benchmarks.suites import Absent
from benchmarks.twins import Twins, call_of

COMPILERS = ("g++", "clang++")
# A recurrent layer is unrolled, and each step takes seconds to compile.
MOST_STEPS = 16


class Latest:
    """The twins that torch.compiler last started afresh for."""

    twins: weakref.ref | None = None


def start_afresh(twins: Twins) -> None:
    """Drop what was compiled for other twins: torch gives a function up that it has compiled too often."""
    if Latest.twins is not None and Latest.twins() is twins:
        return
    torch.compiler.reset()
    torch._dynamo.config.allow_rnn = True
    # The backward alone is timed by repeating it on one graph.
    torch._functorch.config.donated_buffer = False
    Latest.twins = weakref.ref(twins)


def require_compiler(device: str) -> None:
    """Raise Absent where torch.compile has no C++ compiler for a CPU's kernels, or would waste its vectors.

    It tries vector instructions out in a process of its own and does without where that takes too long, as it
    may on a busy machine: such times are not those of torch.compile.
    """
    if device != "cpu":
        return
    if not any(map(shutil.which, COMPILERS)):
        raise Absent(f"torch.compile needs a C++ compiler, none of {', '.join(COMPILERS)} is on the path")
    if not cpu_vec_isa.pick_vec_isa() and torch.backends.cpu.get_cpu_capability() != "DEFAULT":
        raise Absent("torch.compile found no vector instructions here, where torch itself uses them")


def require_few_steps(case) -> None:
    """Raise Absent where a recurrent case has more steps than can be waited for."""
    steps = getattr(case, "steps", 0) * getattr(case, "layers", 1) * getattr(case, "directions", 1)
    if steps > MOST_STEPS:
        raise Absent(f"torch.compile unrolls recurrent layers: {steps} steps, compiled up to {MOST_STEPS}")


def prepare(twins: Twins, pass_name: str, case) -> Prepared:
    """The compiled stock module under the timed call of the pass; its outputs are those of the same mode."""
    stock = stock_module(twins, case)
    require_few_steps(case)
    require_compiler(twins.inputs[0].device.type)
    start_afresh(twins)
    compiled = torch.compile(stock)

    def outputs() -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(pass_name != "fwd"):
            return tuple(each.detach() for each in twins.forward(compiled, twins.inputs))

    with torch.set_grad_enabled(pass_name != "fwd"):
        call, seconds = timed(lambda: call_of(pass_name, twins, compiled))
    return Prepared(call, outputs, seconds)
