"""What transformers asks of "pyarch": registered in pairs, masks as patterns where they are known, its terms.

transformers' own mask functions and attention functions are the truth here.
"""

from __future__ import annotations

import importlib.abc
import os
import sys

import pytest
import torch
from torch import Tensor, nn

import pyarch
from pyarch import dispatch
from tests.compare import check

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip(
    "transformers", reason="transformers not installed, needs pip install -e .[transformers]"
)

from transformers import masking_utils  # noqa: E402
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as eager  # noqa: E402
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as eager_sinks  # noqa: E402

from pyarch.integrations.transformers import register  # noqa: E402
from pyarch.integrations.transformers_attention import attention  # noqa: E402
from pyarch.integrations.transformers_mask import PatternMask, mask  # noqa: E402

pytestmark = pytest.mark.thirdparty

REGISTRIES = transformers.AttentionInterface, transformers.AttentionMaskInterface


@pytest.fixture(autouse=True)
def registries(monkeypatch):
    """transformers' registries, restored after the test."""
    for registry in REGISTRIES:
        monkeypatch.setattr(registry, "_global_mapping", dict(registry._global_mapping))


def holders(name: str) -> list[bool]:
    return [name in registry() for registry in REGISTRIES]


# -------------------------------------------------------------------------------- registration


def test_transformers_register_both():
    assert holders("pyarch") == [False, False]
    pyarch.integrations.transformers.register()
    assert holders("pyarch") == [True, True]
    assert transformers.AttentionInterface()["pyarch"] is attention
    assert transformers.AttentionMaskInterface()["pyarch"] is mask


def test_transformers_register_twice_and_under_two_names():
    register()
    before = [dict(registry._global_mapping) for registry in REGISTRIES]
    register()
    assert [dict(registry._global_mapping) for registry in REGISTRIES] == before
    register("mine")
    assert holders("mine") == holders("pyarch") == [True, True]


@pytest.mark.parametrize("failing", REGISTRIES, ids=lambda registry: registry.__name__)
def test_transformers_register_one_alone_is_undone(monkeypatch, failing):
    def fail(key, value):
        raise RuntimeError("no room")

    monkeypatch.setattr(failing, "register", fail)
    with pytest.raises(RuntimeError, match="no room"):
        register()
    assert holders("pyarch") == [False, False]


@pytest.mark.parametrize("lost", REGISTRIES, ids=lambda registry: registry.__name__)
def test_transformers_register_completes_a_pair(lost):
    register()
    del lost._global_mapping["pyarch"]
    register()
    assert holders("pyarch") == [True, True]


def test_transformers_register_is_the_only_public_name():
    assert pyarch.integrations.transformers.__all__ == ["register"]


@pytest.mark.parametrize("name", ["sdpa", "eager", "flex_attention"])
def test_transformers_register_leaves_others_alone(name):
    before = [dict(registry._global_mapping) for registry in REGISTRIES]
    with pytest.raises(ValueError, match=f"'{name}' is another attention implementation"):
        register(name)
    assert [dict(registry._global_mapping) for registry in REGISTRIES] == before


@pytest.mark.parametrize("name", ["", "owner/kernel", "paged|pyarch", "my_flash", "a b", 3])
def test_transformers_register_refuses_names_that_mean_something(name):
    with pytest.raises(ValueError, match="name must be letters"):
        register(name)


def test_transformers_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="transformers is not installed, needs 5.4 or later: pip install"):
        register()


