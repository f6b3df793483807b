"""From tensors to launches of the persistent recurrent kernels: who may wait for whom, and with which tiles.

The kernels are in recurrent_persistent_forward and recurrent_persistent_backward. Their programs wait for
each other, so a plan is made only where all of them run at once: one program a multiprocessor by the table of
tiles (configs/recurrent_persistent.json), and once more by the registers and the shared memory of the
compiled kernel. Where programs cannot run at once at all (the interpreter runs one after another), every step
is a launch of its own and no barrier is compiled in. Plans need shapes and types only, so meta tensors do.

Legend: T steps, B batch, N rows (T * B, or the packed total, in time order), H hidden size, G gates a unit, D
directions. xg, starts, lengths, output, gates, cells and dpre are those of recurrent_resident(_backward).
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, fields
from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import tables
from .launch import Launch
from .recurrent_barrier import EXPIRED, recurrent_expiry_kernel
from .recurrent_persistent_backward import PARTS, recurrent_persistent_backward_kernel
from .recurrent_persistent_forward import recurrent_persistent_forward_kernel
from .recurrent_plan import MODES, Layer
from .tuning import architecture_of

KINDS = {
    "kernel": tables.one_of(("forward", "backward")),
    "cell": tables.one_of(("gated", "rnn")),
    "product": tables.one_of(("16", "tf32", "ieee")),
    "block_b": tables.POWER_OF_TWO,
    "units": tables.POWER_OF_TWO,
    "block_k": tables.POWER_OF_TWO,
    "num_warps": tables.POWER_OF_TWO,
    "hidden_up_to": tables.COUNT,
    "resident": tables.COUNT,
    "ahead": tables.COUNT,
}

# Looks at a counter before a wait expires. A look takes half a microsecond, so this is some seconds.
SPIN_LIMIT = 1 << 22
# int32 counters this far apart lie in cache lines of their own.
COUNTER_STRIDE = 32
# Elements that one program of the expiry kernel fills at a time.
EXPIRY_BLOCK = 1024
# Units of a 16-byte vector of the narrowest type.
VECTOR_UNITS = 8
# All that a thread may have. Left to itself, ptxas spills some registers to make room for a second program.
MAX_REGISTERS = 255
# Multiprocessors that the interpreter pretends to have.
INTERPRETED_MULTIPROCESSORS = 64


# -------------------------------------------------------------------------------- tiles as data


@dataclass(frozen=True)
class Tile:
    """What one program computes: `units` hidden units of `block_b` sequences; the long side of its product is
    cut into pieces of `block_k`, of which the first `resident` weight pieces stay on chip and `ahead` pieces
    of the state are loaded before the first is used."""

    block_b: int
    units: int
    block_k: int
    num_warps: int
    resident: int
    ahead: int


@dataclass(frozen=True)
class Table:
    """The rows of one architecture and the GPU on which tests proved them, None while there is none: `auto`
    takes the kernels only where they are proven."""

    proven_on: str | None
    rows: tuple[dict[str, Any], ...]


def check_table(table: Any, source: str) -> None:
    """Raise ValueError, naming the place, where a table does not have the shape that `table_of` reads."""

    tables.check(table, source, KINDS, "proven_on")


@functools.cache
def table_of(architecture: str) -> Table:
    """Read and check configs/recurrent_persistent.json and return the rows for one architecture.

    Raises:
        ValueError: the table does not have the expected shape.
    """
    architectures = tables.read("recurrent_persistent", check_table)
    own = architectures.get(architecture, architectures["default"])
    return Table(own["proven_on"], tuple(own["rows"]))


# -------------------------------------------------------------------------------- who runs at once


class Place(NamedTuple):
    """Where a plan runs: the table's name of it, its multiprocessors, whether programs run at once."""

    architecture: str
    multiprocessors: int
    at_once: bool = True


class Multiprocessor(NamedTuple):
    """What the programs on one multiprocessor share."""

    threads: int
    registers: int
    shared_bytes: int
    reserved_bytes: int
    warp_size: int


class Footprint(NamedTuple):
    """What one program of a compiled kernel takes; registers a thread."""

    warps: int
    registers: int
    shared_bytes: int


