"""The persistent recurrent kernels without running them: who may wait for whom, the tiles, the machine code.

Plans are pure metadata, so the limits of GPUs that are not here are held to numbers counted by hand.
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from benchmarks import audit  # noqa: E402
from benchmarks.audit_compile import source_of  # noqa: E402
from pyarch.triton_kernels import recurrent_persistent as persistent  # noqa: E402
from pyarch.triton_kernels.recurrent_persistent_audit import (  # noqa: E402
    AUDIT,
    MULTIPROCESSORS,
    AuditCase,
)

# -------------------------------------------------------------------------------- who runs at once

KIB = 1024
H200 = persistent.Multiprocessor(2048, 65536, 228 * KIB, KIB, 32)
A100 = persistent.Multiprocessor(2048, 65536, 164 * KIB, KIB, 32)
MI300 = persistent.Multiprocessor(2048, 131072, 64 * KIB, 0, 64)


@pytest.mark.parametrize(
    ("limits", "footprint", "programs"),
    [
        (H200, persistent.Footprint(4, 255, 80 * KIB), 2),
        (H200, persistent.Footprint(4, 255, 160 * KIB), 1),
        (H200, persistent.Footprint(4, 128, 16 * KIB), 4),
        (H200, persistent.Footprint(4, 129, 16 * KIB), 3),
        (H200, persistent.Footprint(8, 255, 227 * KIB), 1),
        (H200, persistent.Footprint(8, 255, 228 * KIB), 0),
        (A100, persistent.Footprint(4, 255, 80 * KIB), 2),
        (A100, persistent.Footprint(4, 255, 82 * KIB), 1),
        (A100, persistent.Footprint(4, 255, 164 * KIB), 0),
        (MI300, persistent.Footprint(4, 256, 0), 2),
        (MI300, persistent.Footprint(4, 128, 32 * KIB), 2),
        (MI300, persistent.Footprint(4, 64, 0), 8),
    ],
)
def test_recurrent_persistent_counts_programs_at_once(limits, footprint, programs):
    assert persistent.programs_at_once(limits, footprint) == programs


def test_recurrent_persistent_refuses_more_programs_than_run_at_once():
    footprint = persistent.Footprint(4, 255, 80 * KIB)
    assert persistent.residency_refusal(264, 132, H200, footprint) is None
    refused = persistent.residency_refusal(265, 132, H200, footprint)
    assert "265 programs must run at once, this GPU holds 264 (2 on each of 132 multiprocessors" in refused
    assert "4 warps, 255 registers a thread and 81920 bytes" in refused


def layer_like(**changes):
    return replace(AuditCase("lstm", 20, batch=3, dtype=torch.float32).layer("default"), **changes)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"proj_size": 8}, "proj_size=8, needs none"),
        ({"hidden_size": 16 * 65}, "hidden_size=1040, batch=3, directions=1: no tile of the forward"),
        ({"batch": 16 * 33}, r"one of 64 multiprocessors"),
        ({"steps": 1 << 29}, "steps=536870912, more than the barrier counts"),
        ({"packed": True, "capturing": True}, "packed sequences in a CUDA graph"),
    ],
)
def test_recurrent_persistent_refuses_by_name(changes, text):
    layer = layer_like(**changes)
    with pytest.raises(NotImplementedError, match=f"persistent recurrent kernel: .*{text}"):
        persistent.checked_tile(layer, "forward", persistent.Place("default", 64))


def test_recurrent_persistent_takes_more_programs_for_fewer_multiprocessors_nowhere():
    for architecture, count in MULTIPROCESSORS.items():
        for case in AUDIT:
            for launch in case.launches(architecture):
                assert launch.grid <= count


def test_recurrent_persistent_audit_reaches_every_row():
    for architecture in MULTIPROCESSORS:
        place = persistent.Place(architecture, MULTIPROCESSORS[architecture])
        reached = set()
        for case in AUDIT:
            for kernel in ("forward", "backward"):
                row = persistent.row_of(case.layer(architecture), kernel, place)
                reached |= set() if row is None else {tuple(row.items())}
        rows = persistent.table_of(architecture).rows
        assert [row for row in rows if tuple(row.items()) not in reached] == []


def test_recurrent_persistent_is_proven_nowhere_yet():
    assert {persistent.table_of(name).proven_on for name in MULTIPROCESSORS} == {None}


ROW = dict(
    kernel="forward", cell="gated", product="16", hidden_up_to=64, block_b=16, units=16, block_k=64,
    num_warps=4, resident=1, ahead=1,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema: needs 1"),
        ({"architectures": {}}, 'architectures: needs an object with "default"'),
        ({"architectures": {"default": {"rows": []}}}, "default.proven_on: needs a device name or null"),
        (
            {"architectures": {"default": {"proven_on": None, "rows": [{}]}}},
            r"default.rows\[0\]: needs exactly",
        ),
        (
            {"architectures": {"default": {"proven_on": None, "rows": [ROW | {"units": 12}]}}},
            r"default.rows\[0\].units: needs a power of two, not 12",
        ),
        (
            {"architectures": {"default": {"proven_on": None, "rows": [ROW | {"cell": "qrnn"}]}}},
            r"default.rows\[0\].cell: needs one of .*, not 'qrnn'",
        ),
    ],
)
def test_recurrent_persistent_table_errors_name_the_place(change, message):
    with pytest.raises(ValueError, match=message):
        persistent.check_table({"schema": 1, "architectures": {}} | change, "recurrent_persistent.json")


# -------------------------------------------------------------------------------- in machine code


def compiled(target: str, kernel: str) -> dict[str, str]:
    """What the compiler made of a small lstm's kernel, by stage."""
    launches = AuditCase("lstm", 64).launches(target)
    launch = next(launch for launch in launches if kernel in launch.kernel.__name__)
    chip = audit.TARGETS[target]
    signature, constants, attributes = source_of(launch, amd=chip.backend == "hip")
    source = triton.compiler.ASTSource(launch.kernel, signature, constants, attributes)
    place = GPUTarget(chip.backend, chip.architecture, chip.warp_size)
    return triton.compile(source, target=place, options=dict(launch.options)).asm