def test_transformers_that_misses_something_itself_says_what(monkeypatch):
    """transformers is there: the error is its own."""

    class Broken(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name == "transformers":
                raise ModuleNotFoundError("No module named 'tokenizers'", name="tokenizers")

    monkeypatch.delitem(sys.modules, "transformers")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(ModuleNotFoundError, match="^No module named 'tokenizers'$"):
        register()


@pytest.mark.parametrize("version", ["4.57.1", "5.3.0", "5.0.0.dev0"])
def test_transformers_too_old(monkeypatch, version):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    with pytest.raises(ImportError, match=f"transformers {version} is too old, needs 5.4 or later: pip"):
        register()
    assert holders("pyarch") == [False, False]


# -------------------------------------------------------------------------------- known patterns


B, H, HK, D = 2, 4, 2, 8


class Layer(nn.Module):
    """What the attention functions read of a layer."""

    def __init__(self, is_causal: bool | None = None, sinks: Tensor | None = None):
        super().__init__()
        self.num_key_value_groups = H // HK
        if is_causal is not None:
            self.is_causal = is_causal
        self.sinks = sinks


def tensors(queries: int, keys: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (B, H, queries, D), (B, HK, keys, D), (B, HK, keys, D)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


PATTERNS = {
    "causal": (masking_utils.causal_mask_function, None),
    "all": (masking_utils.bidirectional_mask_function, None),
    **{
        f"{kind} {size}": (function(size), size)
        for kind, function in (
            ("last", masking_utils.sliding_window_causal_mask_function),
            ("near", masking_utils.sliding_window_bidirectional_mask_function),
        )
        for size in (1, 3, 8, 50)
    },
}

# Tq, Tk, position of the first query and of the first key: a prompt, a part of one, a token on a growing
# cache, and both on a cache that keeps the last keys alone.
PLACES = (9, 9, 0, 0), (4, 9, 5, 0), (1, 9, 8, 0), (1, 4, 10, 7), (3, 7, 9, 5)


def paddings(tokens: int) -> dict[str, Tensor | None]:
    """Tokens that are no padding: all, and of the first sequence those after three or before the last two."""
    left, right = torch.ones(2, B, tokens, dtype=torch.bool)
    left[0, :3], right[0, -2:] = False, False
    return {"none": None, "full": torch.ones(B, tokens, dtype=torch.bool), "left": left, "right": right}


@pytest.mark.parametrize("name", PATTERNS)
def test_transformers_pattern_sees_what_the_mask_of_sdpa_sees(name):
    """Probabilities are positive exactly where transformers' own mask is True."""
    function, size = PATTERNS[name]
    is_causal = name.startswith(("causal", "last"))
    for queries, keys, q_offset, kv_offset in PLACES:
        for padding in paddings(keys + kv_offset).values():
            arguments = dict(
                batch_size=B,
                q_length=queries,
                kv_length=keys,
                q_offset=q_offset,
                kv_offset=kv_offset,
                mask_function=function,
                attention_mask=padding,
                local_size=size,
            )
            skips = dict(allow_is_causal_skip=is_causal, allow_is_bidirectional_skip=not is_causal)
            wanted = masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False)
            found = mask(**arguments, **skips)
            assert found is None or isinstance(found, PatternMask)
            with torch.no_grad():
                _, weights = attention(
                    Layer(is_causal), *tensors(queries, keys), found, output_attentions=True
                )
            assert torch.equal(weights > 0, wanted.expand(B, H, queries, keys))
            if found is not None:
                assert found.shape == wanted.shape and found.dtype == torch.bool
                assert torch.equal(found.read(), wanted)


@pytest.mark.parametrize("name", PATTERNS)
def test_transformers_no_mask_only_where_sdpa_has_none_or_one_that_hides_nothing(name):
    function, size = PATTERNS[name]
    skip = "allow_is_causal_skip" if name.startswith(("causal", "last")) else "allow_is_bidirectional_skip"
    skipped = 0
    for queries, keys, q_offset, kv_offset in PLACES:
        for padding in paddings(keys + kv_offset).values():
            arguments = dict(
                batch_size=B,
                q_length=queries,
                kv_length=keys,
                q_offset=q_offset,
                kv_offset=kv_offset,
                mask_function=function,
                attention_mask=padding,
                local_size=size,
                allow_is_causal_skip=False,
            )
            assert mask(**arguments) is not None
            arguments[skip] = True
            if mask(**arguments) is None:
                skipped += 1
                wanted = masking_utils.sdpa_mask(**arguments)
                assert wanted is None or wanted.all()
    assert skipped or size in (1, 3)


def test_transformers_padding_mask_shorter_than_the_keys():
    """Positions beyond the padding mask are padding, as on a cache that is not full."""
    arguments = dict(batch_size=B, q_length=4, kv_length=9, attention_mask=torch.ones(B, 6, dtype=torch.bool))
    wanted = masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False)
    found = mask(**arguments, mask_function=masking_utils.causal_mask_function)
    assert isinstance(found, PatternMask) and torch.equal(found.read(), wanted)
    assert torch.equal(found.read(), wanted)


