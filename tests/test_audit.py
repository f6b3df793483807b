"""The compile audit: its parsers on canned machine code, its checks and cache, and the audit itself (marker
audit)."""

from __future__ import annotations

import json
import math

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from benchmarks import audit, audit_compile, machine_code  # noqa: E402
from pyarch.triton_kernels import (  # noqa: E402
    attention_audit,
    attention_decode_audit,
    attention_tuning,
    attention_varlen_audit,
    conv_audit,
    recurrent_audit,
    recurrent_tuning,
    tuning,
)
from pyarch.triton_kernels.launch import Launch, Requirement  # noqa: E402

RESOURCES = """
Resource usage:
 Common:
  GLOBAL:0
 Function kernel:
  REG:255 STACK:24 SHARED:1024 LOCAL:0 CONSTANT[0]:576 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = """
        /*01e0*/               @P0 LDG.E.128 R4, desc[UR4][R8.64] ;               /* 0x0000000408040981 */
        /*01f0*/                   LDG.E.U16 R10, desc[UR4][R10.64] ;             /* 0x000000040a0a7981 */
        /*0200*/                   LDG.E.64 R12, desc[UR4][R10.64] ;              /* 0x000000040a0a7981 */
        /*0210*/                   LDG.E.ENL2.256 R12, R16, desc[UR4][R10.64] ;   /* 0x000000040a0a7981 */
        /*0520*/                   STL [R1+0xc], R10 ;                            /* 0x00000c0a01007387 */
        /*0530*/                   LDL.LU R28, [R1] ;                             /* 0x00000000011c7983 */
        /*0540*/                   LDS R28, [R1] ;                                /* 0x00000000011c7983 */
        /*0550*/                   HGMMA.64x64x16.F32 R24, gdesc[UR4], !UPT ;     /* 0x00e00000041879f0 */
        /*0560*/                   HGMMA.64x64x16.F32 R24, gdesc[UR8], R24 ;      /* 0x00e00000041879f0 */
        /*0570*/                   STG.E.128 desc[UR4][R2.64], R4 ;               /* 0x0000000402007986 */
"""
AMDGCN = """
	global_load_dwordx4 v[2:5], v[0:1], off
	buffer_load_dwordx4 v[6:9], v10, s[4:7], 0 offen
	global_load_ushort v4, v[0:1], off
	global_store_dwordx2 v[0:1], v[2:3], off
	v_mfma_f32_32x32x8_bf16 v[0:15], v[16:17], v[18:19], v[0:15]
    .group_segment_fixed_size: 4096
    .private_segment_fixed_size: 16
    .sgpr_spill_count: 3
    .vgpr_count:     108
    .vgpr_spill_count: 2
