"""attention_maps: the weights are those by which the model multiplies its values, whoever computes them."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pyarch
from tests.attention_context_cases import HEADS, TOKENS, WIDTH, Mixed, Net, tokens
from tests.compare import check
from tests.swap_cases import depthwise
from tests.window_attention_cases import CASES, SHIFTED, weights_of
from tests.window_attention_cases import HEADS as WINDOW_HEADS

OPERATOR = "attention"


def softmax_of(query, key, is_causal):
    """Attention weights by definition, in float64."""
    scores = query.double() @ key.double().mT / query.shape[-1] ** 0.5
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
    return scores.softmax(-1)


def stock_maps(model, *inputs, **kwargs):
    """What need_weights=True gives in every MultiheadAttention of a stock model, head by head."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):

            def ask(module, args, kwargs):
                return args, {
                    **kwargs,
                    "need_weights": True,
                    "average_attn_weights": False,
                    "is_causal": False,
                }

            def keep(module, args, output, name=name):
                found[name] = output[1]

            module.register_forward_pre_hook(ask, with_kwargs=True)
            module.register_forward_hook(keep)
    with torch.no_grad():
        model(*inputs, **kwargs)
    return found


def compared(model, *inputs, **kwargs):
    """The maps of a swapped copy, checked against stock in the model's dtype and in float64."""

    def double(value):
        return value.double() if torch.is_tensor(value) and value.is_floating_point() else value

    theirs = stock_maps(copy.deepcopy(model), *inputs, **kwargs)
    truth = stock_maps(
        copy.deepcopy(model).double(),
        *map(double, inputs),
        **{name: double(each) for name, each in kwargs.items()},
    )
    ours = copy.deepcopy(model)
    pyarch.swap(ours)
    names = ("src", "tgt") if isinstance(model, nn.Transformer) else ("src",)
    given = {**dict(zip(names, inputs, strict=True)), **kwargs}
    maps = pyarch.attention_maps(ours, given)
    assert list(maps) == list(theirs)
    for name, weights in maps.items():
        check(name, weights, theirs[name], truth[name])
    return maps


# -------------------------------------------------------------------------------- the right numbers


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_maps_of_encoder_and_decoder_layers(norm_first, training):
    model = nn.Transformer(24, 3, 2, 2, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
    model.train(training)
    source, target = tokens(2, 7), tokens(2, 5)
    maps = compared(
        model,
        source,
        target,
        src_key_padding_mask=torch.tensor([[False] * 7, [False] * 5 + [True] * 2]),
        tgt_mask=torch.ones(5, 5, dtype=torch.bool).triu(1),
        tgt_is_causal=True,
    )
    assert list(maps)[:2] == ["encoder.layers.0.self_attn", "encoder.layers.1.self_attn"]
    assert maps["decoder.layers.1.multihead_attn"].shape == (2, 3, 5, 7)
    assert maps["encoder.layers.0.self_attn"][1, :, :, 5:].count_nonzero() == 0
    assert maps["decoder.layers.0.self_attn"].triu(1).count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_maps_of_a_layer_in_every_dtype(dtype):
    """float64 runs by torch's own forward."""
    model = nn.TransformerEncoderLayer(24, 3, 32, batch_first=True, dtype=dtype).eval()
    maps = compared(model, tokens().to(dtype))
    assert maps["self_attn"].dtype == dtype and maps["self_attn"].device.type == "cpu"


def test_maps_of_a_layer_with_keys_of_its_own():
    layer = nn.MultiheadAttention(24, 3, add_bias_kv=True, add_zero_attn=True, kdim=8, vdim=6)
    query, key, value = torch.randn(5, 2, 24), torch.randn(7, 2, 8), torch.randn(7, 2, 6)
    wanted = layer(query, key, value, average_attn_weights=False)[1]
    pyarch.swap(layer)
    maps = pyarch.attention_maps(layer, (query, key, value))
    assert maps[""].shape == (2, 3, 5, 9)
    torch.testing.assert_close(maps[""], wanted.detach())


def test_maps_of_an_unbatched_layer_have_a_batch_of_one():
    layer, x = nn.MultiheadAttention(24, 3), torch.randn(5, 24)
    wanted = layer(x, x, x, average_attn_weights=False)[1].detach()
    pyarch.swap(layer)
    torch.testing.assert_close(pyarch.attention_maps(layer, (x, x, x))[""], wanted[None])
    mean = pyarch.attention_maps(layer, (x, x, x), heads=False)[""]
    torch.testing.assert_close(mean, wanted.mean(0)[None])


def test_maps_show_the_window_of_a_rule():
    model, x = nn.TransformerEncoderLayer(24, 3, 32, batch_first=True).eval(), tokens()
    pyarch.swap(model, rules={"*": pyarch.Config(window=(2, 0))})
    weights = pyarch.attention_maps(model, x)["self_attn"]
    seen = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril().triu(-2)
    assert torch.equal(weights != 0, seen.expand_as(weights))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, HEADS, TOKENS))