# -------------------------------------------------------------------------------- other masks


CONFIG = dict(
    hidden_size=32,
    num_attention_heads=4,
    num_hidden_layers=2,
    sliding_window=4,
    attn_implementation="pyarch",
)


def other_masks() -> dict[str, tuple]:
    """Masks that are no pattern of ours: the function that makes one, and its arguments."""
    embedded = torch.zeros(B, 9, 32)
    blocks = torch.full((B, 9), -1)
    blocks[:, 2:5] = 0
    every_third = dict(or_mask_function=lambda b, h, q, k: k % 3 == 0)
    common = dict(inputs_embeds=embedded, attention_mask=paddings(9)["left"], past_key_values=None)
    packed = dict(
        common, attention_mask=None, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]).expand(B, -1)
    )
    return {
        "or": (masking_utils.create_causal_mask, {**common, **every_third}),
        "and": (
            masking_utils.create_sliding_window_causal_mask,
            {**common, "and_mask_function": every_third["or_mask_function"]},
        ),
        "or, bidirectional": (masking_utils.create_bidirectional_mask, {**common, **every_third}),
        "packed": (masking_utils.create_causal_mask, packed),
        "packed, sliding": (masking_utils.create_sliding_window_causal_mask, packed),
        "blocks": (masking_utils.create_causal_mask, {**common, "block_sequence_ids": blocks}),
        "chunks": (masking_utils.create_chunked_causal_mask, common),
    }


@pytest.mark.parametrize("name", other_masks())
def test_transformers_other_masks_are_those_of_sdpa(name):
    register()
    config = transformers.MistralConfig(**CONFIG)
    config.attention_chunk_size = 3
    create, arguments = other_masks()[name]
    found = create(config, **arguments)
    config._attn_implementation = "sdpa"
    wanted = create(config, **arguments)
    assert type(found) is Tensor and torch.equal(found, wanted)


def test_transformers_window_and_length_that_disagree():
    """A mask function with a window other than the one that transformers names is not taken for it."""
    function = masking_utils.sliding_window_causal_mask_function(3)
    for size in (None, 4):
        arguments = dict(batch_size=B, q_length=9, kv_length=9, mask_function=function, local_size=size)
        found = mask(**arguments, allow_is_causal_skip=False)
        wanted = masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False)
        assert type(found) is Tensor and torch.equal(found, wanted)


def test_transformers_length_in_a_tensor():
    """A static cache counts in a tensor, which is not read."""
    arguments = dict(batch_size=B, q_length=2, kv_length=9, q_offset=torch.tensor(3))
    found = mask(**arguments)
    assert type(found) is Tensor and torch.equal(found, masking_utils.sdpa_mask(**arguments))


def test_transformers_mask_of_the_caller_stays():
    register()
    config = transformers.MistralConfig(**CONFIG)
    given = torch.rand(B, 1, 9, 9) > 0.5
    embedded = torch.zeros(B, 9, 32)
    assert masking_utils.create_causal_mask(config, embedded, given, None) is given
    ours = masking_utils.create_causal_mask(config, embedded, paddings(9)["left"], None)
    assert isinstance(ours, PatternMask)
    assert masking_utils.create_sliding_window_causal_mask(config, embedded, ours, None) is ours


# -------------------------------------------------------------------------------- masks that are read


def left_padded() -> tuple[PatternMask, Tensor]:
    arguments = dict(batch_size=B, q_length=9, kv_length=9, attention_mask=paddings(9)["left"])
    return mask(**arguments), masking_utils.sdpa_mask(**arguments)


