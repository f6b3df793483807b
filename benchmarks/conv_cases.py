"""The depthwise-convolution cases as data: shapes, formats and the goals they are held to.

Legend: N batch, C channels, spatial sizes (L,), (H, W) or (D, H, W); one kernel size, stride, dilation and
padding serve every spatial dimension. Every case has a bias and a depth multiplier of 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from benchmarks.even_spread import evenly_spread
from benchmarks.goals import Goal

PASSES = {"cpu": ("fwd", "fwd+bwd"), "cuda": ("fwd", "bwd", "fwd+bwd")}


@dataclass(frozen=True)
class ConvCase:
    """One depthwise convolution.

    `channels_last` is the memory format of its input; `quick`: part of --quick.
    """

    batch: int
    channels: int
    spatial: tuple[int, ...]
    kernel: int
    stride: int = 1
    dilation: int = 1
    padding: int = 0
    dtype: str = "fp32"
    channels_last: bool = False
    goals: dict[str, Goal] = field(default_factory=dict)
    quick: bool = True

    @property
    def name(self) -> str:
        size = f"{self.spatial[0]}^{len(self.spatial)}" if len(self.spatial) > 1 else str(self.spatial[0])
        words = [f"{len(self.spatial)}-D", f"k{self.kernel}", f"{self.batch}x{self.channels}x{size}"]
        words += [f"stride{self.stride}"] * (self.stride > 1) + [f"dil{self.dilation}"] * (self.dilation > 1)
        words += [self.dtype] + [self.layout] * (len(self.spatial) > 1)
        return " ".join(words)

    @property
    def layout(self) -> str:
        letters = "DHW"[-len(self.spatial) :] if len(self.spatial) > 1 else "L"
        return f"N{letters}C" if self.channels_last else f"NC{letters}"

    @property
    def output_spatial(self) -> tuple[int, ...]:
        reach = self.dilation * (self.kernel - 1)
        return tuple((size + 2 * self.padding - reach - 1) // self.stride + 1 for size in self.spatial)

    @property
    def elements(self) -> tuple[int, int, int]:
        """Numbers of elements of (input, weight and bias together, output)."""
        planes = self.batch * self.channels
        return (
            planes * product(self.spatial),
            self.channels * (self.kernel ** len(self.spatial) + 1),
            planes * product(self.output_spatial),
        )

    def products(self, pass_name: str) -> int:
        """Floating-point operations, two for each multiplication with its addition; taps in the padding too.

        The backward has twice as many: one product for the gradient of each factor.
        """
        forward = 2 * self.elements[2] * self.kernel ** len(self.spatial)
        return forward * {"fwd": 1, "bwd": 2, "fwd+bwd": 3}[pass_name]


def product(numbers: tuple[int, ...]) -> int:
    result = 1
    for number in numbers:
        result *= number
    return result


def speedups(forward: float, both: float) -> dict[str, Goal]:
    return {"fwd": Goal("speedup", forward), "fwd+bwd": Goal("speedup", both)}


def copy_shares(forward: float, backward: float) -> dict[str, Goal]:
    return {"fwd": Goal("copy_share", forward), "bwd": Goal("copy_share", backward)}


# Goals: times faster than stock, paired in one run with a steady allocator on two AVX-512 cores.
CPU_TABLE = (
    ConvCase(8, 512, (2048,), 4, padding=3, goals=speedups(4.5, 7)),
    ConvCase(8, 256, (1000,), 31, padding=15, goals=speedups(22, 16)),
    ConvCase(8, 256, (1000,), 31, padding=15, dtype="bf16", goals=speedups(10, 14)),
    ConvCase(8, 96, (56, 56), 3, padding=1, goals=speedups(1.6, 3)),
    ConvCase(8, 96, (56, 56), 3, padding=1, channels_last=True, goals=speedups(1.0, 2.5)),
    ConvCase(8, 96, (56, 56), 3, stride=2, padding=1, goals=speedups(1.2, 2.5)),
    ConvCase(8, 96, (56, 56), 3, stride=2, padding=1, channels_last=True, goals=speedups(1.0, 1.8)),
    ConvCase(8, 96, (56, 56), 7, padding=3, goals=speedups(1.7, 9)),
    ConvCase(8, 96, (56, 56), 7, padding=3, channels_last=True, goals=speedups(1.25, 5.3)),
    ConvCase(8, 96, (56, 56), 7, padding=3, dtype="bf16", goals=speedups(1.4, 12)),
    ConvCase(8, 96, (56, 56), 7, padding=3, dtype="bf16", channels_last=True, goals=speedups(1.0, 5)),
    ConvCase(2, 64, (28, 28), 31, padding=15, goals=speedups(30, 12)),
    ConvCase(2, 64, (28, 28), 31, padding=15, channels_last=True, goals=speedups(1.0, 9)),
    ConvCase(8, 96, (56, 56), 3, dilation=2, padding=2, goals=speedups(1.4, 20)),
    ConvCase(8, 96, (56, 56), 3, dilation=2, padding=2, channels_last=True, goals=speedups(1.0, 8)),
    ConvCase(8, 144, (56, 56), 3, stride=2, padding=1, dtype="bf16", goals=speedups(1.3, 10)),
    ConvCase(
        8, 144, (56, 56), 3, stride=2, padding=1, dtype="bf16", channels_last=True, goals=speedups(1.0, 10)
    ),
    ConvCase(2, 64, (16, 16, 16), 3, padding=1, goals=speedups(1.2, 6)),
)

# Goals: minimum bytes over time, as a share of the copy bandwidth measured in the same run, caches cold.
CUDA_TABLE = (
    ConvCase(8, 4096, (4096,), 4, padding=3, dtype="bf16", goals=copy_shares(0.95, 0.85)),
    ConvCase(8, 256, (8192,), 31, padding=15, dtype="bf16", goals=copy_shares(0.80, 0.60)),
    ConvCase(128, 96, (56, 56), 3, padding=1, dtype="bf16", goals=copy_shares(0.90, 0.80)),
    ConvCase(
        128, 96, (56, 56), 3, padding=1, dtype="bf16", channels_last=True, goals=copy_shares(0.90, 0.80)
    ),
    ConvCase(
        128, 96, (56, 56), 5, padding=2, dtype="bf16", channels_last=True, goals=copy_shares(0.80, 0.65)
    ),
    ConvCase(128, 96, (56, 56), 7, padding=3, dtype="bf16", goals={"fwd": Goal("us", 48)}),
    ConvCase(
        128, 96, (56, 56), 7, padding=3, dtype="bf16", channels_last=True, goals={"fwd": Goal("us", 48)}
    ),
    ConvCase(64, 128, (56, 56), 31, padding=15, dtype="bf16", goals={"fwd": Goal("us", 150)}),
    ConvCase(128, 96, (56, 56), 3, dilation=2, padding=2, dtype="bf16", goals=copy_shares(0.85, 0.75)),
    ConvCase(16, 64, (32, 32, 32), 3, padding=1, dtype="bf16", goals=copy_shares(0.70, 0.55)),
    ConvCase(128, 96, (56, 56), 7, padding=3),
    ConvCase(8, 1024, (4096,), 4, padding=3),
)

TABLES = {"cpu": CPU_TABLE, "cuda": CUDA_TABLE}

# A call so small that what is left is the Python around the kernel.
OVERHEAD_CASE = ConvCase(1, 8, (4, 4), 3, padding=1, goals={"overhead": Goal("added_us", 15.0)})

SWEEP_AXES = {
    "size": (7, 8, 10, 12, 14, 17, 20, 24, 28, 33, 40, 49, 56, 64, 80, 97, 112),
    "channels": (3, 8, 16, 24, 31, 32, 48, 64, 72, 96, 120, 144, 192, 256, 384, 512, 768),
    "kernel": (1, 2, 3, 3, 3, 4, 5, 5, 6, 7, 7, 9, 11, 13, 15, 19, 25, 31),
    "stride": (1, 1, 2),
    "dilation": (1, 1, 1, 2, 3, 4),
    "batch": (1, 2, 4, 8),
    "dtype": ("fp32", "bf16"),
    "format": ("NCHW", "NHWC"),
}
SWEEP_LENGTHS = (7, 16, 50, 128, 333, 512, 1000, 2048, 4000)
SWEEP_DIMENSIONS = (2, 2, 2, 2, 1, 2, 2, 1, 2, 3)
SWEEP_COUNT = 240
# Larger cases take stock up to a second; these bounds keep the sweep within eight minutes on two cores.
SWEEP_MAX_ELEMENTS = 2_500_000
SWEEP_MAX_PRODUCTS = 50_000_000


def sweep_cases(count: int = SWEEP_COUNT) -> Iterator[ConvCase]:
    """Yield `count` distinct cases spread evenly over the product of SWEEP_AXES, the same ones every time."""
    seen: set[str] = set()
    for step, place in enumerate(evenly_spread(SWEEP_AXES), start=1):
        case = sweep_case(place, step)
        while not affordable(case) and case.batch > 1:
            case = replace(case, batch=case.batch // 2)
        if case.name not in seen and affordable(case):
            seen.add(case.name)
            yield case
        if len(seen) == count:
            return


def sweep_case(place: dict, step: int) -> ConvCase:
    dimensions = SWEEP_DIMENSIONS[step % len(SWEEP_DIMENSIONS)]
    kernel = min(place["kernel"], 5) if dimensions == 3 else place["kernel"]
    sizes = {
        1: (SWEEP_LENGTHS[step % len(SWEEP_LENGTHS)],),
        2: (place["size"],) * 2,
        3: (min(place["size"], 20),) * 3,
    }
    return ConvCase(
        place["batch"],
        place["channels"],
        sizes[dimensions],
        kernel,
        stride=place["stride"],
        dilation=place["dilation"],
        padding=place["dilation"] * (kernel - 1) // 2,
        dtype=place["dtype"],
        channels_last=dimensions > 1 and place["format"] == "NHWC",
    )


def affordable(case: ConvCase) -> bool:
    source, _, output = case.elements
    products = output * case.kernel ** len(case.spatial)
    return 0 < output and source <= SWEEP_MAX_ELEMENTS and products <= SWEEP_MAX_PRODUCTS
