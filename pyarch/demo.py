"""Known architectures before and after `swap`: verified, timed, one table."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import torch

from pyarch import hardware, models
from pyarch.maps_page import PageMaps, page_maps
from pyarch.nn.config import Config
from pyarch.report import Table, as_json, milliseconds, times, with_progress
from pyarch.swap import swap
from pyarch.swap_report import Record
from pyarch.verify import verify
from pyarch.verify_report import Timing, VerifyReport

if TYPE_CHECKING:
    from pyarch.page import Page

SCHEMA = "pyarch.demo/1"
COLUMNS = (
    "model",
    ">layers",
    "backend",
    ">forward",
    ">swapped",
    ">speedup",
    ">step",
    ">swapped",
    ">speedup",
    ">worst of allowed",
    "verified",
)


@dataclass(frozen=True)
class Shown:
    """One model of the demo.

    Args:
        model: its name.
        layers: how many were swapped.
        proof: that they compute what they did, and the times.
        by_rules: whether rules stand for its masks.
        skipped: what `swap` left alone.
        maps: attention weights, where they were asked for.
    """

    model: str
    layers: int
    proof: VerifyReport
    by_rules: bool = False
    skipped: tuple[Record, ...] = ()
    maps: PageMaps = field(default_factory=PageMaps)

    @property
    def backends(self) -> str:
        """The backends of the forwards, and after a slash those of the backwards where they differ."""
        ways = [{getattr(each, way) for each in self.proof.layers} for way in ("forward", "backward")]
        # A frozen layer has no backward.
        used = [sorted(names - {"-"} or names) for names in ways]
        forward, backward = (", ".join(names) for names in used)
        return forward if forward == backward else f"{forward} / {backward}"

    @property
    def row(self) -> tuple[str, ...]:
        worst = self.proof.worst
        return (
            self.model,
            str(self.layers),
            self.backends,
            *_timing_cells(self.proof.timing["forward"]),
            *_timing_cells(self.proof.timing["step"]),
            f"{worst.ratio:.2f}" if worst else "-",
            "yes" if self.proof.ok else "NO",
        )


@dataclass(frozen=True)
class Demo:
    """All models that were shown."""

    shown: tuple[Shown, ...]
    machine: dict[str, str]

    @property
    def ok(self) -> bool:
        return all(each.proof.ok for each in self.shown)

    def table(self) -> Table:
        problems = [
            f"PROBLEM {each.model}: {problem}" for each in self.shown for problem in each.proof.problems
        ]
        machine = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        legend = (
            "step: forward and backward; worst of allowed: largest error in units of its tolerance, at most 1"
        )
        masks = [
            f"{each.model}: at first under explicit masks, swapped without masks and by rules that state them"
            for each in self.shown
            if each.by_rules
        ]
        return Table(machine, COLUMNS, [each.row for each in self.shown], (legend, *masks, *problems))

    def to_json(self) -> str:
        rows = [
            {
                "model": each.model,
                "backends": each.backends,
                **each.proof.as_dict(),
                "skipped": [asdict(record) for record in each.skipped],
            }
            for each in self.shown
        ]
        return as_json({"schema": SCHEMA, "ok": self.ok, "machine": self.machine, "models": rows})

    def page(self) -> Page:
        """The same as a page to look at, of models that were shown `closely`."""
        from pyarch.demo_page import page_of

        return page_of(self)


def demonstrate(
    names: tuple[str, ...],
    device: torch.device,
    size: str,
    *,
    layer_times: bool = False,
    maps: int = 0,
) -> Demo:
    """Swap, verify and time the named models.

    Args:
        names: of `pyarch.models.names()`.
        device: where they run.
        size: "real" or "tiny".
        layer_times: also time each swapped layer by itself.
        maps: how many layers of attention, of at most twice as many heads, to keep the weights of.
    """
    shown = tuple(_show(name, device, size, layer_times, maps) for name in with_progress(names))
    return Demo(shown, machine_of(device))


def machine_of(device: torch.device) -> dict[str, str]:
    """What a figure must carry: the device, its threads, the versions."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else hardware.cpu_model(),
        "architecture": hardware.architecture(device),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "triton": hardware.triton_version() or "none",
    }


def _show(name: str, device: torch.device, size: str, layer_times: bool, maps: int) -> Shown:
    torch.manual_seed(0)
    plain = models.build(name, size).to(device)
    patterns = models.patterns(name, size)
    model = plain
    if patterns:
        torch.manual_seed(0)
        model = models.build(name, size, masked=False).to(device)
    inputs = tuple(each.to(device) for each in models.load(name).inputs(models.config(name, size), 0))
    rules = {layers: Config(**stated) for layers, stated in patterns.items()}
    report = swap(model, rules=rules, sdpa=models.calls_sdpa(name))
    proof = verify(model, inputs, stock=plain if patterns else None, layer_times=layer_times)
    weights = page_maps(model, inputs, maps, 2 * maps) if maps else PageMaps()
    return Shown(name, len(report.swapped), proof, bool(patterns), tuple(report.skipped), weights)


def _timing_cells(timing: Timing) -> tuple[str, str, str]:
    return milliseconds(timing.stock), milliseconds(timing.swapped), times(timing.speedup)
