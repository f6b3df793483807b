"""The peers of the benchmarks: each agrees with torch, or is absent and says why."""

from __future__ import annotations

import functools
import importlib.util
import shutil
import sys

import pytest
import torch
from torch._inductor import cpu_vec_isa

from benchmarks import attention, conv, peers, recurrent
from benchmarks.attention_cases import (
    BIAS,
    CONTEXT,
    DENSE,
    DROPOUT,
    LAYER,
    LENGTHS,
    MAPS,
    MASKED,
    PIECES,
    SWIN,
    WEIGHTS,
    AttentionCase,
)
from benchmarks.conv_cases import ConvCase
from benchmarks.peers.compile import MOST_STEPS
from benchmarks.recurrent_cases import CELL, PACKED, STREAMING, RecurrentCase
from benchmarks.suites import Absent

SUITES = {ConvCase: conv, RecurrentCase: recurrent, AttentionCase: attention}
RUNTIMES = ("onnxruntime", "openvino")
OPERATOR = "peers"

# Both sides round once or twice for each product: about ten times the dtype's resolution on values near 1.
TOLERANCES = {"fp32": 5e-6, "fp16": 5e-3, "bf16": 4e-2}

CASES = (
    ConvCase(2, 8, (16,), 3, padding=1),
    ConvCase(2, 8, (8, 8), 3, stride=2, padding=1),
    ConvCase(2, 8, (9, 9), 3, dilation=2, padding=2, channels_last=True),
    ConvCase(2, 4, (5, 5, 5), 3, padding=1),
    RecurrentCase("LSTM", 5, 2, 8),
    RecurrentCase("GRU", 5, 2, 8, layers=2, directions=2),
    RecurrentCase("RNN", 5, 2, 8),
    RecurrentCase("LSTM", 1, 1, 8, layers=2, form=STREAMING),
    RecurrentCase("LSTM", 3, 2, 8, form=CELL),
    AttentionCase(2, 2, 16, 8),
    AttentionCase(2, 2, 16, 8, is_causal=True),
    AttentionCase(2, 4, 16, 8, kv_heads=2, value_dim=4),
    AttentionCase(1, 2, 1, 8, keys=16),
    AttentionCase(1, 2, 16, 8, window=(3, 0), is_causal=True, against=MASKED),
    AttentionCase(1, 2, 16, 8, form=BIAS),
    AttentionCase(2, 2, 16, 8, form=WEIGHTS),
    AttentionCase(2, 2, 16, 8, form=MAPS),
    AttentionCase(2, 2, 16, 8, form=LAYER),
    AttentionCase(1, 2, 16, 8, form=SWIN),
    AttentionCase(3, 2, 64, 8, form=LENGTHS),
)
# What one of the runtimes has no kernel, or no conversion, for.
LACKING = (
    ConvCase(2, 8, (8, 8), 3, padding=1, dtype="bf16"),
    RecurrentCase("GRU", 5, 2, 8, dtype="bf16"),
    AttentionCase(2, 2, 16, 8, dtype="bf16"),
    AttentionCase(2, 2, 16, 8, dtype="fp16"),
    RecurrentCase("LSTM", 5, 2, 8, proj=4),
    RecurrentCase("GRU", 16, 2, 8, form=PACKED),
)


@pytest.fixture(params=RUNTIMES)
def runtime(request):
    package = request.param
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"peers need the package {package}")
    return package


@pytest.fixture
def quick_compile(monkeypatch):
    """torch.compile without code generation, so without a compiler: what is tested is how it is called."""
    monkeypatch.setattr(cpu_vec_isa, "pick_vec_isa", lambda: cpu_vec_isa.VecAVX512())
    monkeypatch.setattr(cpu_vec_isa.VecAVX512, "__bool__", lambda self: True)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    yield
    torch.compiler.reset()


def named(case) -> str:
    return case.name


def build(case):
    return SUITES[type(case)].build(case, "cpu")