def test_maps_of_nested_tensors_are_padded():
    """torch's TransformerEncoder makes them of padded ones in evaluation."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 2, 32, batch_first=True), 2).eval()
    x, padding = tokens(2, 7), torch.tensor([[False] * 7, [False] * 5 + [True] * 2])
    slow = copy.deepcopy(encoder)
    slow.use_nested_tensor = False
    wanted = stock_maps(slow, x, src_key_padding_mask=padding)
    pyarch.swap(encoder)
    maps = pyarch.attention_maps(encoder, {"src": x, "src_key_padding_mask": padding})
    assert list(maps) == list(wanted)
    for name, weights in maps.items():
        torch.testing.assert_close(weights[0], wanted[name][0])
        torch.testing.assert_close(weights[1, :, :5], wanted[name][1, :, :5])


def test_maps_of_plain_calls_by_the_module_that_makes_them():
    model, x = Net(), tokens()
    hidden = torch.relu(model.first(x)) + x
    truth = {}
    for name, given in (("first", x), ("second", hidden)):
        query, key, _ = getattr(model, name).heads(given)
        truth[name] = (softmax_of(query, key, True), softmax_of(query, key, True).float())
    pyarch.swap(model, sdpa=True)
    maps = pyarch.attention_maps(model, x)
    assert list(maps) == ["first", "second"]
    for name, (exact, stock) in truth.items():
        # torch gives no weights of this function: the rounded truth stands for it, of rounded inputs.
        check(name, maps[name], stock, exact, noise=torch.finfo(torch.float32).eps)


def test_maps_of_plain_calls_and_layers_together():
    model, x = Mixed(), tokens()
    pyarch.swap(model, sdpa=True)
    maps = pyarch.attention_maps(model, x)
    assert [(name, tuple(each.shape)) for name, each in maps.items()] == [
        ("plain", (2, HEADS, TOKENS, TOKENS)),
        ("layer", (2, HEADS, TOKENS, TOKENS)),
    ]
    stock = Mixed()
    stock.load_state_dict(model.state_dict())
    torch.testing.assert_close(maps["layer"], stock_maps(stock, x)["layer"])


class Ranks(nn.Module):
    """Plain calls of other ranks than four."""

    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize(
    "leading, shape", [((), (1, 1)), ((4,), (4, 1)), ((2, 3), (2, 3)), ((2, 5, 3), (10, 3))]
)
def test_maps_of_plain_calls_of_every_rank(leading, shape):
    model, x = Ranks(), torch.randn(*leading, 6, 8)
    wanted = softmax_of(x, x, False).float().reshape(*shape, 6, 6)
    pyarch.swap(model, sdpa=True)
    torch.testing.assert_close(pyarch.attention_maps(model, x)[""], wanted)
    torch.testing.assert_close(pyarch.attention_maps(model, x, heads=False)[""], wanted.mean(1))


def test_maps_are_without_dropout():
    class Dropping(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)

    x = torch.randn(2, 3, 6, 8)
    layer = nn.MultiheadAttention(24, 3, dropout=0.5, batch_first=True)
    model = Dropping()
    pyarch.swap(model, sdpa=True)
    pyarch.swap(layer)
    ones = torch.ones(2, 3, 6)
    torch.testing.assert_close(pyarch.attention_maps(model, x)[""].sum(-1), ones)
    q = torch.randn(2, 6, 24)
    torch.testing.assert_close(pyarch.attention_maps(layer, (q, q, q))[""].sum(-1), ones)
    assert layer.dropout == 0.5


def test_maps_of_some_layers_leave_the_others_without_dropout():
    class Dropping(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x, None, 0.9)

    model, x = nn.Sequential(Dropping(), Dropping()), torch.randn(2, 3, 6, 8)
    pyarch.swap(model, sdpa=True)
    everything, last = pyarch.attention_maps(model, x), pyarch.attention_maps(model, x, layers="1")
    assert list(last) == ["1"]
    torch.testing.assert_close(last["1"], everything["1"])


def test_maps_mean_is_the_mean_of_the_heads():
    model, x = Mixed(), tokens()
    pyarch.swap(model, sdpa=True)
    by_head, mean = pyarch.attention_maps(model, x), pyarch.attention_maps(model, x, heads=False)
    for name in ("plain", "layer"):
        assert mean[name].shape == (2, TOKENS, TOKENS)
        torch.testing.assert_close(mean[name], by_head[name].mean(1))


# -------------------------------------------------------------------------------- inside windows


@pytest.mark.parametrize("case", CASES, ids=str)
def test_maps_of_window_attention(case):
    layer, image = case.layer(), case.input()
    exact = weights_of(copy.deepcopy(layer).double(), image.double())
    stock = weights_of(layer, image)
    maps = pyarch.attention_maps(nn.Sequential(layer), image)
    check("windows", maps["0"], stock, exact)
    tokens_each = case.window[0] * case.window[1]
    assert maps["0"].shape[1:] == (WINDOW_HEADS, tokens_each, tokens_each)
    mean = pyarch.attention_maps(nn.Sequential(layer), image, heads=False)["0"]
    check("mean", mean, stock.mean(1), exact.mean(1))


def test_maps_of_window_attention_are_without_dropout_and_drawn():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    layer = SHIFTED.layer(attention_dropout=0.5, dropout=0.5)
    maps = pyarch.attention_maps(layer, SHIFTED.input())
    torch.testing.assert_close(maps[""].sum(-1), torch.ones(maps[""].shape[:3]))
    (figure,) = maps.plot(head=1, sample=3)
    assert len([axes for axes in figure.axes if axes.images]) >= 1


class OfOwn(pyarch.nn.WindowAttention):
    """Computes something else, so that its weights are not known."""

    def forward(self, input):
        return 2 * super().forward(input)


def test_maps_of_window_attention_that_computes_something_else_are_none():
    layer = OfOwn(12, 4, 2, 3)
    with pytest.raises(ValueError, match="ran none of its attention"):
        pyarch.attention_maps(layer, torch.randn(2, 8, 8, 12))


# -------------------------------------------------------------------------------- which layers, which calls


class Shared(nn.Module):
    """A layer that runs twice."""

    def __init__(self):
        super().__init__()
        self.again = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.once = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x):
        for layer in (self.again, self.again, self.once):
            x = layer(x, x, x)[0]
        return x


def test_maps_number_the_calls_of_a_layer():
    model, x = Shared(), tokens()
    between = model.again(x, x, x)[0]
    wanted = [model.again(each, each, each, average_attn_weights=False)[1].detach() for each in (x, between)]
    pyarch.swap(model)
    maps = pyarch.attention_maps(model, x)
    assert list(maps) == ["again[0]", "again[1]", "once"]
    torch.testing.assert_close([maps["again[0]"], maps["again[1]"]], wanted)


@pytest.mark.parametrize(
    "layers, kept",
    [
        ("o*", ["once"]),
        (["re:.*gain"], ["again[0]", "again[1]"]),
        (["once", "again"], ["again[0]", "again[1]", "once"]),
    ],
)
def test_maps_of_chosen_layers(layers, kept):
    model = Shared()
    pyarch.swap(model)
    assert list(pyarch.attention_maps(model, tokens(), layers=layers)) == kept


def test_maps_of_chosen_plain_calls():
    model = Net()
    pyarch.swap(model, sdpa=True)
    assert list(pyarch.attention_maps(model, tokens(), layers="second")) == ["second"]


def test_maps_name_what_there_is():
    model = Shared()
    pyarch.swap(model)
    with pytest.raises(ValueError, match="'nine' fits none that ran: 'again', 'once'"):
        pyarch.attention_maps(model, tokens(), layers=["once", "nine"])
    with pytest.raises(KeyError, match=r"no map of 'again'; there are 'again\[0\]', 'again\[1\]', 'once'"):
        pyarch.attention_maps(model, tokens())["again"]


class Plain(nn.Module):
    """Attends over (1, 4, 8) with two heads."""

    def forward(self, x):
        heads = x.unflatten(2, (2, 4)).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads)


class Failing(nn.Module):
    def forward(self, x):
        raise ValueError


class Recovering(Plain):
    """Goes on where a part of it fails."""

    def __init__(self):
        super().__init__()
        self.part = Failing()

    def forward(self, x):
        try:
            self.part(x)
        except ValueError:
            return super().forward(x)


def test_maps_are_of_the_calls_of_their_own_thread():
    """A model that another thread runs in a context meanwhile is answered as always, and not recorded."""
    model, other = Plain(), Plain()
    pyarch.swap(model, sdpa=True)
    pyarch.swap(other, sdpa=True)
    x = torch.randn(1, 4, 8)
    with ThreadPoolExecutor(1) as pool:

        def meanwhile(module, args):
            pool.submit(other, x).result()

        model.register_forward_pre_hook(meanwhile)
        alone = pyarch.attention_maps(model, x)
    assert [tuple(each.shape) for each in alone.values()] == [(1, 2, 4, 4)]


def test_maps_name_a_call_rightly_after_a_part_has_failed():
    model = Recovering()
    pyarch.swap(model, sdpa=True)
    assert list(pyarch.attention_maps(model, torch.randn(1, 4, 8))) == [""]


@pytest.mark.parametrize("build", [Net, depthwise, lambda: nn.TransformerEncoderLayer(24, 3)])
def test_maps_need_attention_of_ours(build):
    model = build()
    with pytest.raises(ValueError, match=r"has no attention layer of pyarch: swap it first.*sdpa=True"):
        pyarch.attention_maps(model, tokens())


def test_maps_need_attention_that_runs():
    model = nn.Sequential(nn.Linear(4, 4))
    pyarch.swap(model, sdpa=True)
    with pytest.raises(ValueError, match="ran none of its attention on these inputs"):
        pyarch.attention_maps(model, torch.randn(2, 4))


def test_maps_refuse_what_are_no_inputs():
    model = Net()
    pyarch.swap(model, sdpa=True)
    with pytest.raises(TypeError, match="got float, needs a tensor"):
        pyarch.attention_maps(model, 1.5)


# -------------------------------------------------------------------------------- nothing changes


def test_maps_leave_the_model_and_the_generators_alone():
    model = nn.Sequential(Mixed(), nn.BatchNorm1d(TOKENS), nn.Dropout(0.5)).train()
    pyarch.swap(model, sdpa=True)
    x = tokens()
    model[0](x).sum().backward()
    given, state = x.clone(), copy.deepcopy(model.state_dict())
    gradients = [each.grad.clone() for each in model[0].parameters()]
    drawn = torch.get_rng_state()
    pyarch.attention_maps(model, x)
    assert torch.equal(torch.get_rng_state(), drawn) and torch.equal(x, given)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    assert all(torch.equal(each.grad, g) for each, g in zip(model[0].parameters(), gradients, strict=True))
    assert all(module.training for module in model.modules()) and model[2].p == 0.5
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_maps_show_the_model_itself_at_work():
    """What the watched copy computes is what the model computes."""
    model, x, seen = Mixed(), tokens(), []
    pyarch.swap(model, sdpa=True)
    model.register_forward_hook(lambda module, inputs, output: seen.append(output))
    pyarch.attention_maps(model, x)
    with torch.no_grad():
        model(x)
    torch.testing.assert_close(seen[0], seen[1])


def test_maps_carry_no_graph_and_print_their_shapes():
    model = Mixed()
    pyarch.swap(model, sdpa=True)
    maps = pyarch.attention_maps(model, tokens())
    assert not any(each.requires_grad for each in maps.values())
    assert "batch, heads, queries, keys" in str(maps) and "2x3x13x13" in str(maps)
    assert repr(maps) == "<AttentionMaps: 'plain', 'layer'>"
    assert len(maps) == 2 and "plain" in maps and dict(maps).keys() == maps.keys()
