"""Measures the cases of a suite on one device: errors and backends first, then times, as rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

import torch

from benchmarks.beside import Beside, prepared
from benchmarks.check import Check, checked, exact_results
from benchmarks.copy_speed import CopySpeed
from benchmarks.goals import is_met
from benchmarks.matmul_speed import MatmulSpeed
from benchmarks.measure import Rounds, Timer, cpu_timer, paired_times, spread, summary
from benchmarks.roofline import minimum_bytes, rates, roofline
from benchmarks.twins import Twins, call_of
from pyarch.peak_memory import peak_bytes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PARTS = {"fwd": ("forward",), "bwd": ("backward",), "fwd+bwd": ("forward", "backward")}
MIB = 1 << 20
# Samples of a call with next to no work, each of several calls.
LAUNCH_SAMPLES = 15
LAUNCH_CALLS = 10
# Of a row's time on a GPU, what the replays of both sides get on top.
GRAPH_SHARE = 0.25

Call = Callable[[], object]


class Benchmark(ABC):
    """What every suite measures alike; a suite says how a case is built and what bounds its speed.

    A case has `name`, `dtype`, `goals` and `products(pass_name)`, the operations of its products.
    """

    def __init__(self, device: str, budget_seconds: float, peers: Sequence[str] = ()) -> None:
        self.device = device
        self.budget_seconds = budget_seconds
        self.peers = peers
        self.timer: Timer = cpu_timer
        if device == "cuda":
            from benchmarks.cuda import EventTimer

            self.timer = EventTimer()
        self.copy_speed = CopySpeed(device, self.timer)
        self.matmul = MatmulSpeed(device, self.timer)
        self.launches: dict[tuple[str, str], float | None] = {}

    @abstractmethod
    def build(self, case) -> Twins:
        """Both modules, the inputs and the cotangent of a case, from a fixed seed."""

    @abstractmethod
    def tiny(self, case):
        """The same kind of call with next to no work, so that its time is Python's and of starting it."""

    @abstractmethod
    def figures(self, case, pass_name: str, ours_ms: float, attained: dict[str, float]) -> dict:
        """What the suite adds to a row, of its time and of the rates `attained` (benchmarks.roofline)."""

    def ceilings(self) -> dict[str, float]:
        """What this machine reaches at best, measured in this run; part of the environment."""
        rates_of_products = {
            f"matmul_{name}_gflop_per_s": self.matmul.of(DTYPES[name]) for name in ("fp32", "bf16")
        }
        return {"copy_gb_per_s": self.copy_speed.beyond_cache()} | rates_of_products

    def product_rate(self, case) -> float:
        """GFLOP/s of torch.mm in the dtype that bounds the case: on a CPU, fp16 is computed in fp32."""
        return self.matmul.of(DTYPES["fp32" if (self.device, case.dtype) == ("cpu", "fp16") else case.dtype])

    def rows(self, case, passes: list[str]) -> Iterator[dict]:
        """One row a pass. Raises WrongResult before anything is timed."""
        twins = self.build(case)
        wants_gradients = {pass_name: pass_name != "fwd" for pass_name in passes}
        exact = exact_results(twins, any(wants_gradients.values()))
        checks = {each: checked(twins, exact, each) for each in sorted(set(wants_gradients.values()))}
        for name in passes:
            yield self.row(case, name, twins, checks[wants_gradients[name]])

    def row(self, case, pass_name: str, twins: Twins, check: Check) -> dict:
        with torch.set_grad_enabled(pass_name != "fwd"):
            stock, stock_kernel = self.stock_call(pass_name, twins)
            ours = self.our_call(pass_name, twins)
            peers = prepared(self.peers, twins, pass_name, case, check.exact)
            rounds, peers = self.beside_peers({"stock": stock, "ours": ours}, peers)
            peak = {
                "stock": peak_bytes(stock, torch.device(self.device)) / MIB,
                "ours": peak_bytes(ours, torch.device(self.device)) / MIB,
            }
            on_gpu = self.on_gpu(pass_name, stock, ours)
        outputs = [check.exact[name].numel() for name in twins.outputs]
        ours_ms = summary(rounds.seconds["ours"])["median_ms"]
        attained = rates(case.products(pass_name), minimum_bytes(pass_name, twins, outputs), ours_ms)
        row = {
            "stock": side(rounds, "stock") | {"kernel": stock_kernel},
            "ours": side(rounds, "ours"),
            "pairs": rounds.count,
            "speedup": spread(rounds.ratios("stock", "ours")),
            "peers": peers.told(rounds),
            **attained,
            "roofline": roofline(attained, self.product_rate(case), self.copy_speed.beyond_cache()),
            **self.figures(case, pass_name, ours_ms, attained),
            "launch_us": self.launch_us(case, pass_name, ours),
            "peak_mib": peak,
            "compile_s": check.compile_s,
            "error": check.errors,
            "matches": True,
            "backend": {part: check.backends.get(part, "stock") for part in PARTS[pass_name]},
            **on_gpu,
        }
        goal = case.goals.get(pass_name)
        return row | {"goal": goal and asdict(goal), "met": goal and is_met(goal, row)}

    def beside_peers(self, sides: dict[str, Call], peers: Beside) -> tuple[Rounds, Beside]:
        """Times of both sides and all peers in turn; of both sides alone where a peer fails meanwhile."""
        try:
            return self.in_turn(sides | peers.calls), peers
        # A peer may raise anything, and which call did is not known: without peers it is ours or stock's.
        except Exception as failure:
            if not peers.calls:
                raise
            return self.in_turn(sides), peers.failing(failure)

    def in_turn(self, calls: dict[str, Call]) -> Rounds:
        """`paired_times` of this device; a GPU's timer takes one call a sample."""
        if self.device == "cuda":
            return paired_times(calls, self.budget_seconds, self.timer, sample_seconds=0)
        return paired_times(calls, self.budget_seconds, self.timer)

    def stock_call(self, pass_name: str, twins: Twins) -> tuple[Call, str]:
        """The stock side's call and the name of its kernel."""
        return call_of(pass_name, twins, twins.stock), "auto"

    def our_call(self, pass_name: str, twins: Twins) -> Call:
        return call_of(pass_name, twins, twins.ours)

    def launch_us(self, case, pass_name: str, ours: Call) -> float | None:
        """Microseconds of Python and of starting our call.

        On a GPU: how long the call takes to enqueue its work, without waiting for it. On a CPU, where work
        and calling cannot be told apart: the shortest time of the same kind of call with next to no work,
        measured once a kind; it holds the checks, the dispatcher, autograd and the start of threads. None
        where the backend that was asked for refuses so small a call.
        """
        if self.device == "cuda":
            from benchmarks.cuda import enqueue_seconds

            return enqueue_seconds(ours) * 1e6
        tiny = self.tiny(case)
        if (tiny.name, pass_name) not in self.launches:
            self.launches[tiny.name, pass_name] = self.shortest_us(tiny, pass_name)
        return self.launches[tiny.name, pass_name]

    def shortest_us(self, case, pass_name: str) -> float | None:
        """Microseconds of our shortest call of a case, None where it is refused."""
        with torch.set_grad_enabled(pass_name != "fwd"):
            try:
                call = self.our_call(pass_name, self.build(case))
                cpu_timer(call, LAUNCH_CALLS)
            except NotImplementedError:
                return None
            return min(cpu_timer(call, LAUNCH_CALLS) for _ in range(LAUNCH_SAMPLES)) * 1e6

    def on_gpu(self, pass_name: str, stock: Call, ours: Call) -> dict:
        """Both sides replayed as CUDA graphs, so that launching is no part of their time; {} on a CPU.

        The repeated backward is left out: its graph was recorded on another stream than capture uses.
        """
        if self.device != "cuda" or pass_name == "bwd":
            return {}
        from benchmarks.cuda import captured

        try:
            replays = {"stock": captured(stock), "ours": captured(ours)}
            rounds = paired_times(replays, self.budget_seconds * GRAPH_SHARE, self.timer, sample_seconds=0)
        except RuntimeError as refusal:
            return {"graph": {"failure": str(refusal).partition("\n")[0]}}
        sides = {name: summary(rounds.seconds[name]) for name in replays}
        return {"graph": sides | {"speedup": spread(rounds.ratios("stock", "ours"))}}

    def overhead_row(self, case) -> dict:
        """What a swapped module adds to a call too small to matter, without grad, in microseconds."""
        twins, goal = self.build(case), case.goals["overhead"]
        with torch.no_grad():
            calls = {"stock": call_of("fwd", twins, twins.stock), "ours": self.our_call("fwd", twins)}
            rounds = paired_times(calls, self.budget_seconds, cpu_timer)
        row = {
            **{name: summary(rounds.seconds[name]) for name in calls},
            "pairs": rounds.count,
            "speedup": spread(rounds.ratios("stock", "ours")),
            "added_us": spread(rounds.added_us("stock", "ours")),
        }
        return row | {"goal": asdict(goal), "met": is_met(goal, row)}


def side(rounds: Rounds, name: str) -> dict[str, float]:
    return summary(rounds.seconds[name]) | {"faults": rounds.faults[name]}
