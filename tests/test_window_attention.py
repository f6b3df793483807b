"""pyarch.nn.WindowAttention: what it computes, its parameters, and that it is a module like any other."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap

import pyarch
from pyarch import dispatch
from pyarch.models import swin
from pyarch.nn import window_attention
from tests.attention_modules_cases import each_backend, fresh_dynamo
from tests.model_cases import need
from tests.window_attention_cases import (
    CASES,
    HEADS,
    RAGGED,
    SHIFTED,
    C,
    Case,
    check_results,
    compare,
    definition,
    results_of,
)

OPERATOR = "attention"
each_case = pytest.mark.parametrize("case", CASES, ids=str)


# -------------------------------------------------------------------------------- results


@each_case
@each_backend
def test_window_attention_outputs_and_gradients(backend, case):
    with pyarch.backend(backend):
        layer = case.layer()
        compare(layer, layer, case.input())


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("case", (CASES[3], RAGGED), ids=str)
@each_backend
def test_window_attention_in_16_bits(backend, case, dtype):
    with pyarch.backend(backend):
        layer = case.layer(dtype=dtype)
        compare(layer, layer, case.input().to(dtype))


@each_backend
def test_window_attention_without_biases(backend):
    layer = RAGGED.layer(qkv_bias=False, proj_bias=False)
    assert layer.qkv.bias is layer.proj.bias is None
    with pyarch.backend(backend):
        compare(layer, layer, RAGGED.input())


def test_window_attention_in_float64():
    layer, image = RAGGED.layer(dtype=torch.float64), RAGGED.input().double()
    ours, wanted = results_of(layer, layer, image), results_of(lambda x: definition(layer, x), layer, image)
    for name, each in wanted.items():
        torch.testing.assert_close(ours[name], each, rtol=1e-10, atol=1e-10)


@each_backend
def test_window_attention_under_autocast(backend):
    layer, image = RAGGED.layer(), RAGGED.input()
    rounded = copy.deepcopy(layer).bfloat16().double()
    exact = image.bfloat16().double()
    truth = results_of(lambda x: definition(rounded, x), rounded, exact)
    with torch.autocast("cpu", torch.bfloat16), pyarch.backend(backend):
        ours = results_of(layer, layer, image)
        stock = results_of(lambda x: definition(layer, x), layer, image)
    assert ours["output"].dtype == torch.bfloat16
    assert ours["relative_position_bias_table"].dtype == torch.float32
    # Gradients of float32 parameters that were made in bfloat16 have its rounding.
    ours, stock = ({name: each.bfloat16() for name, each in run.items()} for run in (ours, stock))
    check_results(ours, [stock], truth)


@each_backend
def test_window_attention_without_gradients(backend):
    layer, image = RAGGED.layer(), RAGGED.input()
    with torch.no_grad(), pyarch.backend(backend):
        torch.testing.assert_close(layer(image), definition(layer, image))


def test_window_attention_reads_strided_images():
    layer = RAGGED.layer()
    image = torch.randn(2, C, *RAGGED.image).permute(0, 2, 3, 1)
    torch.testing.assert_close(layer(image), layer(image.contiguous()), rtol=0, atol=0)
    assert layer(image).is_contiguous()


@pytest.mark.parametrize("shape", ((0, 8, 8, C), (2, 0, 8, C), (2, 8, 0, C)), ids=str)
def test_window_attention_of_nothing(shape):
    layer, image = SHIFTED.layer(), torch.randn(shape, requires_grad=True)
    output = layer(image)
    output.sum().backward()
    assert output.shape == image.grad.shape == shape


def test_window_attention_hides_entirely_what_a_roll_brought_together():
    """Where torchvision lowers the score by 100, which a bias of 200 between two tokens outweighs."""
    layer, image = Case((4, 4), (2, 2), (1, 1)).layer(), torch.randn(1, 4, 4, C)
    with torch.no_grad():
        layer.relative_position_bias_table.zero_()[0] = 200.0  # a query on the key below it at its right
    other = image.clone()
    other[0, 0, 0] += 1.0  # rolled to below and at the right of the last token

    def reached(layer):
        return (layer(other) != layer(image)).any(3)[0].nonzero().tolist()

    stock = swin.WindowAttention(C, HEADS, 2, 1)
    stock.load_state_dict(layer.state_dict())
    assert reached(stock) == [[0, 0], [3, 3]]
    assert reached(layer) == [[0, 0]]


def test_window_attention_twice_differentiable():
    layer = pyarch.nn.WindowAttention(2, 2, 1, 1, dtype=torch.float64)
    image = torch.randn(1, 3, 4, 2, dtype=torch.float64, requires_grad=True)
    table = layer.relative_position_bias_table.detach().clone().requires_grad_()

    def function(image, table):
        return functional_call(layer, {"relative_position_bias_table": table}, (image,))

    assert torch.autograd.gradcheck(function, (image, table))
    assert torch.autograd.gradgradcheck(function, (image, table))


# -------------------------------------------------------------------------------- cost


@pytest.mark.parametrize("case, masked", ((CASES[3], False), (RAGGED, True)), ids=("plain", "shifted"))
def test_window_attention_multiplies_nothing_out_over_heads(monkeypatch, case, masked):
    """The bias is one for all windows, the mask one for all heads, queries are views of the product."""
    seen = []
    attend = window_attention.attention.attend

    def spy(query, key, value, extras, *settings, **options):
        seen.append((query, extras))
        return attend(query, key, value, extras, *settings, **options)

    monkeypatch.setattr(window_attention.attention, "attend", spy)
    case.layer()(case.input())
    ((query, extras),) = seen
    assert query.shape == (2 * 6, HEADS, 16, C // HEADS) and query._base is not None
    assert extras.bias.shape == (1, HEADS, 16, 16)
    assert (extras.mask is not None) == masked
    if masked:
        assert extras.mask.shape == (2 * 6, 1, 16, 16) and extras.mask.dtype == torch.bool


# -------------------------------------------------------------------------------- dropout


def test_window_attention_drops_weights_in_training_alone():
    layer, image = RAGGED.layer(attention_dropout=0.5), RAGGED.input()
    kept = RAGGED.layer()
    kept.load_state_dict(layer.state_dict())
    torch.manual_seed(1)
    first = layer(image)
    again, other = (layer.train()(image) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(layer(image), first)
    assert not torch.equal(again, other)
    assert torch.equal(layer.eval()(image), kept(image))


def test_window_attention_drops_weights_without_bias_on_average():
    layer, image = SHIFTED.layer(attention_dropout=0.3), SHIFTED.input(batch=1)
    with torch.no_grad():
        drawn = torch.stack([layer(image) for _ in range(400)])
        wanted = layer.eval()(image)
    deviation = drawn.std(0) / len(drawn) ** 0.5
    assert ((drawn.mean(0) - wanted).abs() < 5 * deviation).all()


def test_window_attention_drops_all_weights():
    layer = RAGGED.layer(attention_dropout=1.0)
    torch.testing.assert_close(layer(RAGGED.input()), layer.proj.bias.expand(2, *RAGGED.image, C))


def test_window_attention_drops_outputs_in_training_alone():
    layer, image = RAGGED.layer(dropout=0.25), RAGGED.input()
    dropped, whole = layer(image), layer.eval()(image)
    is_zero = dropped == 0
    assert 0.15 < is_zero.float().mean() < 0.35
    torch.testing.assert_close(dropped[~is_zero], whole[~is_zero] / 0.75)


# -------------------------------------------------------------------------------- a module like any other


def test_window_attention_has_torchvisions_parameters():
    layer = pyarch.nn.WindowAttention(C, (3, 4), (1, 2), HEADS)
    assert {name: tuple(each.shape) for name, each in layer.state_dict().items()} == {
        "relative_position_bias_table": (5 * 7, HEADS),
        "relative_position_index": (12 * 12,),
        "qkv.weight": (3 * C, C),
        "qkv.bias": (3 * C,),
        "proj.weight": (C, C),
        "proj.bias": (C,),
    }
    assert layer.relative_position_index.dtype == torch.int64
    assert (layer.window_size, layer.shift_size) == ([3, 4], [1, 2])
    assert 0.01 < layer.relative_position_bias_table.std() < 0.03


def test_window_attention_index_of_a_small_window():
    """Row 3 (y_i - y_j + 1) + x_i - x_j + 1 of the table, tokens in rows."""
    layer = pyarch.nn.WindowAttention(C, 2, 0, HEADS)
    assert layer.relative_position_index.view(4, 4).tolist() == [
        [4, 3, 1, 0],
        [5, 4, 2, 1],
        [7, 6, 4, 3],
        [8, 7, 5, 4],
    ]


def test_window_attention_loads_and_copies():
    layer, image = RAGGED.layer(), RAGGED.input()
    loaded = pyarch.nn.WindowAttention(C, RAGGED.window, RAGGED.shift, HEADS)
    loaded.load_state_dict(layer.state_dict())
    for other in (loaded, copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is pyarch.nn.WindowAttention
        assert torch.equal(other(image), layer(image))
    assert copy.deepcopy(layer).qkv.weight is not layer.qkv.weight


def test_window_attention_repr_names_its_sizes():
    assert "window_size=[4, 4], shift_size=[2, 2], num_heads=3" in repr(SHIFTED.layer())


@pytest.mark.parametrize(
    "arguments, text",
    (
        ((10, 4, 0, 3), "dim should be a positive multiple of num_heads, got 10 and 3"),
        ((12, 4, 0, 0), "dim should be a positive multiple of num_heads, got 12 and 0"),
        ((12, 0, 0, 3), r"window_size should be at least 1, got \[0, 0\]"),
        ((12, (4, 4, 4), 0, 3), r"window_size should be \(height, width\) or one number, got \(4, 4, 4\)"),
        ((12, 4, 4, 3), r"shift_size should be at least 0 and less than the window \[4, 4\], got \[4, 4\]"),
        ((12, 4, (0, -1), 3), r"shift_size should be at least 0 and less than .*, got \[0, -1\]"),
    ),
)
def test_window_attention_refuses_sizes(arguments, text):
    with pytest.raises(ValueError, match=text):
        pyarch.nn.WindowAttention(*arguments)


@pytest.mark.parametrize("shape", ((8, 8, C), (2, 64, C), (2, 8, 8, C + 1)), ids=str)
def test_window_attention_refuses_inputs(shape):
    with pytest.raises(ValueError, match=rf"input should be \(B, H, W, {C}\), got \({shape[0]}, "):
        SHIFTED.layer()(torch.randn(shape))


def test_window_attention_transforms():
    layer, image = RAGGED.layer(), torch.randn(3, 2, *RAGGED.image, C)
    torch.testing.assert_close(vmap(layer)(image), torch.stack([layer(each) for each in image]))


def test_window_attention_traces_as_torchs_operators():
    layer, image = RAGGED.layer().eval(), RAGGED.input()
    traced = torch.jit.trace(layer, RAGGED.input())
    assert "pyarch::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(image), layer(image))


@pytest.mark.slow
def test_window_attention_compiles_whole():
    """Shifted and padded, forward and backward without a break; another batch needs no other graph."""
    fresh_dynamo()
    layer = RAGGED.layer()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (2, 3):
        image = RAGGED.input(batch)
        ours, wanted = results_of(compiled, layer, image), results_of(layer, layer, image)
        for name, each in wanted.items():
            torch.testing.assert_close(ours[name], each, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# -------------------------------------------------------------------------------- in swap, verify and explain


@each_case
def test_window_attention_explains_what_runs(case):
    """Of the very calls that dispatch decides."""
    layer, image, explained, decided = case.layer(), case.input(), [], []
    with dispatch.recording(lambda op, call, chosen: decided.append((call, chosen.name))):
        layer(image).sum().backward()
    for op, verdicts in zip(("FORWARD", "BACKWARD"), layer.explain(image).values(), strict=True):
        call, _ = decided[len(explained)]
        assert getattr(window_attention.attention, op).explain(call) == verdicts
        explained.append(next(each.backend for each in verdicts if each.accepts))
    assert explained == [name for _, name in decided]


def test_window_attention_is_left_alone_by_swap():
    model = nn.Sequential(RAGGED.layer(), nn.Conv2d(4, 4, 3, groups=4))
    report = pyarch.swap(model)
    assert [record.name for record in report.swapped] == ["1"]
    assert [(record.name, record.code) for record in report.skipped] == [("0", "already")]
    report.restore()
    assert type(model[0]) is pyarch.nn.WindowAttention


@pytest.mark.parametrize("backend", ("cpu",))
def test_window_attention_verifies(backend):
    """Beside itself on torch's operator, as no stock class computes it."""
    need(backend)
    proof = pyarch.verify(nn.Sequential(RAGGED.layer()), RAGGED.input(), timing=False)
    proof.assert_ok()
    assert [(layer.forward, layer.backward) for layer in proof.layers] == [(backend, backend)]