@pytest.mark.parametrize(
    "read",
    [
        lambda mask: mask & torch.ones(9, dtype=torch.bool),
        lambda mask: mask[:, :, 2:, :5],
        lambda mask: torch.where(mask, 0.0, -1.0),
        lambda mask: mask.to(torch.float32),
        lambda mask: torch.cat([mask, mask], dim=-1),
        lambda mask: mask.clone(),
        lambda mask: mask.sum(-1),
    ],
)
def test_transformers_model_that_reads_its_mask_gets_the_one_of_sdpa(read):
    ours, wanted = left_padded()
    found = read(ours)
    assert type(found) is Tensor and torch.equal(found, read(wanted))


def test_transformers_mask_changed_in_place():
    ours, wanted = left_padded()
    ours[:, :, :, 4] = False
    wanted[:, :, :, 4] = False
    given = tensors(9, 9)
    changed, _ = attention(Layer(), *given, ours)
    assert ours.pattern is None and torch.equal(changed, attention(Layer(), *given, wanted)[0])
    assert not torch.equal(changed, attention(Layer(), *given, left_padded()[0])[0])


def test_transformers_mask_of_another_length_is_read():
    """Keys that a layer has shortened do not fit the pattern: the error is that of a mask."""
    ours, wanted = left_padded()
    for each in (ours, wanted):
        with pytest.raises(RuntimeError, match="size"):
            attention(Layer(), *tensors(9, 7), each)


def test_transformers_mask_is_shown_without_being_read():
    ours, _ = left_padded()
    assert repr(ours).startswith("PatternMask((2, 1, 9, 9), Pattern(is_causal=True") and ours.pattern


# -------------------------------------------------------------------------------- the attention function


def bias(queries: int, keys: int) -> Tensor:
    return torch.randn(1, H, queries, keys, generator=torch.Generator().manual_seed(3))


SOME = torch.rand(B, 1, 5, 9, generator=torch.Generator().manual_seed(4)) > 0.3
SOME[..., 0] = True
CALLS = {
    "causal": (9, 9, None, {}),
    "causal, more keys": (5, 9, None, {}),
    "one query": (1, 9, None, {}),
    "not causal": (5, 9, None, dict(is_causal=False)),
    "scaling": (9, 9, None, dict(scaling=0.7)),
    "mask": (5, 9, SOME, {}),
    "float mask": (5, 9, torch.where(SOME, 0.3, torch.finfo(torch.float32).min), {}),
    "bias": (9, 9, None, dict(position_bias=bias(9, 9))),
    "bias, not causal": (5, 9, None, dict(position_bias=bias(5, 9), is_causal=False)),
    "bias and mask": (5, 9, SOME, dict(position_bias=bias(5, 9))),
    "what others read": (9, 9, None, dict(position_ids=torch.arange(9), deterministic=True, cache=None)),
}


def with_gradients(
    function, layer: nn.Module, given: list[Tensor], *arguments, **options
) -> dict[str, Tensor]:
    out = function(layer, *given, *arguments, **options)[0]
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)
    gradients = torch.autograd.grad(out, given, cotangent)
    return {"out": out, **dict(zip(("query", "key", "value"), gradients, strict=True))}


def doubled(value):
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CALLS)
def test_transformers_attention_agrees_with_sdpa(name, dtype):
    queries, keys, mask, options = CALLS[name]

    def cast(value):
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if is_float else value

    mask, options = cast(mask), {key: cast(value) for key, value in options.items()}
    given = tensors(queries, keys, dtype)
    exact = [each.detach().double().requires_grad_() for each in given]
    wide = {key: doubled(value) for key, value in options.items()}
    ours = with_gradients(attention, Layer(True), given, mask, **options)
    stock = with_gradients(sdpa_attention_forward, Layer(True), given, mask, **options)
    reference = with_gradients(sdpa_attention_forward, Layer(True), exact, doubled(mask), **wide)
    assert ours["out"].shape == (B, queries, H, D) and ours["out"].is_contiguous()
    for what, result in ours.items():
        check(f"{name} {what}", result, stock[what], reference[what])


def exact_eager(function, layer, given, mask, **options):
    """transformers' eager attention in float64, softmax too, which it casts to float32 else."""
    with pytest.MonkeyPatch.context() as patch:
        softmax = nn.functional.softmax
        patch.setattr(nn.functional, "softmax", lambda scores, dim, dtype=None: softmax(scores, dim))
        return function(layer, *given, mask, **options)