def assert_agrees(prepared, twins, case):
    with torch.no_grad():
        expected = twins.forward(twins.stock.eval(), twins.inputs)
    found = prepared.outputs()
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        largest = (ours.float() - theirs.float()).abs().max().item()
        assert largest <= TOLERANCES[case.dtype] * max(1.0, theirs.float().abs().max().item())


# ------------------------------------------------------------------------------------------------- runtimes


@pytest.mark.parametrize("case", CASES, ids=named)
def test_peers_runtime_agrees_with_torch(runtime, case):
    twins = build(case)
    prepared = peers.prepare(runtime, twins, "fwd", case)
    prepared.call()
    assert prepared.compile_s >= 0
    assert_agrees(prepared, twins, case)


@pytest.mark.parametrize("case", LACKING, ids=named)
def test_peers_runtime_agrees_or_says_what_it_lacks(runtime, case):
    twins = build(case)
    try:
        prepared = peers.prepare(runtime, twins, "fwd", case)
    except Absent as absence:
        assert str(absence).startswith(("onnxruntime: ", "openvino: ", "torch.onnx: "))
        assert len(str(absence)) > 30 and "\n" not in str(absence)
    else:
        assert_agrees(prepared, twins, case)


def test_peers_onnxruntime_has_no_bfloat16_on_a_cpu(runtime):
    if runtime == "openvino":
        twins = build(LACKING[0])
        assert_agrees(peers.prepare(runtime, twins, "fwd", LACKING[0]), twins, LACKING[0])
    else:
        with pytest.raises(Absent, match="bfloat16"):
            peers.prepare(runtime, build(LACKING[0]), "fwd", LACKING[0])


def test_peers_runtime_sees_new_values_in_torchs_memory(runtime):
    """The inputs are shared: what is written into the tensor is what the next call reads."""
    case = CASES[2]
    twins = build(case)
    prepared = peers.prepare(runtime, twins, "fwd", case)
    before = prepared.outputs()[0].clone()
    with torch.no_grad():
        twins.inputs[0].mul_(2).add_(1)
    assert_agrees(prepared, twins, case)
    assert not torch.allclose(prepared.outputs()[0], before)


@pytest.mark.parametrize("threads", [1, 2])
def test_peers_onnxruntime_takes_torchs_threads(monkeypatch, threads):
    onnxruntime = pytest.importorskip("onnxruntime", reason="peers need the package onnxruntime")
    seen = []

    def session(model, options, providers):
        seen.append((options.intra_op_num_threads, options.inter_op_num_threads, providers))
        return original(model, options, providers=providers)

    original = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    torch.set_num_threads(threads)
    peers.prepare("onnxruntime", build(CASES[0]), "fwd", CASES[0])
    assert seen == [(threads, 1, ["CPUExecutionProvider"])]


def test_peers_openvino_takes_torchs_threads_and_precision():
    pytest.importorskip("openvino", reason="peers need the package openvino")
    from benchmarks.peers.exported import Exported
    from benchmarks.peers.openvino import compiled_model

    twins = build(CASES[0])
    exported = Exported(twins, CASES[0])
    compiled = compiled_model(exported, exported.arrays(twins.inputs))
    assert compiled.get_property("INFERENCE_NUM_THREADS") == torch.get_num_threads() == 1
    assert compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"
    assert compiled.get_property("NUM_STREAMS") == 1


@pytest.mark.parametrize("name", RUNTIMES)
@pytest.mark.parametrize("pass_name", ["bwd", "fwd+bwd"])
def test_peers_runtimes_have_no_backward(name, pass_name):
    with pytest.raises(Absent, match="forward alone"):
        peers.prepare(name, build(CASES[0]), pass_name, CASES[0])


