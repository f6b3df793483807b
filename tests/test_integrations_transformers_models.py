"""Hugging Face models with random weights: "pyarch" beside "sdpa".

Where "sdpa" has no softcap or sinks it stands beside "eager".

Rows of padding are left out of every comparison: nobody reads them, and where such a query sees no key "sdpa"
and ours differ (ours gives zeros).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import pyarch
from pyarch import dispatch
from tests.compare import check
from tests.whole_models import check_run, run

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip(
    "transformers", reason="transformers not installed, needs pip install -e .[transformers]"
)
transformers_mask = pytest.importorskip("pyarch.integrations.transformers_mask")

pytestmark = pytest.mark.thirdparty

VOCABULARY, T, W = 64, 19, 6
BLOCKS = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2)
TEXT = dict(
    **BLOCKS,
    vocab_size=VOCABULARY,
    intermediate_size=48,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GROUPED = dict(**TEXT, num_key_value_heads=2, head_dim=8, sliding_window=W)
ALTERNATING = dict(layer_types=["sliding_attention", "full_attention"])
MODERN = dict(
    **TEXT,
    **ALTERNATING,
    local_attention=2 * W,
    cls_token_id=1,
    sep_token_id=2,
    deterministic_flash_attn=True,
)
SPEECH = dict(
    d_model=32,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    init_std=0.2,
    num_mel_bins=8,
    max_source_positions=13,
    max_target_positions=48,
    vocab_size=VOCABULARY,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=1,
    begin_suppress_tokens=None,
)
BIASED = dict(
    vocab_size=VOCABULARY,
    d_model=32,
    d_kv=8,
    d_ff=48,
    num_layers=1,
    num_heads=4,
    relative_attention_num_buckets=8,
    decoder_start_token_id=1,
)
EXPERTS = dict(
    num_local_experts=2,
    num_experts_per_tok=1,
    experts_implementation="eager",
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
)

# What a layer's queries see: is_causal, left, right.
CAUSAL, ALL = (True, None, None), (False, None, None)
LAST, NEAR = (True, W - 1, None), (False, W, W)


@dataclass(frozen=True)
class Case:
    """A model, what it is compared with, and the patterns of its layers in the order in which they run."""

    name: str
    config: str
    model: str
    settings: dict
    patterns: tuple
    stock: str = "sdpa"
    output: str = "logits"
    is_padded: bool = True
    is_biased: bool = False

    def __str__(self) -> str:
        return self.name

    def build(self, implementation: str) -> nn.Module:
        """In evaluation mode; the same weights for every implementation."""
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**self.settings, attn_implementation=implementation)
        return getattr(transformers, self.model)(config).eval()


CASES = [
    Case("mistral", "MistralConfig", "MistralForCausalLM", GROUPED, (LAST, LAST)),
    Case(
        "gemma2",
        "Gemma2Config",
        "Gemma2ForCausalLM",
        dict(**GROUPED, **ALTERNATING, attn_logit_softcapping=2.0, query_pre_attn_scalar=5),
        (LAST, CAUSAL),
        stock="eager",
    ),
    Case("gemma3", "Gemma3TextConfig", "Gemma3ForCausalLM", dict(**GROUPED, **ALTERNATING), (LAST, CAUSAL)),
    Case(
        "qwen2",
        "Qwen2Config",
        "Qwen2ForCausalLM",
        dict(**GROUPED, use_sliding_window=True, max_window_layers=1),
        (CAUSAL, LAST),
    ),
    Case(
        "gpt-oss",
        "GptOssConfig",
        "GptOssForCausalLM",
        dict(**GROUPED, **ALTERNATING, **EXPERTS),
        (LAST, CAUSAL),
        stock="eager",
    ),
    Case(
        "modernbert", "ModernBertConfig", "ModernBertModel", MODERN, (NEAR, ALL), output="last_hidden_state"
    ),
    Case("bert", "BertConfig", "BertModel", TEXT, (ALL, ALL), output="last_hidden_state"),
    Case(
        "vit",
        "ViTConfig",
        "ViTModel",
        dict(**BLOCKS, intermediate_size=48, image_size=16, patch_size=4),
        (ALL, ALL),
        output="last_hidden_state",
        is_padded=False,
    ),
    Case("whisper", "WhisperConfig", "WhisperForConditionalGeneration", SPEECH, (ALL, CAUSAL, ALL)),
    Case("t5", "T5Config", "T5ForConditionalGeneration", BIASED, (ALL, CAUSAL, ALL), is_biased=True),
]
DECODERS = [case for case in CASES if case.name in ("mistral", "gemma2", "gemma3", "qwen2", "gpt-oss")]


class Run(nn.Module):
    """A model's results on the rows that are not padding, by name."""

    def __init__(self, case: Case, implementation: str):
        super().__init__()
        self.case = case
        self.model = case.build(implementation)

    def forward(self, given: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        if self.case.name == "whisper":
            ids = tokens()
            found = self.model(given, decoder_input_ids=ids, decoder_attention_mask=attention_mask)
        elif self.case.name == "t5":
            found = self.model(
                given, attention_mask, decoder_input_ids=given, decoder_attention_mask=attention_mask
            )
        elif self.case.name == "vit":
            found = self.model(given)
        else:
            found = self.model(given, attention_mask=attention_mask)
        result = found[self.case.output]
        return {self.case.output: result if attention_mask is None else result[attention_mask.bool()]}


def tokens() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (2, T), generator=generator)