@pytest.mark.parametrize("what", ["softcap", "sinks", "window"])
def test_transformers_attention_agrees_with_eager(what):
    """Outputs and weights of what "sdpa" has not, or not as weights."""
    sinks = torch.randn(H, generator=torch.Generator().manual_seed(6)) if what == "sinks" else None
    function = eager_sinks if what == "sinks" else eager
    options = dict(scaling=0.5, softcap=0.8) if what == "softcap" else dict(scaling=0.5)
    arguments = dict(batch_size=B, q_length=9, kv_length=9)
    if what == "window":
        window = masking_utils.sliding_window_causal_mask_function(3)
        arguments |= dict(mask_function=window, local_size=3)
    given = tensors(9, 9)
    exact = [each.detach().double() for each in given]
    bool_mask = masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False)
    added = torch.where(bool_mask, 0.0, torch.finfo(torch.float32).min)
    stock = function(Layer(True, sinks), *given, added, **options)
    reference = exact_eager(function, Layer(True, doubled(sinks)), exact, added.double(), **options)
    extra = {} if sinks is None else dict(s_aux=sinks)
    ours = attention(Layer(True), *given, mask(**arguments), output_attentions=True, **extra, **options)
    for name, mine, torchs, truth in zip(("out", "weights"), ours, stock, reference, strict=True):
        check(f"{what} {name}", mine, torchs, truth)
    assert attention(Layer(True), *given, mask(**arguments), **extra, **options)[1] is None


def test_transformers_gradients_of_sinks_and_bias():
    sinks = torch.randn(H, requires_grad=True)
    position_bias = bias(9, 9).requires_grad_()
    out, _ = attention(Layer(True), *tensors(9, 9), None, s_aux=sinks, position_bias=position_bias)
    out.square().sum().backward()
    assert sinks.grad.count_nonzero() == H and position_bias.grad.tril().count_nonzero() == H * 45
    assert not position_bias.grad.triu(1).any()


def test_transformers_is_causal_of_the_call_goes_before_the_layer():
    given = tensors(9, 9)
    for layer in (Layer(), Layer(True), Layer(False)):
        causal, _ = attention(layer, *given, None, is_causal=True)
        whole, _ = attention(layer, *given, None, is_causal=False)
        own, _ = attention(layer, *given, None)
        assert torch.equal(own, causal if getattr(layer, "is_causal", True) else whole)
        assert not torch.equal(causal, whole)


@pytest.mark.parametrize("queries, keys, first", [(9, 9, 0), (1, 9, 8), (2, 2, 0)])
def test_transformers_window_without_a_mask(queries, keys, first):
    function = masking_utils.sliding_window_causal_mask_function(3)
    wanted = masking_utils.sdpa_mask(
        B, queries, keys, first, mask_function=function, allow_is_causal_skip=False
    )
    _, weights = attention(
        Layer(True), *tensors(queries, keys), None, sliding_window=3, output_attentions=True
    )
    assert torch.equal(weights > 0, wanted.expand(B, H, queries, keys))


def test_transformers_keys_of_groups_are_not_repeated():
    calls = []
    with dispatch.recording(lambda op, call, backend: calls.append(call)):
        attention(Layer(), *tensors(9, 9), left_padded()[0])
    assert [(call.heads, call.kv_heads, call.padding, call.mask) for call in calls[:1]] == [
        (H, HK, True, False)
    ]


def test_transformers_query_that_sees_no_key_gives_zeros():
    out, _ = attention(Layer(), *tensors(9, 9), left_padded()[0])
    assert not out[0, :3].any() and out[0, 3:].all() and out[1].all()


@pytest.mark.parametrize("name", ["indices", "block_indices", "sinks", "cache"])
def test_transformers_attention_refuses_what_it_would_pass_over(name):
    with pytest.raises(NotImplementedError, match=f'Layer passes {name} .*attn_implementation="sdpa"'):
        attention(Layer(), *tensors(9, 9), None, **{name: torch.zeros(1)})