@pytest.mark.parametrize("name", RUNTIMES)
def test_peers_missing_package_is_absent(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(Absent, match=f"^{name}: .*{name}"):
        peers.prepare(name, build(CASES[0]), "fwd", CASES[0])


def test_peers_onnxruntime_needs_onnx_too(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(Absent, match="^onnxruntime: .*onnx"):
        peers.prepare("onnxruntime", build(CASES[0]), "fwd", CASES[0])


# ------------------------------------------------------------------------------------- compiled by torch


@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[4], CASES[9], CASES[17]], ids=named)
@pytest.mark.parametrize("pass_name", ["fwd", "bwd", "fwd+bwd"])
def test_peers_compile_agrees_with_torch(quick_compile, case, pass_name):
    twins = build(case)
    prepared = peers.prepare("compile", twins, pass_name, case)
    with torch.set_grad_enabled(pass_name != "fwd"):
        prepared.call()
        prepared.call()
    assert_agrees(prepared, twins, case)


def test_peers_compile_starts_afresh_for_each_case(quick_compile, monkeypatch):
    resets = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(True))
    first, second = build(CASES[0]), build(CASES[0])
    for twins in (first, first, second):
        peers.prepare("compile", twins, "fwd", CASES[0])
    assert len(resets) == 2


def test_peers_compile_does_not_unroll_long_sequences():
    case = RecurrentCase("LSTM", MOST_STEPS, 1, 8, layers=2)
    with pytest.raises(Absent, match=f"unrolls recurrent layers: {2 * MOST_STEPS} steps"):
        peers.prepare("compile", build(case), "fwd", case)


@pytest.mark.parametrize("name", ["compile", "flex"])
def test_peers_compiled_ones_need_a_compiler(monkeypatch, name):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(Absent, match="needs a C"):
        peers.prepare(name, build(CASES[9]), "fwd", CASES[9])


@pytest.mark.parametrize("name", ["compile", "flex"])
def test_peers_compiled_ones_need_the_vectors_that_torch_uses(quick_compile, monkeypatch, name):
    monkeypatch.setattr(cpu_vec_isa, "pick_vec_isa", lambda: cpu_vec_isa.invalid_vec_isa)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    with pytest.raises(Absent, match="no vector instructions"):
        peers.prepare(name, build(CASES[9]), "fwd", CASES[9])


@pytest.mark.parametrize("case", [CASES[9], CASES[10], CASES[13]], ids=named)
def test_peers_flex_agrees_with_torch(quick_compile, case):
    twins = build(case)
    assert_agrees(peers.prepare("flex", twins, "fwd", case), twins, case)


@pytest.mark.parametrize(
    "case, pass_name, reason",
    [
        (CASES[0], "fwd", "attention alone"),
        (CASES[9], "fwd+bwd", "no backward on a CPU"),
        (CASES[15], "fwd", "not MultiheadAttention"),
        (CASES[14], "fwd", "not learned bias"),
    ],
    ids=str,
)
def test_peers_flex_says_what_it_lacks(case, pass_name, reason):
    with pytest.raises(Absent, match=reason):
        peers.prepare("flex", build(case), pass_name, case)


# ------------------------------------------------------------------------------------------------- all


@pytest.mark.parametrize("name", peers.PEERS)
@pytest.mark.parametrize(
    "case, reason",
    [
        (AttentionCase(1, 2, 16, 8, form=DROPOUT), "dropout"),
        (AttentionCase(1, 1, 2, 16, form=CONTEXT), "attention_context"),
        (AttentionCase(1, 2, 16, 8, window=(3, 0), is_causal=True, against=DENSE), "not against dense"),
        (AttentionCase(1, 2, 8192, 8, window=(3, 0), is_causal=True, against=PIECES), "not against itself"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_peers_stand_against_torchs_own_operator_only(name, case, reason):
    pytest.importorskip("onnx", reason="peers need the package onnx")
    pytest.importorskip("onnxruntime", reason="peers need the package onnxruntime")
    pytest.importorskip("openvino", reason="peers need the package openvino")
    with pytest.raises(Absent, match=reason):
        peers.prepare(name, build(case), "fwd", case)


def test_peers_are_named_by_their_keys():
    assert all(name == peer.name and peer.what for name, peer in peers.PEERS.items())
    assert list(peers.PEERS)[0] == "compile"