def given(case: Case) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = {"vit": (2, 3, 16, 16), "whisper": (2, 8, 26)}.get(case.name)
    return torch.randn(shape, generator=generator) if shape else tokens()


def padding(side: str) -> Tensor | None:
    """transformers' attention_mask: 0 on five tokens of the first sequence."""
    if side == "none":
        return None
    mask = torch.ones(2, T, dtype=torch.int64)
    mask[0, slice(0, 5) if side == "left" else slice(T - 5, T)] = 0
    return mask


def inputs(case: Case, side: str) -> tuple[Tensor, ...]:
    mask = padding(side)
    return (given(case),) if mask is None else (given(case), mask)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """pyarch among transformers' implementations, for one test."""
    for registry in (transformers.AttentionInterface, transformers.AttentionMaskInterface):
        monkeypatch.setattr(registry, "_global_mapping", dict(registry._global_mapping))
    pyarch.integrations.transformers.register()


def recorded(run: Callable):
    """A result, and the calls of attention's forward that it took."""
    calls = []

    def record(op, call, backend):
        if op.name == "attention_forward":
            calls.append(call)

    with dispatch.recording(record):
        return run(), calls


@pytest.fixture(autouse=True)
def exact_softmax(monkeypatch):
    """float64 models have a float64 softmax: "eager" casts all scores to float32, which is no truth."""
    softmax = nn.functional.softmax

    def keeps_float64(scores: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        return softmax(scores, dim, dtype=None if scores.dtype == torch.float64 else dtype)

    monkeypatch.setattr(nn.functional, "softmax", keeps_float64)


each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_decoder = pytest.mark.parametrize("case", DECODERS, ids=str)
each_padding = pytest.mark.parametrize(
    "case, side",
    [
        pytest.param(case, side, id=f"{case}-{side}")
        for case in CASES
        for side in ("none", "left", "right")
        if case.is_padded or side == "none"
    ],
)


@each_padding
def test_transformers_outputs_and_gradients(case, side):
    check_run(f"{case} {side}", Run(case, "pyarch"), Run(case, case.stock), inputs(case, side))


@each_padding
def test_transformers_no_layer_gets_a_mask(case, side):
    ours = Run(case, "pyarch")
    with torch.no_grad():
        _, calls = recorded(lambda: ours(*inputs(case, side)))
    assert tuple((call.is_causal, call.left, call.right) for call in calls) == case.patterns
    assert not any(call.mask for call in calls)
    assert all(call.bias == case.is_biased for call in calls)
    assert all(call.padding == (side != "none") for call in calls if call.keys == T)
    assert {call.kv_heads for call in calls} == {case.settings.get("num_key_value_heads", 4)}


def test_transformers_check_sees_a_window_off_by_one(monkeypatch):
    """The check above is not so wide that a window could miss its last key."""
    case = CASES[0]
    monkeypatch.setattr(transformers_mask, "_reach", lambda function, size: (True, size - 2, None))
    with pytest.raises(AssertionError, match="mistral outputs: error"):
        check_run("mistral", Run(case, "pyarch"), Run(case, "sdpa"), inputs(case, "none"))


def test_transformers_check_sees_a_lost_mask(monkeypatch):
    """What happens where only the attention function is registered: left padding is read."""
    case = CASES[0]
    monkeypatch.setitem(
        transformers.AttentionMaskInterface._global_mapping, "pyarch", lambda **arguments: None
    )
    with pytest.raises(AssertionError, match="mistral outputs: error"):
        check_run("mistral", Run(case, "pyarch"), Run(case, "sdpa"), inputs(case, "left"))


@pytest.mark.parametrize("name", ["mistral", "bert"])
def test_transformers_bfloat16(name):
    (case,) = (case for case in CASES if case.name == name)
    ours, stock = Run(case, "pyarch").bfloat16(), Run(case, "sdpa").bfloat16()
    check_run(f"{name} bfloat16", ours, stock, inputs(case, "left"))


def test_transformers_implementations_change_in_place():
    case = CASES[0]
    model, given_ = Run(case, "sdpa"), inputs(case, "left")
    with torch.no_grad():
        stock, calls = recorded(lambda: model(*given_))
        assert not calls
        model.model.set_attn_implementation("pyarch")
        ours, calls = recorded(lambda: model(*given_))
        assert len(calls) == 2
        model.model.set_attn_implementation("sdpa")
        again, calls = recorded(lambda: model(*given_))
        assert not calls
    torch.testing.assert_close(ours["logits"], stock["logits"], rtol=1e-4, atol=1e-4)
    assert torch.equal(again["logits"], stock["logits"])


def test_transformers_attentions_where_a_model_returns_them():
    """The probabilities that "sdpa" has not are those of "eager"; queries on padding have none."""
    (case,) = (case for case in CASES if case.name == "bert")
    stock, ours = case.build("eager"), case.build("pyarch")
    arguments = dict(attention_mask=padding("right"), output_attentions=True)
    with torch.no_grad():
        wanted, found = (model(tokens(), **arguments).attentions for model in (stock, ours))
        reference = stock.double()(tokens(), **arguments).attentions
    assert len(found) == len(wanted) == 2
    for index, (mine, theirs, exact) in enumerate(zip(found, wanted, reference, strict=True)):
        rows = padding("right").bool()[:, None, :, None].expand_as(mine)
        check(f"attentions {index}", mine[rows], theirs[rows], exact[rows])


def test_transformers_dropout_in_training():
    case = CASES[0]
    model = Run(case, "pyarch").train()
    model.model.config.attention_dropout = 0.5
    for layer in model.model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    first, calls = recorded(lambda: model(tokens())["logits"])
    assert all(call.dropout and not call.mask for call in calls)
    assert not torch.equal(first, model(tokens())["logits"])
    assert not any(call.dropout for call in recorded(lambda: model.eval()(tokens()))[1])


# -------------------------------------------------------------------------------- with a cache


def generated(model: nn.Module, case: Case, side: str, **options) -> Tensor:
    found = model.generate(
        given(case),
        attention_mask=None if case.name == "whisper" else padding(side),
        do_sample=False,
        max_new_tokens=10,
        min_new_tokens=10,
        **options,
    )
    return found


@pytest.mark.parametrize("side", ["none", "left"])
@each_decoder
def test_transformers_generate_gives_the_same_tokens(case, side):
    stock = generated(case.build(case.stock), case, side)
    ours, calls = recorded(lambda: generated(case.build("pyarch"), case, side))
    assert torch.equal(ours, stock)
    assert len(calls) == 20 and not any(call.mask for call in calls)
    assert [call.queries for call in calls] == [T] * 2 + [1] * 18


def test_transformers_whisper_generates_the_same_tokens():
    (case,) = (case for case in CASES if case.name == "whisper")
    stock = generated(case.build("sdpa"), case, "none")
    ours, calls = recorded(lambda: generated(case.build("pyarch"), case, "none"))
    assert torch.equal(ours, stock)
    assert calls and not any(call.mask for call in calls)


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("name", ["mistral", "qwen2"])
def test_transformers_static_cache(name, side):
    """A cache longer than what it holds: the mask of "sdpa" where the length is in a tensor."""
    (case,) = (case for case in CASES if case.name == name)
    stock = generated(case.build("sdpa"), case, side, cache_implementation="static")
    ours, calls = recorded(lambda: generated(case.build("pyarch"), case, side, cache_implementation="static"))
    assert torch.equal(ours, stock) and calls
    if name == "qwen2":
        assert any(call.mask and call.queries == 1 and call.keys > T for call in calls)


@pytest.mark.parametrize("side", ["none", "left"])
@each_decoder
def test_transformers_prompt_in_chunks(case, side):
    """Fewer queries than keys: the last query is the last key's token."""
    ids, attention_mask = tokens(), padding(side)
    rows = slice(None) if attention_mask is None else attention_mask.bool()

    def logits(model: nn.Module) -> Tensor:
        cache, parts = transformers.DynamicCache(config=model.config), []
        for start, stop in ((0, 8), (8, 15), (15, T)):
            mask = None if attention_mask is None else attention_mask[:, :stop]
            found = model(ids[:, start:stop], attention_mask=mask, past_key_values=cache, use_cache=True)
            parts.append(found.logits)
        return torch.cat(parts, dim=1)[rows]

    with torch.no_grad():
        ours, calls = recorded(lambda: logits(case.build("pyarch")))
        stock = logits(case.build(case.stock))
        reference = Run(case, case.stock).double()(ids, attention_mask)["logits"]
    reference = reference.reshape(ours.shape)
    check(f"{case} in chunks", ours, stock, reference)
    assert not any(call.mask for call in calls)
    full = [call for call in calls if call.left is None]
    assert all(call.query_offset == call.keys - call.queries for call in full)


# -------------------------------------------------------------------------------- traced


def test_transformers_compiled_whole():
    case = CASES[0]
    stock, ours, given_ = Run(case, "sdpa"), Run(case, "pyarch"), inputs(case, "left")
    ours.model.compile(backend="aot_eager", fullgraph=True)
    check_run("mistral compiled", ours, stock, given_)


def test_transformers_compiled_layer_keeps_the_pattern():
    """The mask is made outside of what is compiled, and another mask is not taken for the first."""
    case = CASES[0]
    plain, model = Run(case, "pyarch"), Run(case, "pyarch")
    for each in (plain, model):
        each.model.config.use_cache = False
    model.model.model.layers[0].compile(backend="eager", fullgraph=True)
    other = padding("left").flip(0)
    for attention_mask in (padding("left"), other):
        with torch.no_grad():
            wanted = plain(tokens(), attention_mask)["logits"]
            found, calls = recorded(lambda mask=attention_mask: model(tokens(), mask)["logits"])
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        assert len(calls) == 2
        assert all(call.left == W - 1 and call.padding and not call.mask for call in calls)


def test_transformers_exported():
    case = CASES[0]
    model = Run(case, "pyarch").model
    arguments = dict(input_ids=tokens(), attention_mask=padding("left"), use_cache=False)
    with torch.no_grad():
        wanted = model(**arguments).logits
        program = torch.export.export(model, (), arguments, strict=False).module()
        found = program(**arguments).logits
        everybody = program(**{**arguments, "attention_mask": torch.ones_like(tokens())}).logits
        unpadded = model(tokens()).logits
    rows = padding("left").bool()
    torch.testing.assert_close(found[rows], wanted[rows], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(everybody, unpadded, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_transformers_gradient_checkpointing_keeps_the_pattern(reentrant):
    case = CASES[0]
    plain, checkpointed = Run(case, "pyarch").train(), Run(case, "pyarch").train()
    checkpointed.model.activation_checkpointing_enable({"use_reentrant": reentrant})
    (_, wanted), (ran, calls) = (
        run(plain, inputs(case, "left")),
        recorded(lambda: run(checkpointed, inputs(case, "left"))),
    )
    assert len(calls) == 4 and not any(call.mask for call in calls)
    for name, gradient in wanted.items():
        torch.testing.assert_close(ran[1][name], gradient)


# -------------------------------------------------------------------------------- maps


def named_inputs(case: Case) -> dict[str, Tensor]:
    given_ = given(case)
    if case.name == "whisper":
        return {"input_features": given_, "decoder_input_ids": tokens()}
    if case.name == "t5":
        return {"input_ids": given_, "decoder_input_ids": given_}
    return {"pixel_values" if case.name == "vit" else "input_ids": given_}


def weights_by_transformers(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """What "eager" gives for output_attentions=True, in the order in which the layers run."""

    def cast(each: Tensor) -> Tensor:
        return each.to(dtype) if each.is_floating_point() else each

    model = case.build("eager").to(dtype)
    arguments = {name: cast(each) for name, each in named_inputs(case).items()}
    with torch.no_grad():
        found = model(**arguments, output_attentions=True)
    if "attentions" in found:
        return list(found["attentions"])
    of_decoder = zip(found["decoder_attentions"], found["cross_attentions"], strict=True)
    return [*found["encoder_attentions"], *(each for layer in of_decoder for each in layer)]


@each_case
def test_transformers_maps_are_the_weights_that_eager_gives(case):
    model = case.build("pyarch")
    maps = pyarch.attention_maps(model, named_inputs(case))
    stock, exact = (weights_by_transformers(case, each) for each in (torch.float32, torch.float64))
    assert len(maps) == len(case.patterns) == len(stock)
    for (name, weights), *both in zip(maps.items(), stock, exact, strict=True):
        assert name in dict(model.named_modules()), name
        check(f"{case} {name}", weights, *both)
    mean = pyarch.attention_maps(model, named_inputs(case), heads=False, layers=list(maps)[0])
    (only,) = mean.values()
    torch.testing.assert_close(only, next(iter(maps.values())).mean(1))


def test_transformers_maps_beside_weights_of_the_models_own_and_dropout():
    """A model that returns its weights still does; what is dropped in training is not in a map."""
    case = CASES[6]
    model = case.build("pyarch")
    wanted = model(**named_inputs(case), output_attentions=True).attentions
    model.train()
    seen = []
    model.register_forward_hook(lambda module, args, output: seen.append(output.attentions))
    for heads in (True, False):
        arguments = {**named_inputs(case), "output_attentions": True}
        maps = pyarch.attention_maps(model, arguments, heads=heads)
        for found, mine, theirs in zip(maps.values(), seen[-1], wanted, strict=True):
            torch.testing.assert_close(mine, theirs)
            torch.testing.assert_close(found, theirs if heads else theirs.mean(1))


def test_transformers_maps_of_another_implementation_say_what_to_do():
    for implementation in ("sdpa", "eager"):
        with pytest.raises(
            ValueError, match=r"set_attn_implementation\(\"pyarch\"\), or its own output_attentions"
        ):
            pyarch.attention_maps(CASES[6].build(implementation), named_inputs(CASES[6]))


def test_transformers_model_swapped_with_sdpa_is_verified_and_explained(registered):
    """Who watches plain calls is not given those of transformers' layers, which say more than torch's."""
    config = transformers.BertConfig(**TEXT, attn_implementation="pyarch")
    model, tokens = transformers.BertModel(config).eval(), torch.randint(3, VOCABULARY, (2, T))
    pyarch.swap(model, sdpa=True, min_swaps=0)
    report = pyarch.verify(model, {"input_ids": tokens}, timing=False)
    assert all(each.kept for each in (*report.outputs, *report.gradients))
    assert pyarch.explain(model, {"input_ids": tokens}).never_called