@pytest.mark.audit
@pytest.mark.parametrize("kernel", ["forward", "backward"])
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_recurrent_persistent_reads_behind_the_wait(target, kernel):
    steps = compiled(target, kernel)["ttgir"].partition("scf.for")[2]
    acquire, exchange, release = (
        steps.index(text) for text in ("add, acquire, gpu", "cacheModifier = cg", "add, release")
    )
    assert acquire < exchange < release
    assert "cacheModifier = cg" not in steps[:acquire]


@pytest.mark.audit
@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_recurrent_persistent_publishes_all_threads_stores_on_nvidia(kernel):
    code = compiled("sm_90", kernel)["ptx"]
    before = code[: code.index("atom.global.gpu.release.add.u32")]
    assert before.rindex("bar.sync") > before.rindex("st.global")


@pytest.mark.audit
@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_recurrent_persistent_publishes_every_waves_stores_on_amd(kernel):
    assembly = compiled("gfx942", kernel)
    lines = assembly["amdgcn"].splitlines()
    code = [line.strip() for line in lines if line.startswith("\t") and not line.startswith("\t.")]
    adds = [place for place, line in enumerate(code) if line.startswith("global_atomic_add ")]
    assert len(adds) == 1
    assert code[adds[0] - 2].startswith("buffer_wbl2") and "vmcnt(0)" in code[adds[0] - 1]
    release = next(line for line in assembly["ttgir"].splitlines() if "add, release" in line)
    layout = re.search(r"tensor<256xi32, (#\w+)>", release)[1]
    assert (
        f"{layout} = #ttg.blocked<{{sizePerThread = [1], threadsPerWarp = [64], warpsPerCTA = [4]"
        in (assembly["ttgir"])
    )