"""
CLEAN = {
    "kernel": "kernel",
    "config": "case",
    "target": "sm_90",
    "registers": 32,
    "stack": 0,
    "spills": 0,
    "shared_bytes": 0,
    "tensor_core": {"opcode": None, "count": 0},
    "vector_loads": 0.5,
    "vector_stores": 1.0,
}


def test_audit_reads_nvidia_machine_code():
    assert machine_code.nvidia_figures(RESOURCES, SASS) == {
        "registers": 255,
        "stack": 24,
        "spills": 2,
        "shared_bytes": 1024,
        "tensor_core": {"opcode": "HGMMA", "count": 2},
        "vector_loads": 0.5,
        "vector_stores": 1.0,
    }


@pytest.mark.parametrize(
    "opcode", ["HMMA.16816.F32.BF16", "UTCHMMA gdesc", "IMMA.16832.S8.S8", "QGMMA.64x8x32.F32"]
)
def test_audit_knows_tensor_core_opcodes(opcode):
    figures = machine_code.nvidia_figures(RESOURCES, f"  /*0010*/   {opcode} R4, R8, R12, R4 ;")
    assert figures["tensor_core"] == {"opcode": opcode.split(".")[0].split()[0], "count": 1}


def test_audit_reads_amd_machine_code():
    assert machine_code.amd_figures(AMDGCN) == {
        "registers": 108,
        "stack": 16,
        "spills": 2,
        "shared_bytes": 4096,
        "tensor_core": {"opcode": "v_mfma_f32_32x32x8_bf16", "count": 1},
        "vector_loads": 0.667,
        "vector_stores": 0.0,
    }


def test_audit_refuses_text_without_figures():
    with pytest.raises(ValueError, match="no REG, STACK and SHARED"):
        machine_code.nvidia_figures("cuobjdump: error", SASS)
    with pytest.raises(ValueError, match="no .vgpr_count"):
        machine_code.amd_figures("s_endpgm")


@pytest.mark.parametrize(
    ("change", "requirement", "message"),
    [
        ({"spills": 3}, Requirement(), "spills=3, needs 0"),
        ({"stack": 8}, Requirement(), "stack=8 bytes, needs 0"),
        ({"shared_bytes": 240_000}, Requirement(), "shared memory=240000 bytes, needs at most 232448"),
        ({}, Requirement(wide_loads=0.6), "128-bit loads=50%, declared 60%"),
        ({"vector_stores": 0.0}, Requirement(wide_stores=0.1), "128-bit stores=0%, declared 10%"),
        ({}, Requirement(tensor_core=True), "no tensor-core opcode, declared one"),
        ({}, Requirement(opcodes={"sm_90": "HGMMA"}), "tensor-core opcode=None, declared HGMMA"),
    ],
)
def test_audit_names_what_is_wrong(change, requirement, message):
    assert audit.problems(CLEAN | change, requirement) == [message]


def test_audit_finds_nothing_wrong_with_a_clean_kernel():
    core = {"tensor_core": {"opcode": "HGMMA", "count": 4}}
    assert audit.problems(CLEAN | core, Requirement(0.5, 1.0, tensor_core=True)) == []


def test_audit_cache_keeps_figures(tmp_path):
    figures = {name: CLEAN[name] for name in audit.FIGURES}
    audit.write_cache(tmp_path / "new" / "audit.json", {"key": figures})
    assert audit.read_cache(tmp_path / "new" / "audit.json") == {"key": figures}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["audit.json"]


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"schema": 0, "entries": {}}', '{"schema": 1, "entries": {"key": {"registers": "many"}}}'],
)
def test_audit_ignores_a_corrupt_cache_with_one_warning(tmp_path, text):
    path = tmp_path / "audit.json"
    path.write_text(text)
    with pytest.warns(UserWarning, match="audit.json is ignored") as warned:
        assert audit.read_cache(path) == {}
    assert len(warned) == 1


def test_audit_refuses_an_unknown_target():
    with pytest.raises(ValueError, match=r"targets \['sm_75'\], needs names out of"):
        audit.audit(["sm_75"])


def test_audit_refuses_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="unset it for the audit"):
        audit.audit(["sm_90"])


@pytest.mark.parametrize("target", audit.TARGETS)
def test_audit_reaches_every_row_of_the_tile_table(target, monkeypatch):
    asked = []
    look_up = tuning.Tuning.tile

    def tile(self, kernel, layout, bits, taps):
        asked.append(((kernel, layout, bits), taps))
        return look_up(self, kernel, layout, bits, taps)

    monkeypatch.setattr(tuning.Tuning, "tile", tile)
    for case in conv_audit.AUDIT:
        case.launches(target)
    served = dict.fromkeys((key for key, _ in asked), 0)
    for row in tuning.tuning("conv", target).rows:
        key = (row["kernel"], row["layout"], row["bits"])
        above, up_to = served[key], math.inf if row["taps_up_to"] is None else row["taps_up_to"]
        # A row that an earlier one hides is reached by no call at all.
        if up_to > above:
            assert any(asked_key == key and above < taps <= up_to for asked_key, taps in asked), row
            served[key] = up_to


@pytest.mark.parametrize("target", audit.TARGETS)
def test_audit_reaches_every_row_of_the_recurrent_tile_table(target, monkeypatch):
    asked = []
    look_up = recurrent_tuning.Tuning.tile

    def tile(self, kernel, cell, product, hidden_size):
        asked.append(((kernel, cell, product), hidden_size))
        return look_up(self, kernel, cell, product, hidden_size)

    monkeypatch.setattr(recurrent_tuning.Tuning, "tile", tile)
    launches = [launch for case in recurrent_audit.AUDIT for launch in case.launches(target)]
    assert {launch.kernel.__name__ for launch in launches} == set(recurrent_audit.WIDE_LOADS)
    served = {}
    for row in recurrent_tuning.tuning(target).rows:
        key = recurrent_tuning.key_of(row)
        above, up_to = served.get(key, 0), math.inf if row["hidden_up_to"] is None else row["hidden_up_to"]
        # AMD's matrix units have no tf32: a call there asks for ieee, and the rows that it inherits are idle.
        if up_to > above and not (target == "gfx942" and key[2] == "tf32"):
            assert any(asked_key == key and above < size <= up_to for asked_key, size in asked), row
            served[key] = up_to


@pytest.mark.parametrize("target", audit.TARGETS)
def test_audit_reaches_every_row_of_the_attention_tile_table(target, monkeypatch):
    asked = []
    look_up = attention_tuning.Tuning.tile

    def tile(self, kernel, product, scores, width):
        asked.append((kernel, product, scores, width))
        return look_up(self, kernel, product, scores, width)

    monkeypatch.setattr(attention_tuning.Tuning, "tile", tile)
    for case in (*attention_audit.AUDIT, *attention_varlen_audit.AUDIT, *attention_decode_audit.AUDIT):
        case.launches(target)
    rows = attention_tuning.tuning(target).rows
    # AMD's matrix units have no tf32: a call there asks for ieee, and the rows that it inherits are idle.
    idle = "tf32" if target == "gfx942" else None
    reached = [next(row for row in rows if attention_tuning.fits(row, *key)) for key in asked]
    assert [row for row in rows if row not in reached and row["product"] != idle] == []


def test_audit_derives_what_the_runtime_derives():
    x = torch.empty(64, dtype=torch.bfloat16, device="meta")
    launch = Launch(spill, 1, {"x_ptr": x, "y_ptr": None, "n": 1, "m": 48}, {"COUNT": 4})
    signature, constants, attributes = audit_compile.source_of(launch)
    assert signature == {
        "x_ptr": "*bf16",
        "y_ptr": "constexpr",
        "n": "constexpr",
        "m": "i32",
        "COUNT": "constexpr",
    }
    assert constants == {"y_ptr": None, "n": 1, "COUNT": 4}
    assert attributes == {(0,): [["tt.divisibility", 16]], (3,): [["tt.divisibility", 16]]}


@triton.jit
def spill(x_ptr, y_ptr, n, m, COUNT: tl.constexpr):
    """Carry COUNT values over a loop: more than the registers of a program's threads hold."""
    lanes = tl.arange(0, COUNT)
    values = tl.load(x_ptr + lanes)
    for step in range(m):
        values = values * tl.load(x_ptr + step) + n
    tl.store(y_ptr + lanes, values)


@pytest.mark.audit
@pytest.mark.parametrize(("target", "warps"), [("sm_90", 4), ("gfx942", 1)])
def test_audit_flags_a_kernel_that_spills(target, warps, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointers = {name: torch.empty(2**16, dtype=torch.float32, device="meta") for name in ("x_ptr", "y_ptr")}
    launch = Launch(spill, 1, pointers | {"n": 7, "m": 9}, {"COUNT": 2**16}, {"num_warps": warps})
    facts = audit.TARGETS[target]
    figures = audit_compile.compile_figures(launch, facts.backend, facts.architecture, facts.warp_size)
    found = audit.problems(figures | {"target": target}, Requirement())
    assert any(problem.startswith("spills=") for problem in found)
    assert any(problem.startswith("stack=") for problem in found)


@pytest.mark.audit
@pytest.mark.timeout(1200)
def test_audit_finds_no_problem_in_any_kernel(capsys):
    rows = audit.audit()
    bad = [
        f"{row['target']} {row['kernel']} [{row['config']}]: {row['problems']}"
        for row in rows
        if row["problems"]
    ]
    assert not bad, "\n".join(bad)
    assert {row["target"] for row in rows} == set(audit.TARGETS)
    json.dumps(rows)
