"""The Triton kernels of attention's backward: by interpreter on a CPU, compiled on a GPU.

Both hold every gradient to float64 on the table of cases that all backends share, with out and lse of the
reference. The interpreter shows the logic (masks, tails, strides, ranges) in float32 and float16; it computes
bfloat16 wrongly and shows neither races nor speed.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from pyarch.ops.attention_call import BACKWARD, describe  # noqa: E402
from pyarch.reference.attention import Extras  # noqa: E402
from pyarch.reference.attention import forward as reference_forward  # noqa: E402
from pyarch.triton_kernels import (  # noqa: E402
    attention,
    attention_backward,
    attention_backward_dkdv,
    attention_backward_dq,
)
from pyarch.triton_kernels.attention_call import Call  # noqa: E402
from pyarch.triton_kernels.attention_tuning import Tile  # noqa: E402
from pyarch.triton_kernels.launch import Launch  # noqa: E402
from tests.attention_cases import (  # noqa: E402
    CASES,
    SOME,
    Case,
    answers,
    expanded,
    heads_last,
    shows_gradients,
    sliced,
    table,
)
from tests.attention_definition import GRADIENTS, Operands, hold, visible_of  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreter = pytest.mark.skipif(not INTERPRETED, reason="interpreter tests run with TRITON_INTERPRET=1")
no_gpu = INTERPRETED or not torch.cuda.is_available()

# The interpreter takes about 10 ms a tile; longer cases say nothing new about the logic.
LONGEST = 300
SHORT = {name: case for name, case in CASES.items() if max(case.queries, case.keys) <= LONGEST}
# Wider than the operator asks of the float32 kernels.
WIDE = {name: case for name, case in SHORT.items() if max(case.dim, case.value_dim or 0) > 128}
OWN = table(
    # Several tiles of the bias with several readers each, and readers shared among programs.
    *(Case(40, 70, batch=3, bias=over) for over in ("", "b", "h", "q", "k", "bq", "hk", "bhq", "bhk", "qk")),
    *(Case(40, 70, bias=over, causal=True, offset=10) for over in ("k", "q", "hqk")),
    *(Case(70, 70, bias=over, left=3, right=2) for over in ("k", "q", "qk")),
    Case(70, 70, bias="k", left=3, right=2, global_tokens=2),
    Case(70, 70, bias="q", left=3, right=2, global_mask=True, padding=True),
    Case(70, 75, bias="hqk", left=2, right=2, dilation=5, dropout=0.2),
    Case(70, 75, bias="bk", left=2, right=2, dilation=3, causal=True, softcap=3.0),
    Case(40, 70, bias="qk", extras_dtype=torch.float32, layout=heads_last, grad_layout=expanded),
    # Several tiles on a diagonal of tiles with several readers each, and readers shared among programs.
    *(Case(40, 70, batch=3, distance=over) for over in ("", "b", "h", "bh")),
    Case(75, 70, distance="h", left=2, right=2, dilation=5, dropout=0.2),
    Case(70, 75, distance="", bias="hqk", left=3, right=2, global_mask=True, padding=True, softcap=3.0),
    # Padding in tiles that need no other test.
    Case(80, 150, padding=True, batch=1, heads=1),
    Case(80, 150, padding=True, batch=1, heads=1, causal=True, offset=100, shift=-200.0, bias="qk"),
    # Residue classes of different sizes, some of them empty.
    Case(5, 90, left=3, right=3, dilation=8, offset=40),
    Case(90, 5, left=3, right=3, dilation=8, offset=-40),
    Case(90, 95, left=5, right=1, dilation=4, heads=4, kv_heads=2, dropout=0.3, padding=True),
    Case(90, 95, left=None, right=2, dilation=4, layout=sliced),
    Case(130, 130, left=9, right=0, causal=True, heads=4, kv_heads=1, batch=1, lse_grad=True),
)
FP16 = (
    SOME
    | WIDE
    | table(
        Case(40, 70, dim=64, causal=True, offset=30, heads=4, kv_heads=2),
        Case(70, 40, dim=40, value_dim=24, left=9, right=4, dilation=2, lse_grad=True),
        Case(40, 70, bias="hqk", padding=True, softcap=4.0),
        Case(40, 70, distance="h", causal=True, heads=4, kv_heads=2),
        Case(40, 70, mask="bhqk", lost=True, sinks=True, lse_grad=True),
    )
)


def moved(operands: Operands, device: str) -> Operands:
    def to(tensor):
        return None if tensor is None else tensor.to(device)

    return Operands(
        *map(to, operands[:3]), Extras(*map(to, operands.extras)), operands.settings, *map(to, operands[5:])
    )


def gradients_of(operands: Operands, needs: list[bool] | None = None) -> dict[str, Tensor | None]:
    """Our gradients, from the reference's out and lse."""
    query, key, value, extras, settings, grad_out, grad_lse = operands
    out, lse = reference_forward(query, key, value, extras, settings)
    needs = operands.needs if needs is None else needs
    found = attention.backward(grad_out, grad_lse, query, key, value, out, lse, extras, settings, needs)
    assert [each is not None for each in found] == list(needs)
    for gradient, tensor in zip(found, operands.differentiable, strict=True):
        if gradient is not None:
            assert gradient.stride() == torch.empty_like(tensor).stride()
    return dict(zip(GRADIENTS, found, strict=True))