# Registers are given to warps in portions of so many.
REGISTER_PORTION = 256


def place_of(device: torch.device) -> Place:
    """The plan's view of a device."""
    if device.type != "cuda":
        return Place("default", INTERPRETED_MULTIPROCESSORS, at_once=False)
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return Place(architecture_of(device), count)


def multiprocessor_of(device: torch.device) -> Multiprocessor:
    """The limits of a GPU's multiprocessors. NVIDIA's driver keeps 1 KiB of shared memory a program."""
    facts = torch.cuda.get_device_properties(device)
    return Multiprocessor(
        facts.max_threads_per_multi_processor,
        facts.regs_per_multiprocessor,
        facts.shared_memory_per_multiprocessor,
        0 if torch.version.hip else 1024,
        facts.warp_size,
    )


def programs_at_once(limits: Multiprocessor, footprint: Footprint) -> int:
    """How many programs one multiprocessor holds at a time."""
    warp_registers = max(footprint.registers, 1) * limits.warp_size
    portions = -(-warp_registers // REGISTER_PORTION) * REGISTER_PORTION
    shared_bytes = footprint.shared_bytes + limits.reserved_bytes
    bounds = [
        limits.threads // (footprint.warps * limits.warp_size),
        limits.registers // portions // footprint.warps,
        *([limits.shared_bytes // shared_bytes] if shared_bytes else []),
    ]
    return min(bounds)


def residency_refusal(
    programs: int, multiprocessors: int, limits: Multiprocessor, footprint: Footprint
) -> str | None:
    """Why so many programs cannot all run at once, or None where they can."""
    each = programs_at_once(limits, footprint)
    if programs <= multiprocessors * each:
        return None
    return (
        f"{programs} programs must run at once, this GPU holds {multiprocessors * each} ({each} on each of "
        f"{multiprocessors} multiprocessors, at {footprint.warps} warps, {footprint.registers} registers a "
        f"thread and {footprint.shared_bytes} bytes of shared memory a program)"
    )


def kind_of(value: Tensor | int | None) -> tuple:
    """What the compiler knows of an argument: its type, what divides it, whether it is 1."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    return type(value), value == 1, value is not None and value % 16 == 0


_footprints: dict[tuple, Footprint] = {}


def footprint_of(launch: Launch, device: torch.device) -> Footprint:
    """Compile a launch's kernel, without running it, and read what one program takes."""
    kinds = tuple(kind_of(value) for value in launch.arguments.values())
    key = (device, launch.kernel.__name__, kinds, *launch.constants.items(), *launch.options.items())
    if key not in _footprints:
        with torch.cuda.device(device):
            compiled = launch.kernel.warmup(
                grid=(launch.grid,), **launch.arguments, **launch.constants, **launch.options
            )
            compiled._init_handles()
        metadata = compiled.metadata
        _footprints[key] = Footprint(metadata.num_warps, compiled.n_regs, metadata.shared)
    return _footprints[key]


def need_resident(launch: Launch, device: torch.device) -> None:
    """Raise NotImplementedError where the programs of a launch cannot all run at once."""
    place, limits = place_of(device), multiprocessor_of(device)
    refused = residency_refusal(launch.grid, place.multiprocessors, limits, footprint_of(launch, device))
    if refused:
        raise NotImplementedError(f"persistent recurrent kernel: {refused}")


# -------------------------------------------------------------------------------- expired barriers


@functools.cache
def alarm_of(device: torch.device) -> Tensor:
    """One int32 that a kernel sets where a barrier expires: host memory, so reading it waits for nothing."""
    return torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")


def raise_alarm(device: torch.device) -> None:
    """Raise RuntimeError once where an earlier launch's barrier expired."""
    alarm = alarm_of(device)
    if alarm.item():
        alarm.zero_()
        raise RuntimeError(
            f"an earlier persistent recurrent kernel on {device} gave up waiting for its own programs, and "
            "its results are NaN: the programs did not run at once. Run the layer again while nothing else "
            "holds the GPU, or on backend 'torch'"
        )


# -------------------------------------------------------------------------------- plans


def product_of(layer: Layer) -> str:
    """The table's name of what a layer's products run on."""
    return layer.precision if layer.dtype == torch.float32 else "16"


def groups_of(layer: Layer, tile: Tile) -> int:
    """Groups of programs that wait for each other: one for each direction of a batch tile."""
    return layer.directions * -(-layer.batch // tile.block_b)


def shards_of(layer: Layer, tile: Tile) -> int:
    """Programs of a group."""
    return -(-layer.hidden_size // tile.units)


def waves_of(tile: Tile, place: Place) -> int:
    """How many waves of a program arrive on their own: see recurrent_barrier."""
    return tile.num_warps if place.architecture.startswith("gfx") else 0


def arrivals_of(layer: Layer, tile: Tile, place: Place) -> int:
    """What one round adds to a group's counter."""
    return shards_of(layer, tile) * max(waves_of(tile, place), 1)


def tile_from(row: dict[str, Any]) -> Tile:
    return Tile(**{field.name: row[field.name] for field in fields(Tile)})


def row_of(layer: Layer, kernel: str, place: Place) -> dict[str, Any] | None:
    """The first row of the table by which the layer's programs find a multiprocessor each."""
    wanted = (kernel, "rnn" if layer.gates == 1 else "gated", product_of(layer))
    for row in table_of(place.architecture).rows:
        programs = groups_of(layer, tile_from(row)) * shards_of(layer, tile_from(row))
        reaches = layer.hidden_size <= row["hidden_up_to"] and programs <= place.multiprocessors
        if (row["kernel"], row["cell"], row["product"]) == wanted and reaches:
            return row
    return None


def refusals(layer: Layer, kernel: str, place: Place) -> Iterator[str]:
    """Why the kernel ("forward" or "backward") cannot run a layer at a place; nothing where it can."""
    if layer.proj_size:
        yield f"proj_size={layer.proj_size}, needs none"
    if layer.packed and layer.capturing:
        yield "packed sequences in a CUDA graph, needs lengths on the host at every replay"
    row = row_of(layer, kernel, place)
    if row is None:
        yield (
            f"hidden_size={layer.hidden_size}, batch={layer.batch}, directions={layer.directions}: no tile "
            f"of the {kernel} (product {product_of(layer)}) gives each of its programs one of "
            f"{place.multiprocessors} multiprocessors"
        )
    elif (layer.steps + 1) * arrivals_of(layer, tile_from(row), place) >= EXPIRED.value:
        yield f"steps={layer.steps}, more than the barrier counts"


def checked_tile(layer: Layer, kernel: str, place: Place) -> Tile:
    """The tile, or NotImplementedError with all the reasons why there is none."""
    reasons = list(refusals(layer, kernel, place))
    if reasons:
        raise NotImplementedError(f"persistent recurrent kernel: {'; '.join(reasons)}")
    return tile_from(row_of(layer, kernel, place))


class State(NamedTuple):
    """A state that a launch takes over and hands on: the kernel's name of it, and its tensors or None."""

    name: str
    before: Tensor | None
    after: Tensor | None


def states_of(layer: Layer) -> int:
    """How many states a cell carries: lstm h and c, the others h."""
    return 2 if layer.mode == "lstm" else 1


def plan_steps(
    layer: Layer, kernel: Any, steps: int, chunks: int, tile: Tile, place: Place,
    arguments: dict[str, Any], states: list[State], rows: Tensor, alarm: Tensor,
) -> list[Launch]:  # fmt: skip
    """All steps in one launch where the programs can wait for each other, else a launch for every step.

    Args:
        steps: of the kernel.
        chunks: pieces into which the kernel cuts its products.
        states: handed from launch to launch in float32.
        rows: the tensor of all steps' results.
        alarm: what `alarm_of` gives.
    """
    groups, shards = groups_of(layer, tile), shards_of(layer, tile)
    length = steps if place.at_once or groups * shards == 1 else 1
    flags = torch.zeros((groups + 1) * COUNTER_STRIDE, dtype=torch.int32, device=rows.device)
    failed = flags[groups * COUNTER_STRIDE :]
    shape = (layer.directions, layer.batch, layer.hidden_size)
    carried = {}
    if length < steps:
        carried = {state.name: torch.empty(shape, device=rows.device) for state in states}
    options = dict(num_warps=tile.num_warps, num_stages=1)
    if place.architecture.startswith("sm_"):
        options["maxnreg"] = MAX_REGISTERS
    if place.at_once and length > 1:
        options["launch_cooperative_grid"] = True
    launches = []
    for begin in range(0, steps, length):
        handed = {}
        for state in states:
            handed[f"{state.name}_from_ptr"] = state.before if begin == 0 else carried[state.name]
            handed[f"{state.name}_to_ptr"] = state.after if begin + length == steps else carried[state.name]
        launches.append(
            Launch(
                kernel=kernel,
                grid=groups * shards,
                arguments=arguments | handed | dict(
                    counters_ptr=flags, failed_ptr=failed, alarm_ptr=alarm,
                    step_begin=begin, step_end=begin + length, T=layer.steps, B=layer.batch, N=layer.rows,
                    H=layer.hidden_size, shards=shards, spin_limit=SPIN_LIMIT,
                ),
                constants=dict(
                    MODE=MODES[layer.mode], DIRECTIONS=layer.directions, PRECISION=layer.precision,
                    BARRIER=length > 1, WAVES=waves_of(tile, place), COUNTER_STRIDE=COUNTER_STRIDE,
                    UNITS=tile.units, BLOCK_B=tile.block_b, BLOCK_K=tile.block_k, CHUNKS=chunks,
                    RESIDENT=min(tile.resident, chunks), AHEAD=min(tile.ahead, chunks),
                    ALIGN=gcd(layer.hidden_size, VECTOR_UNITS),
                ),
                options=options,
            )
        )  # fmt: skip
    if length > 1:
        launches.append(plan_expiry(failed, rows, [state.after for state in states], place))
    return launches


def plan_expiry(failed: Tensor, rows: Tensor, states: list[Tensor | None], place: Place) -> Launch:
    """The launch that fills the results with NaN where the launch before it has failed."""
    numel = next((state.numel() for state in states if state is not None), 0)
    return Launch(
        kernel=recurrent_expiry_kernel,
        grid=min(-(-rows.numel() // EXPIRY_BLOCK), place.multiprocessors),
        arguments=dict(
            failed_ptr=failed, rows_ptr=rows, h_ptr=states[0], c_ptr=states[1] if len(states) > 1 else None,
            rows_numel=rows.numel(), state_numel=numel,
        ),
        constants=dict(BLOCK=EXPIRY_BLOCK),
        options=dict(num_warps=4, num_stages=1),
    )  # fmt: skip


def plan_forward(
    layer: Layer, xg: Tensor, w: Tensor, b_hn: Tensor | None, states: tuple[Tensor, Tensor | None],
    index: tuple[Tensor, Tensor] | None, results: tuple[Tensor | None, ...], place: Place, alarm: Tensor,
) -> list[Launch]:  # fmt: skip
    """The launches of `forward`."""
    tile = checked_tile(layer, "forward", place)
    starts, lengths = index or (None, None)
    output, h_n, c_n, gates, cells = results
    arguments = dict(
        xg_ptr=xg, w_ptr=w, b_hn_ptr=b_hn, h0_ptr=states[0], starts_ptr=starts, lengths_ptr=lengths,
        output_ptr=output, gates_ptr=gates, cells_ptr=cells, c_from_ptr=None, c_to_ptr=None,
    )  # fmt: skip
    handed = [State("h", states[0], h_n), State("c", states[1], c_n)][: states_of(layer)]
    chunks = -(-layer.hidden_size // tile.block_k)
    return plan_steps(
        layer, recurrent_persistent_forward_kernel, layer.steps, chunks, tile, place, arguments, handed,
        output, alarm,
    )  # fmt: skip


def plan_backward(
    layer: Layer, incoming: tuple[Tensor | None, ...], w: Tensor, states: tuple[Tensor, Tensor | None],
    index: tuple[Tensor, Tensor] | None, saved: tuple[Tensor | None, ...], results: tuple[Tensor | None, ...],
    place: Place, alarm: Tensor,
) -> list[Launch]:  # fmt: skip
    """The launches of `backward`: one step more than the layer has, which computes the gradient of h0."""
    tile = checked_tile(layer, "backward", place)
    starts, lengths = index or (None, None)
    grad_output, grad_h_n, grad_c_n = incoming
    dpre, grad_h0, grad_c0 = results
    strides = (0, 0) if grad_output is None else grad_output.stride()
    arguments = dict(
        dy_ptr=grad_output, w_ptr=w, h0_ptr=states[0], c0_ptr=states[1], starts_ptr=starts,
        lengths_ptr=lengths, output_ptr=saved[0], gates_ptr=saved[1], cells_ptr=saved[2], dpre_ptr=dpre,
        stride_dyn=strides[0], stride_dyp=strides[1], dc_from_ptr=None, dc_to_ptr=None,
    )  # fmt: skip
    handed = [State("dh", grad_h_n, grad_h0), State("dc", grad_c_n, grad_c0)][: states_of(layer)]
    parts = PARTS.value if layer.gates == 1 else 1
    chunks = -(-layer.hidden_size // (parts * tile.block_k))
    return plan_steps(
        layer, recurrent_persistent_backward_kernel, layer.steps + 1, chunks, tile, place, arguments,
        handed, dpre, alarm,
    )  # fmt: skip


# -------------------------------------------------------------------------------- calls


def run(launches: list[Launch], device: torch.device) -> None:
    """Run a plan on the device's current stream; first check that its programs can wait for each other."""
    for launch in launches:
        if launch.options.get("launch_cooperative_grid"):
            need_resident(launch, device)
        launch.run(device)


def forward(
    layer: Layer, xg: Tensor, w: Tensor, b_hn: Tensor | None, states: tuple[Tensor, Tensor | None],
    index: tuple[Tensor, Tensor] | None, results: tuple[Tensor | None, ...],
) -> None:  # fmt: skip
    """Run a layer's steps; formulas: recurrent_persistent_forward.

    Args:
        xg: (N, D * G * H) float32, contiguous: x W_ih^T with all biases but gru's b_hn.
        w: (D, G * H, H) contiguous, float32, float16 or bfloat16.
        b_hn: (D, H) float32, for gru with biases.
        states: h0 and c0, (D, B, H) contiguous, w's dtype; c0 None but for lstm.
        index: packed, (T,) the row of each step's first sequence and (B,) steps of each sequence.
        results: output (N, D * H), h_n and c_n (D, B, H), gates (D, N, 4 * H), cells (D, N, H) float32, to be
            filled where not None.

    Raises:
        NotImplementedError: the programs cannot all run at once.
        RuntimeError: the barrier of an earlier launch expired.
    """
    raise_alarm(w.device)
    place, alarm = place_of(w.device), alarm_of(w.device)
    run(plan_forward(layer, xg, w, b_hn, states, index, results, place, alarm), w.device)


def backward(
    layer: Layer, incoming: tuple[Tensor | None, ...], w: Tensor, states: tuple[Tensor, Tensor | None],
    index: tuple[Tensor, Tensor] | None, saved: tuple[Tensor | None, ...], results: tuple[Tensor | None, ...],
) -> None:  # fmt: skip
    """Run a layer's steps backward; formulas: recurrent_persistent_backward.

    Args:
        incoming: gradients of output (N, D * H) of any strides, and of h_n and c_n (D, B, H), contiguous;
            None is zero.
        saved: output, gates and cells as `forward` fills them, None where the cell has none.
        results: dpre (D, N, 4 * H), lstm's i f g o, gru's n r z q (an rnn's (D, N, H)), and the gradients of
            h0 and c0 (D, B, H), to be filled where not None. The other arguments are those of `forward`.

    Raises:
        NotImplementedError: the programs cannot all run at once.
        RuntimeError: the barrier of an earlier launch expired.
    """
    raise_alarm(w.device)
    place, alarm = place_of(w.device), alarm_of(w.device)
    run(plan_backward(layer, incoming, w, states, index, saved, results, place, alarm), w.device)
