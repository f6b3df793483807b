"""What the Triton kernels of recurrent layers decide from metadata, their table of tiles, and their gates."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from pyarch.triton_kernels import recurrent, recurrent_paths, recurrent_persistent  # noqa: E402
from pyarch.triton_kernels import recurrent_tuning as tuning  # noqa: E402
from pyarch.triton_kernels.recurrent_gates import sigmoid, tanh  # noqa: E402
from pyarch.triton_kernels.recurrent_persistent import Place, Table, table_of  # noqa: E402
from pyarch.triton_kernels.recurrent_plan import Layer, precision_on  # noqa: E402

OPERATOR = "recurrent"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreter = pytest.mark.skipif(not INTERPRETED, reason="interpreter tests run with TRITON_INTERPRET=1")
LAYER = Layer(
    mode="lstm", dtype=torch.bfloat16, precision="ieee", steps=100, batch=32, rows=3200, hidden_size=128,
    proj_size=0, directions=2, packed=False, capturing=False, architecture="sm_90",
)  # fmt: skip
H200 = Place("sm_90", 132)


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({}, "resident"),
        ({"batch": 4096, "directions": 1}, "resident"),
        ({"hidden_size": 1}, "resident"),
        ({"hidden_size": 127, "packed": True}, "resident"),
        ({"hidden_size": 129}, "step"),
        ({"mode": "rnn_relu", "hidden_size": 256}, "resident"),
        ({"mode": "rnn_relu", "hidden_size": 257}, "step"),
        ({"steps": 1}, "step"),
        ({"proj_size": 64}, "step"),
        ({"packed": True, "capturing": True}, "step"),
        ({"capturing": True}, "resident"),
        ({"dtype": torch.float32, "hidden_size": 128}, "step"),
        ({"dtype": torch.float32, "hidden_size": 64}, "resident"),
        ({"dtype": torch.float32, "hidden_size": 64, "precision": "tf32"}, "resident"),
        ({"mode": "gru", "dtype": torch.float32, "precision": "tf32"}, "resident"),
        ({"mode": "gru", "dtype": torch.float32, "precision": "tf32", "architecture": "sm_80"}, "step"),
        ({"architecture": "gfx942"}, "resident"),
        ({"architecture": "gfx942", "mode": "rnn_tanh", "hidden_size": 256}, "step"),
        ({"architecture": "sm_120"}, "resident"),
    ],
    ids=str,
)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_recurrent_path_of_a_layer(change, path, direction):
    layer = replace(LAYER, **change)
    assert recurrent_paths.path_of(layer, direction, Place(layer.architecture, 132)) == path


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_recurrent_waits_between_programs_only_where_proven(direction, monkeypatch):
    layer = replace(LAYER, hidden_size=512, batch=16)
    assert not recurrent_paths.refusals("persistent", layer, direction, H200)
    monkeypatch.setattr(recurrent_persistent, "table_of", lambda name: Table(None, table_of(name).rows))
    assert recurrent_paths.path_of(layer, direction, H200) == "step"
    monkeypatch.setattr(recurrent_persistent, "table_of", lambda name: Table("a GPU", table_of(name).rows))
    assert recurrent_paths.path_of(layer, direction, H200) == "persistent"
    assert recurrent_paths.path_of(LAYER, direction, H200) == "resident"


def test_recurrent_path_asked_for_by_name():
    assert recurrent_paths.checked_path("step", LAYER, "forward", H200) == "step"
    with pytest.raises(ValueError, match="path='fast', needs one of"):
        recurrent_paths.checked_path("fast", LAYER, "forward", H200)
    refused = replace(LAYER, proj_size=4, hidden_size=1000)
    with pytest.raises(
        NotImplementedError,
        match=r"path resident: proj_size=4, needs none; hidden_size=1000, its weight does not stay on chip",
    ):
        recurrent_paths.checked_path("resident", refused, "forward", H200)


def test_recurrent_precision_follows_torchs_switch():
    with torch.backends.cudnn.flags(allow_tf32=True):
        assert recurrent.fp32_precision() == "tf32"
    with torch.backends.cudnn.flags(allow_tf32=False):
        assert recurrent.fp32_precision() == "ieee"


@pytest.mark.parametrize(
    ("architecture", "dtype", "precision"),
    [
        ("sm_90", torch.float32, "tf32"),
        ("sm_90", torch.bfloat16, "ieee"),
        ("gfx942", torch.float32, "ieee"),
        ("default", torch.float32, "ieee"),
    ],
)
def test_recurrent_tf32_is_nvidias(architecture, dtype, precision):
    assert precision_on(architecture, dtype, "tf32") == precision
    assert precision_on(architecture, dtype, "ieee") == "ieee"


# ------------------------------------------------------------------------------------ the table of tiles


ROW = dict(
    kernel="resident_forward", cell="lstm", product="16", hidden_up_to=64, block_b=16, num_warps=4, stages=2,
    max_registers=None,
)  # fmt: skip


def table_with(row: dict) -> dict:
    return {"schema": 1, "architectures": {"default": {"measured_on": None, "rows": [row]}}}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"schema": 2, "architectures": {}}, "schema: needs 1"),
        ({"schema": 1, "architectures": {}}, 'architectures: needs an object with "default"'),
        (
            {"schema": 1, "architectures": {"default": {"rows": []}}},
            "default.measured_on: needs a device name or null",
        ),
        (table_with({}), r"default.rows\[0\]: needs exactly"),
        (table_with(ROW | {"cell": "lsmt"}), r"default.rows\[0\].cell: needs one of .*, not 'lsmt'"),
        (table_with(ROW | {"stages": "2"}), r"default.rows\[0\].stages: needs .*int.*, not '2'"),
        (table_with(ROW | {"num_warps": 6}), r"default.rows\[0\].num_warps: needs a power of two, not 6"),
    ],
)
def test_recurrent_tile_table_errors_name_the_place(table, message):
    with pytest.raises(ValueError, match=f"recurrent.json: {message}"):
        tuning.check_table(table, "recurrent.json")


def test_recurrent_tile_table_takes_a_whole_row():
    tuning.check_table(table_with(ROW), "recurrent.json")


def test_recurrent_tile_table_falls_back_key_by_key():
    own, default = tuning.tuning("sm_80"), tuning.tuning("default")
    assert own.tile("resident_forward", "lstm", "16", 128) != default.tile(
        "resident_forward", "lstm", "16", 128
    )
    assert own.tile("resident_forward", "gru", "16", 128) == default.tile(
        "resident_forward", "gru", "16", 128
    )
    assert own.tile("resident_forward", "lstm", "16", 129) is None
    assert "maxnreg" not in tuning.tuning("gfx942").tile("resident_forward", "lstm", "16", 64).options()


# ------------------------------------------------------------------------------------ the gates' functions


@triton.jit
def functions_kernel(x_ptr, sigmoid_ptr, tanh_ptr, COUNT: tl.constexpr):
    """sigmoid and tanh of COUNT numbers."""
    lanes = tl.arange(0, COUNT)
    x = tl.load(x_ptr + lanes)
    tl.store(sigmoid_ptr + lanes, sigmoid(x))
    tl.store(tanh_ptr + lanes, tanh(x))


@interpreter
@pytest.mark.parametrize("backend", ["triton"])
def test_recurrent_gate_functions_are_exact_and_finite(backend):
    grid = torch.cat([torch.linspace(-30, 30, 4090), torch.tensor([1e4, -1e4, 3e38, -3e38])])
    x = torch.cat([grid, torch.tensor([float("inf"), -float("inf")])]).float()
    results = torch.empty(2, 4096)
    functions_kernel[(1,)](x, results[0], results[1], 4096)
    for ours, expected in zip(results, (x.double().sigmoid(), x.double().tanh()), strict=True):
        assert ours.isfinite().all()
        relative = (ours.double() - expected).abs() / expected.abs().clamp_min(1e-37)
        assert relative[expected.abs() > 1e-37].max() < 1e-6


@interpreter
@pytest.mark.parametrize("backend", ["triton"])
def test_recurrent_gate_functions_hand_nan_on(backend):
    x = torch.tensor([float("nan"), 1.0])
    results = torch.empty(2, 2)
    functions_kernel[(1,)](x, results[0], results[1], 2)
    assert results.isnan().tolist() == [[True, False]] * 2