def hold_to_the_definition(case: Case, dtype: torch.dtype, device: str) -> None:
    found = gradients_of(moved(case.operands(dtype), device))
    hold({name: None if each is None else each.cpu() for name, each in found.items()}, answers(case, dtype))
    if shows_gradients(case):
        assert any((each != 0).any() for name, each in found.items() if each is not None)


@interpreter
@pytest.mark.parametrize(
    "case", [case for case in (SHORT | OWN).values() if case not in WIDE.values()], ids=str
)
def test_attention_backward_keeps_the_tolerance_rule(case):
    hold_to_the_definition(case, torch.float32, "cpu")


@interpreter
@pytest.mark.parametrize("case", WIDE.values(), ids=str)
def test_attention_backward_of_wide_float32_heads_is_refused(case):
    operands = case.operands(torch.float32)
    call = describe(*operands[:5], True, False)
    verdict = next(each for each in BACKWARD.explain(call) if each.backend == "triton")
    assert any("needs at most 128" in reason for reason in verdict.refusals)
    with pytest.raises(NotImplementedError, match="needs at most 128"):
        gradients_of(operands)


@interpreter
@pytest.mark.parametrize("case", FP16.values(), ids=str)
def test_attention_backward_keeps_the_tolerance_rule_in_fp16(case):
    hold_to_the_definition(case, torch.float16, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(no_gpu, reason="no CUDA GPU")
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (case, dtype)
        for case in (CASES | OWN).values()
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
        if dtype != torch.float32 or case not in WIDE.values()
    ],
    ids=str,
)
def test_attention_backward_keeps_the_tolerance_rule_on_a_gpu(case, dtype):
    hold_to_the_definition(case, dtype, "cuda")


# ------------------------------------------------------------------------------------ what is launched


KERNELS = {
    "grad query": {"attention_delta_kernel", "attention_backward_dq_kernel"},
    "grad key": {"attention_delta_kernel", "attention_backward_dkdv_kernel"},
    "grad value": {"attention_backward_dkdv_kernel"},
    "grad bias": {"attention_delta_kernel", "attention_backward_bias_kernel"},
    "grad sinks": {"attention_delta_kernel"},
    "grad distance bias": {"attention_delta_kernel", "attention_backward_distance_kernel"},
}


@interpreter
@pytest.mark.parametrize("wanted", range(6), ids=GRADIENTS.__getitem__)
def test_attention_backward_launches_what_is_needed(wanted, monkeypatch):
    operands = Case(20, 33, bias="hqk", distance="h", sinks=True, causal=True).operands(torch.float32)
    everything = gradients_of(operands)
    launched = []
    run = Launch.run
    monkeypatch.setattr(Launch, "run", lambda self, device: (launched.append(self), run(self, device)))
    found = gradients_of(operands, [number == wanted for number in range(6)])
    name = GRADIENTS[wanted]
    assert torch.equal(found[name], everything[name])
    assert {launch.kernel.__name__ for launch in launched} == KERNELS[name]


@interpreter
@pytest.mark.parametrize(
    ("module", "visit"), [(attention_backward_dkdv, "add_queries"), (attention_backward_dq, "add_keys")]
)
@pytest.mark.parametrize(
    ("case", "tiles"),
    [
        (Case(128, 128, batch=1, heads=1), 4 * 4),
        (Case(128, 128, batch=1, heads=1, causal=True), 4 + 3 + 2 + 1),
        (Case(128, 128, batch=1, heads=1, left=8, right=0), 4 + 3),
        (Case(128, 128, batch=1, heads=1, left=2, right=2, dilation=4), 4),
        (Case(128, 128, batch=1, heads=1, left=4, right=4, global_tokens=4), 4 + 2 * 3 + 2 * 2),
        (Case(128, 32, batch=1, heads=1, left=0, right=0, offset=-64), 1),
    ],
    ids=str,
)
def test_attention_backward_visits_only_tiles_of_the_pattern(module, visit, case, tiles, monkeypatch):
    visits = []
    inner = getattr(module, visit)

    def counted(*arguments):
        visits.append(1)
        return inner(*arguments)

    monkeypatch.setattr(module, visit, counted)
    monkeypatch.setattr(Call, "tile", lambda self, kernel: Tile(32, 32, 4, 1))
    gradients_of(case.operands(torch.float32))
    assert len(visits) == tiles


