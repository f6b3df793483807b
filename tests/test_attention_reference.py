"""The reference of attention: torch's meaning where torch has it, autograd's gradients, dropout's stream."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn import functional

from pyarch.reference import attention as reference
from pyarch.reference.attention import Extras, Settings, visible
from pyarch.reference.philox import MULTIPLIERS, WEYL, keep_mask, philox, threshold

OPERATOR = "attention"
pytestmark = pytest.mark.operator(OPERATOR, "reference")

SEED = torch.tensor(-0x123456789ABCDEF)
B, H, TQ, TK, D, DV = 2, 4, 3, 5, 2, 3


class Call:
    """A call in float64, small enough for numeric derivatives, on options named as in Settings and Extras.

    Of the extras, True draws one; mask and bias are given by their shape.
    """

    def __init__(
        self,
        kv_heads=H,
        queries=TQ,
        mask=None,
        bias=None,
        padding=False,
        global_mask=False,
        sinks=False,
        distance=None,
        dtype=torch.float64,
        **settings,
    ):
        generator = torch.Generator().manual_seed(0)
        self.settings = Settings(**{"scale": 0.7} | settings)
        shapes = (B, H, queries, D), (B, kv_heads, TK, D), (B, kv_heads, TK, DV)
        self.query, self.key, self.value = (
            torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
        )
        self.extras = Extras(
            None if mask is None else torch.rand(mask, generator=generator) < 0.6,
            None if bias is None else torch.randn(bias, generator=generator, dtype=torch.float64).to(dtype),
            torch.rand((B, TK), generator=generator) < 0.4 if padding else None,
            torch.rand((B, TK + 1), generator=generator) < 0.4 if global_mask else None,
            torch.randn(H, generator=generator, dtype=torch.float64).to(dtype) if sinks else None,
            SEED if 0 < self.settings.dropout_p < 1 else None,
            None if distance is None else torch.randn(distance, generator=generator, dtype=dtype),
        )

    @property
    def leaves(self):
        extras = self.extras
        given = self.query, self.key, self.value, extras.bias, extras.sinks, extras.distance_bias
        return [each.detach().requires_grad_() for each in given if each is not None]

    @property
    def needs(self):
        extras = self.extras
        optional = extras.bias, extras.sinks, extras.distance_bias
        return True, True, True, *(each is not None for each in optional)

    def taken_apart(self, leaves):
        query, key, value, *rest = leaves
        given = {
            name: rest.pop(0)
            for name in ("bias", "sinks", "distance_bias")
            if getattr(self.extras, name) is not None
        }
        return query, key, value, self.extras._replace(**given)

    def forward(self, *leaves):
        return reference.attention(*self.taken_apart(leaves), self.settings)

    def finite_forward(self, *leaves):
        """`forward` with zeros for an lse of -inf, of which no difference can be taken."""
        out, lse = self.forward(*leaves)
        return out, torch.where(lse == -math.inf, 0.0, lse)


OPTIONS = {
    "plain": {},
    "causal": dict(is_causal=True),
    "causal, offset 2": dict(is_causal=True, query_offset=2),
    "causal, offset -1": dict(is_causal=True, query_offset=-1),
    "window": dict(left=1, right=0),
    "left only": dict(left=1),
    "dilated": dict(left=1, right=1, dilation=2),
    "dilated, unbounded": dict(dilation=2, query_offset=1),
    "global tokens": dict(left=0, right=0, global_tokens=1),
    "global mask, causal": dict(left=1, right=0, global_mask=True, is_causal=True, query_offset=1),
    "mask": dict(mask=(B, H, TQ, TK)),
    "mask for all heads": dict(mask=(B, 1, TQ, TK), kv_heads=2),
    "mask of queries": dict(mask=(1, H, TQ, 1), kv_heads=2),
    "bias": dict(bias=(B, H, TQ, TK)),
    "bias for all samples": dict(bias=(1, H, TQ, TK)),
    "bias of keys": dict(bias=(B, 1, 1, TK)),
    "distance": dict(distance=(B, H, TQ + TK - 1)),
    "distance for all samples": dict(distance=(1, H, TQ + TK - 1), kv_heads=2),
    "distance for all heads": dict(distance=(B, 1, TQ + TK - 1), is_causal=True),
    "padding": dict(padding=True),
    "softcap": dict(softcap=1.5),
    "sinks": dict(sinks=True),
    "shared heads": dict(kv_heads=2),
    "dropout": dict(dropout_p=0.4),
    "all dropped": dict(dropout_p=1.0),
    "all of it": dict(
        kv_heads=2,
        mask=(B, H, TQ, TK),
        bias=(1, H, TQ, TK),
        distance=(B, H, TQ + TK - 1),
        padding=True,
        global_mask=True,
        sinks=True,
        is_causal=True,
        left=1,
        right=1,
        dilation=2,
        global_tokens=1,
        query_offset=1,
        softcap=2.0,
        dropout_p=0.3,
    ),
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


# ------------------------------------------------------------------------------------ gradients


@each_option
def test_attention_reference_gradcheck(options):
    call = Call(**options)
    assert torch.autograd.gradcheck(call.finite_forward, call.leaves)


@each_option
def test_attention_reference_gradgradcheck(options):
    call = Call(**options)
    assert torch.autograd.gradgradcheck(call.finite_forward, call.leaves, fast_mode=True)


@each_option
@pytest.mark.parametrize("lse_too", [False, True])
def test_attention_reference_backward_is_autograds(options, lse_too):
    call = Call(**options)
    leaves = call.leaves
    out, lse = call.forward(*leaves)
    grads = torch.randn_like(out), torch.randn_like(lse) if lse_too else None
    expected = torch.autograd.grad((out, lse)[: 1 + lse_too], leaves, grads[: 1 + lse_too], allow_unused=True)
    with torch.no_grad():
        query, key, value, extras = call.taken_apart(leaves)
        arguments = query, key, value, out, lse, extras, call.settings
        written = reference.backward(*grads, *arguments, call.needs)
    given = [each for each in written if each is not None]
    assert len(given) == len(leaves)
    for ours, autograds, leaf in zip(given, expected, leaves, strict=True):
        assert ours.shape == leaf.shape
        torch.testing.assert_close(ours, torch.zeros_like(leaf) if autograds is None else autograds)
    if call.settings.dropout_p < 1:
        assert all(each.abs().max() > 0 for each in given)


def test_attention_reference_backward_gives_what_is_needed():
    call = Call(**OPTIONS["all of it"])
    query, key, value, extras = call.taken_apart(call.leaves)
    with torch.no_grad():
        out, lse = reference.forward(query, key, value, extras, call.settings)
        for needs in itertools.product((False, True), repeat=6):
            arguments = torch.ones_like(out), None, query, key, value, out, lse, extras, call.settings
            found = reference.backward(*arguments, needs)
            assert tuple(each is not None for each in found) == needs


# ------------------------------------------------------------------------------------ torch's meaning


STOCK = {
    "plain": ({}, {}),
    "causal": (dict(is_causal=True), dict(is_causal=True)),
    "causal, more queries": (dict(is_causal=True, queries=7), dict(is_causal=True)),
    "scale": (dict(scale=0.1), {}),
    "shared heads": (dict(kv_heads=2), dict(enable_gqa=True)),
    "bias": (dict(bias=(B, H, TQ, TK)), {}),
    "bias for all": (dict(bias=(1, 1, TQ, TK)), {}),
    "mask": (dict(mask=(B, 1, TQ, TK)), {}),
}


@pytest.mark.parametrize("options, torchs", STOCK.values(), ids=STOCK)
def test_attention_reference_is_torchs(options, torchs):
    call = Call(**options)
    mask = call.extras.mask
    if mask is not None:
        mask[..., 0] = True  # torch has no answer for an empty row
    leaves = call.leaves
    query, key, value, extras = call.taken_apart(leaves)
    masks = extras.bias if mask is None else mask
    stock = functional.scaled_dot_product_attention(
        query, key, value, masks, scale=call.settings.scale, **torchs
    )
    out, _ = call.forward(*leaves)
    torch.testing.assert_close(out, stock)
    cotangent = torch.randn_like(out)
    expected = torch.autograd.grad(stock, leaves, cotangent)
    for ours, theirs in zip(torch.autograd.grad(out, leaves, cotangent), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_attention_reference_lse_is_logsumexp():
    call = Call()
    _, lse = reference.forward(call.query, call.key, call.value, call.extras, call.settings)
    expected = (call.settings.scale * call.query @ call.key.mT).logsumexp(-1)
    torch.testing.assert_close(lse, expected)
    torch.testing.assert_close(reference.lse_of(call.query, call.key, call.extras, call.settings), expected)


def test_attention_reference_softcap_and_sinks():
    call = Call(softcap=1.5, sinks=True, bias=(B, H, TQ, TK))
    scores = 1.5 * (call.settings.scale * call.query @ call.key.mT / 1.5).tanh() + call.extras.bias
    sinks = call.extras.sinks.view(1, H, 1, 1).expand(B, H, TQ, 1)
    with_sinks = torch.cat([scores, sinks], -1)
    out, lse = reference.forward(call.query, call.key, call.value, call.extras, call.settings)
    torch.testing.assert_close(lse, with_sinks.logsumexp(-1))
    torch.testing.assert_close(out, with_sinks.softmax(-1)[..., :-1] @ call.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_reference_computes_16_bits_in_float32(dtype):
    call = Call(dtype=dtype, sinks=True, bias=(1, H, TQ, TK), softcap=2.0)
    out, lse = reference.forward(call.query, call.key, call.value, call.extras, call.settings)
    extras = call.extras._replace(bias=call.extras.bias.float(), sinks=call.extras.sinks.float())
    wide = [each.float() for each in (call.query, call.key, call.value)]
    expected, expected_lse = reference.forward(*wide, extras, call.settings)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    assert torch.equal(out, expected.to(dtype)) and torch.equal(lse, expected_lse)


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "heads last": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "batch second": lambda t: t.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
    "width outside": lambda t: t.mT.contiguous().mT,
    "expanded": lambda t: t[:1].expand(t.shape),
    "sliced": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "every other": lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
}


@pytest.mark.parametrize("lay_out", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("value_dim", [D, DV])
def test_attention_reference_output_is_laid_out_as_torchs(lay_out, value_dim):
    call = Call()
    query = lay_out(call.query)
    arguments = query, call.key, call.value[..., :value_dim]
    out, lse = reference.forward(*arguments, call.extras, call.settings)
    stock = functional.scaled_dot_product_attention(*arguments)
    assert out.stride() == stock.stride()
    assert lse.is_contiguous()
    grads = reference.backward(
        torch.ones_like(out), None, *arguments, out, lse, call.extras, call.settings, call.needs
    )
    assert [each.stride() for each in grads[:3]] == [torch.empty_like(each).stride() for each in arguments]


# ------------------------------------------------------------------------------------ who sees whom


def visible_by_loops(extras, settings, batch, head, queries, keys):
    """The definition, one pair at a time."""

    def is_global(token):
        named = extras.global_mask
        return 0 <= token < settings.global_tokens or (
            named is not None and 0 <= token < named.shape[1] and bool(named[batch, token])
        )

    def windowed(key, position):
        if settings.left is None and settings.right is None and settings.dilation == 1:
            return True
        steps, rest = divmod(key - position, settings.dilation)
        below = settings.left is not None and steps < -settings.left
        above = settings.right is not None and steps > settings.right
        return rest == 0 and not below and not above

    def sees(query, key):
        position = query + settings.query_offset
        seen = windowed(key, position) or is_global(key) or is_global(position)
        if settings.is_causal:
            seen = seen and key <= position
        if extras.mask is not None:
            seen = seen and bool(extras.mask[batch, head, query, key])
        if extras.padding is not None:
            seen = seen and not bool(extras.padding[batch, key])
        return seen

    return [[sees(query, key) for key in range(keys)] for query in range(queries)]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("left, right", [(None, None), (0, 0), (2, 1), (None, 1), (1, None), (100, 100)])
@pytest.mark.parametrize("dilation", [1, 3])
@pytest.mark.parametrize("query_offset", [0, 4, -3])
@pytest.mark.parametrize("global_tokens", [0, 2])
@pytest.mark.parametrize("named", [None, 0, 3, 20])
def test_attention_reference_visible_is_its_definition(
    is_causal, left, right, dilation, query_offset, global_tokens, named
):
    queries, keys = 6, 9
    settings = Settings(1.0, is_causal, left, right, dilation, global_tokens, query_offset)
    extras = Extras(global_mask=None if named is None else torch.rand(B, named) < 0.3)
    seen = visible(extras, settings, queries, keys, torch.device("cpu"))
    seen = torch.ones(1, 1, 1, 1, dtype=torch.bool) if seen is None else seen
    for batch in range(B):
        expected = visible_by_loops(extras, settings, batch, 0, queries, keys)
        assert seen.expand(B, 1, queries, keys)[batch, 0].tolist() == expected


def test_attention_reference_visible_with_mask_and_padding():
    call = Call(mask=(B, H, TQ, TK), padding=True, left=2, right=1, is_causal=True, query_offset=1)
    seen = visible(call.extras, call.settings, TQ, TK, torch.device("cpu"))
    for batch, head in itertools.product(range(B), range(H)):
        expected = visible_by_loops(call.extras, call.settings, batch, head, TQ, TK)
        assert seen[batch, head].tolist() == expected


# ------------------------------------------------------------------------------------ nothing to see


def blind_call(**options):
    """The second query sees nothing, the last key is seen by none."""
    call = Call(**options)
    mask = torch.ones(B, H, TQ, TK, dtype=torch.bool)
    mask[:, :, 1], mask[..., -1] = False, False
    call.extras = call.extras._replace(mask=mask)
    return call


@pytest.mark.parametrize("kv_heads", [H, 2])
def test_attention_reference_blind_query_gives_zeros(kv_heads):
    call = blind_call(kv_heads=kv_heads)
    leaves = call.leaves
    out, lse = call.forward(*leaves)
    assert not out[:, :, 1].any() and (lse[:, :, 1] == -math.inf).all()
    grads = torch.autograd.grad((out, lse), leaves, (torch.randn_like(out), torch.randn_like(lse)))
    assert not grads[0][:, :, 1].any() and grads[0][:, :, 0].all()
    assert not grads[1][:, :, -1].any() and not grads[2][:, :, -1].any()


def test_attention_reference_blind_query_with_sinks():
    call = blind_call(sinks=True)
    out, lse = reference.forward(call.query, call.key, call.value, call.extras, call.settings)
    assert not out[:, :, 1].any()
    torch.testing.assert_close(lse[:, :, 1], call.extras.sinks.expand(B, H))


def test_attention_reference_bias_of_minus_infinity_blinds():
    call = Call(bias=(1, H, TQ, TK))
    call.extras.bias[:, :, 1] = -math.inf
    leaves = call.leaves
    out, lse = call.forward(*leaves)
    assert not out[:, :, 1].any() and (lse[:, :, 1] == -math.inf).all()
    grads = torch.autograd.grad((out, lse), leaves, (torch.randn_like(out), torch.randn_like(lse)))
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[0][:, :, 1].any() and not grads[3][:, :, 1].any()


@pytest.mark.parametrize("kv_heads", [H, 2])
@pytest.mark.parametrize("junk", [math.nan, math.inf])
def test_attention_reference_unseen_junk_has_no_influence(junk, kv_heads):
    """NaN in a key and value that nobody sees, in a query that sees nothing, and in what arrives there."""
    call = blind_call(kv_heads=kv_heads, sinks=True, bias=(1, H, TQ, TK))
    clean = call.leaves
    results = call.forward(*clean)
    arriving = [torch.randn_like(each) for each in results]
    expected = torch.autograd.grad(results, clean, arriving)
    for position, (tensor, where) in enumerate(zip(clean[:3], (1, -1, -1), strict=True)):
        with torch.no_grad():
            clean[position] = tensor.index_fill(2, torch.tensor(where % tensor.shape[2]), junk)
        clean[position].requires_grad_()
    arriving[0][:, :, 1] = junk
    dirty = call.forward(*clean)
    for ours, cleans in zip(dirty, results, strict=True):
        assert torch.equal(ours, cleans)
    with torch.no_grad():
        query, key, value, extras = call.taken_apart(clean)
        arguments = query, key, value, *dirty, extras, call.settings, call.needs
        written = [each for each in reference.backward(*arriving, *arguments) if each is not None]
    of_autograd = torch.autograd.grad(dirty, clean, arriving)
    for ours, autograds, cleans in zip(written, of_autograd, expected, strict=True):
        torch.testing.assert_close(autograds, cleans)
        torch.testing.assert_close(ours, cleans)


@pytest.mark.parametrize("empty", ["batch", "queries", "keys"])
def test_attention_reference_empty(empty):
    call = Call(sinks=True)
    batch = slice(0, 0 if empty == "batch" else B)
    queries, keys = slice(0, 0 if empty == "queries" else TQ), slice(0, 0 if empty == "keys" else TK)
    tensors = call.query[batch, :, queries], call.key[batch, :, keys], call.value[batch, :, keys]
    out, lse = reference.forward(*tensors, call.extras, call.settings)
    assert out.shape == (*tensors[0].shape[:3], DV) and not out.any()
    assert lse.shape == tensors[0].shape[:3]
    grads = reference.backward(
        torch.ones_like(out), None, *tensors, out, lse, call.extras, call.settings, call.needs
    )
    assert [each.shape for each in grads[:3]] == [each.shape for each in tensors]
    assert not any(each.any() for each in grads[:3])


# ------------------------------------------------------------------------------------ weights


@each_option
@pytest.mark.parametrize("mean", [False, True])
def test_attention_reference_weights_weigh_the_values(options, mean):
    call = Call(**options)
    query, key, value, extras = call.taken_apart(call.leaves)
    with torch.no_grad():
        out, lse = reference.forward(query, key, value, extras, call.settings)
        found = reference.weights(query, key, lse, extras, call.settings, mean)
        heads = reference.weights(query, key, lse, extras, call.settings, False)
    assert found.shape == ((B, TQ, TK) if mean else (B, H, TQ, TK)) and found.is_contiguous()
    torch.testing.assert_close(heads @ value.repeat_interleave(H // value.shape[1], 1), out)
    torch.testing.assert_close(found, heads.mean(1) if mean else heads)


@each_option
@pytest.mark.parametrize("mean", [False, True])
def test_attention_reference_weights_backward_is_autograds(options, mean):
    call = Call(**options)
    query, key, _, extras = call.taken_apart(call.leaves)
    lse = reference.lse_of(query, key, extras, call.settings).detach().requires_grad_()
    found = reference.weights_from(query, key, lse, extras, call.settings, mean)
    leaves = [each for each in (query, key, lse, extras.bias, extras.distance_bias) if each is not None]
    cotangent = torch.randn_like(found)
    expected = torch.autograd.grad(found, leaves, cotangent)
    needs = True, True, True, extras.bias is not None, extras.distance_bias is not None
    with torch.no_grad():
        written = reference.weights_backward(cotangent, query, key, lse, extras, call.settings, needs)
    for ours, autograds in zip([each for each in written if each is not None], expected, strict=True):
        torch.testing.assert_close(ours, autograds)


# ------------------------------------------------------------------------------------ dropout's stream


# Random123's kat_vectors of philox4x32-10: counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, words", KNOWN)
def test_attention_reference_philox_known_answers(counter, key, words):
    found = philox([torch.tensor(each) for each in counter], [torch.tensor(each) for each in key])
    assert tuple(int(each) for each in found) == words


def philox_in_integers(counter, key):
    """The same ten rounds in Python's unbounded integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        one, two = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (two >> 32) ^ c1 ^ k0, two % 2**32, (one >> 32) ^ c3 ^ k1, one % 2**32
        k0, k1 = (k0 + WEYL[0]) % 2**32, (k1 + WEYL[1]) % 2**32
    return c0, c1, c2, c3


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF])
def test_attention_reference_keep_mask_is_its_definition(seed):
    dropout_p, keys = 0.3, 10
    kept = keep_mask(torch.tensor(seed), dropout_p, B, H, TQ, keys)
    key = seed % 2**32, (seed >> 32) % 2**32
    for b, h, i, j in itertools.product(range(B), range(H), range(TQ), range(keys)):
        word = philox_in_integers((j // 4, i, b * H + h, 0), key)[j % 4]
        assert kept[b, h, i, j] == (word >= round(dropout_p * 2**32))


@pytest.mark.parametrize(
    "dropout_p, expected", [(0.5, 2**31), (2**-40, 0), (1 - 2**-40, 2**32 - 1), (0.25, 2**30)]
)
def test_attention_reference_threshold(dropout_p, expected):
    assert threshold(dropout_p) == expected


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_attention_reference_keeps_the_right_share(dropout_p):
    """A quarter of a million draws within five standard deviations: all, each word of a block, each head."""
    kept = keep_mask(torch.tensor(3), dropout_p, 4, 4, 128, 128).double()
    for part in (kept, *(kept[..., word::4] for word in range(4)), *kept.flatten(0, 1)):
        deviation = math.sqrt(dropout_p * (1 - dropout_p) / part.numel())
        assert abs(part.mean().item() - (1 - dropout_p)) < 5 * deviation
    assert kept.flatten(0, 1).unique(dim=0).shape[0] == 16
    assert not torch.equal(kept, keep_mask(torch.tensor(4), dropout_p, 4, 4, 128, 128).double())


def test_attention_reference_dropout_is_of_probabilities():
    call = Call(dropout_p=0.4)
    out, lse = reference.forward(call.query, call.key, call.value, call.extras, call.settings)
    undropped = call.settings._replace(dropout_p=0.0)
    _, expected_lse = reference.forward(call.query, call.key, call.value, Extras(), undropped)
    probabilities = (call.settings.scale * call.query @ call.key.mT).softmax(-1)
    kept = keep_mask(SEED, 0.4, B, H, TQ, TK)
    assert 0 < kept.sum() < kept.numel()
    torch.testing.assert_close(out, (probabilities * kept / 0.6) @ call.value)
    torch.testing.assert_close(lse, expected_lse)


def test_attention_reference_all_dropped_is_zero_even_of_nan():
    call = Call(dropout_p=1.0)
    value = torch.full_like(call.value, math.nan)
    out, lse = reference.forward(call.query, call.key, value, call.extras, call.settings)
    assert not out.any() and lse.isfinite().all()