@interpreter
@pytest.mark.parametrize("case", SOME.values(), ids=str)
def test_attention_backward_repeats_bit_by_bit(case):
    operands = case.operands(torch.float32)
    first, second = gradients_of(operands), gradients_of(operands)
    assert all(torch.equal(first[name], second[name]) for name in GRADIENTS if first[name] is not None)


# ------------------------------------------------------------------------------------ what nothing sees


HIDDEN = table(
    Case(40, 70, causal=True),
    Case(20, 70, left=4, right=5),
    Case(20, 70, left=2, right=2, dilation=3),
    Case(40, 70, padding=True),
    Case(40, 70, padding=True, causal=True, offset=30, bias="hqk"),
    Case(40, 70, mask="bqk", padding=True, lost=True, sinks=True, lse_grad=True),
    Case(40, 70, mask="bhqk", lost=True, dropout=0.2, heads=4, kv_heads=2, softcap=4.0),
)


@interpreter
@pytest.mark.parametrize("case", HIDDEN.values(), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_attention_backward_keeps_nan_out_that_nothing_sees(case, dtype):
    operands = case.operands(dtype)
    seen = visible_of(operands)
    group = seen.shape[1] // operands.key.shape[1]
    unseen_keys = ~seen.any(-2).unflatten(1, (-1, group)).any(2)[..., None]
    blind = ~seen.any(-1)[..., None]
    assert unseen_keys.any() or blind.any()
    nan = float("nan")
    spoilt = operands._replace(
        query=operands.query.masked_fill(blind, nan),
        key=operands.key.masked_fill(unseen_keys, nan),
        value=operands.value.masked_fill(unseen_keys, nan),
        grad_out=operands.grad_out.masked_fill(blind, nan),
    )
    found, expected = gradients_of(spoilt), gradients_of(operands)
    for name in GRADIENTS:
        if found[name] is not None:
            assert torch.equal(found[name], expected[name]), name
    assert (found["grad query"].masked_select(blind) == 0).all()
    assert (found["grad key"].masked_select(unseen_keys) == 0).all()
    assert (found["grad value"].masked_select(unseen_keys) == 0).all()


@interpreter
def test_attention_backward_of_a_bias_that_hides_everything_is_zero():
    operands = Case(20, 33, bias="bqk").operands(torch.float32)
    bias = operands.extras.bias.clone()
    bias[0, :, 3:7] = -float("inf")
    grad_out = operands.grad_out.clone()
    grad_out[0, :, 3:7] = float("nan")
    found = gradients_of(operands._replace(extras=operands.extras._replace(bias=bias), grad_out=grad_out))
    assert all(each is None or each.isfinite().all() for each in found.values())
    assert (found["grad query"][0, :, 3:7] == 0).all() and (found["grad bias"][0, :, 3:7] == 0).all()
    assert (found["grad query"][1] != 0).any() and (found["grad bias"][1] != 0).any()


@interpreter
def test_attention_backward_refuses_wide_heads():
    with pytest.raises(NotImplementedError, match="head width 264"):
        gradients_of(Case(dim=264).operands(torch.float32))


@interpreter
@pytest.mark.parametrize(
    ("case", "name"),
    [
        (Case(40, 70, batch=3, bias="k"), "grad bias"),
        (Case(40, 70, batch=3, distance=""), "grad distance bias"),
    ],
    ids=str,
)
def test_attention_backward_splits_the_readers_of_a_small_bias(case, name, monkeypatch):
    operands = case.operands(torch.float32)
    monkeypatch.setattr(attention_backward, "BIAS_PROGRAMS", 1)
    alone = gradients_of(operands)[name]
    monkeypatch.setattr(attention_backward, "BIAS_PROGRAMS", 1000)
    shared = gradients_of(operands)[name]
    assert not torch.equal(alone, torch.zeros_like(alone))
    torch.testing.assert_close(shared, alone)
