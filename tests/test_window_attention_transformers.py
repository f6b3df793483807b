"""Hugging Face's Swin, randomly initialised: its attention is swapped, proven, and left alone where asked."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from torch import Tensor, nn

import pyarch
from tests.compare import check
from tests.model_cases import KERNELS, need
from tests.swap_cases import operators_of
from tests.whole_models import check_run, layout, run

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip(
    "transformers", reason="transformers not installed, needs pip install -e .[transformers]"
)

pytestmark = pytest.mark.thirdparty

OPERATOR = "attention"
CLASS = "transformers.models.swin.modeling_swin.SwinAttention"
LAYERS = [f"model.encoder.layers.{stage}.blocks.{layer}.attention" for stage in (0, 1) for layer in (0, 1)]


class Swin(nn.Module):
    """SwinModel on 9 x 9 and 5 x 5 tokens in windows of 4 x 4."""

    def __init__(self, **changed):
        super().__init__()
        sizes = dict(
            image_size=36, patch_size=4, embed_dim=64, depths=[2, 2], num_heads=[2, 4], window_size=4
        )
        self.model = transformers.SwinModel(transformers.SwinConfig(**sizes, drop_path_rate=0.0, **changed))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        found = self.model(images)
        return {"tokens": found.last_hidden_state, "pooled": found.pooler_output}


def swin(*filled: str, **changed) -> Swin:
    """With random weights in evaluation mode, and with numbers of size 1 in what starts at 0.

    Args:
        filled: which parameters, by the ends of their names; the tables always.
    """
    torch.manual_seed(0)
    model = Swin(**changed).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("relative_position_bias_table", *filled)):
            nn.init.normal_(parameter)
    return model


def images() -> Tensor:
    return torch.randn(2, 3, 36, 36)


def test_transformers_swin_every_attention_is_swapped():
    model = swin()
    report = pyarch.swap(model)
    assert [record.name for record in report.swapped] == LAYERS
    assert {(record.was, record.now) for record in report.swapped} == {(CLASS, "pyarch.nn.SwinAttention")}
    with report.observe(), torch.no_grad():
        model(images())
    assert not report.never_called


@pytest.mark.parametrize("backend", KERNELS)
def test_transformers_swin_outputs_and_gradients(backend):
    need(backend)
    stock, batch = swin(), images()
    ours = copy.deepcopy(stock)
    pyarch.swap(ours, backend=backend)
    check_run("swin", ours, stock, (batch,))
    _, gradients = run(ours, (batch,))
    tables = [name for name in gradients if name.endswith("relative_position_bias_table")]
    assert len(tables) == 4 and all(gradients[name].count_nonzero() for name in tables)
    forwards = [chosen for chosen in operators_of(ours, batch) if chosen[0] == "attention_forward"]
    assert forwards == [("attention_forward", backend)] * 4


def test_transformers_swin_check_sees_a_mask_that_is_ignored():
    stock, batch = swin(), images()
    wrong = copy.deepcopy(stock)
    for name in LAYERS[1::2]:
        attention = wrong.get_submodule(name)
        attention.register_forward_pre_hook(lambda _, args: (args[0], None))
    with pytest.raises(AssertionError, match="swin outputs: error"):
        check_run("swin", wrong, stock, (batch,))


@pytest.mark.parametrize("backend", ("cpu",))
@pytest.mark.parametrize("filled", [(), ("bias",)], ids=["tables", "biases"])
def test_transformers_swin_verifies(filled, backend):
    """Biases of q, k and v are common to all tokens: an error of a whole row would be multiplied."""
    need(backend)
    proof = pyarch.verify(swin(*filled), images(), timing=False)
    proof.assert_ok()
    assert {(layer.forward, layer.backward) for layer in proof.layers} == {(backend, backend)}
    assert len(proof.layers) == 4


def test_transformers_swin_explains_what_runs():
    choices = pyarch.explain(swin(), images()).choices
    assert [choice.layer for choice in choices] == [name for name in LAYERS for _ in ("forward", "backward")]


def test_transformers_swin_restore_is_exact():
    model, batch = swin(), images()
    before, layout_before = run(model, (batch,)), layout(model)
    report = pyarch.swap(model)
    assert layout(model) != layout_before
    report.restore()
    assert layout(model) == layout_before
    for mine, yours in zip(run(model, (batch,)), before, strict=True):
        assert list(mine) == list(yours)
        assert all(torch.equal(mine[name], yours[name]) for name in mine)


def test_transformers_swin_that_computes_weights_is_left_alone():
    model = swin(attn_implementation="eager")
    with pytest.raises(ValueError, match=r"4 x .*SwinAttention: attn_implementation is 'eager', not 'sdpa'"):
        pyarch.swap(model)
    report = pyarch.swap(model, min_swaps=0)
    codes = {record.code for record in report.skipped if record.was == CLASS}
    hints = {record.hint for record in report.skipped if record.was == CLASS}
    assert codes == {"attn-implementation"}
    assert hints == {"model.set_attn_implementation('sdpa') before the swap"}


def test_transformers_swin_asked_for_weights_after_the_swap_gives_its_own():
    stock, batch = swin(), images()
    ours = copy.deepcopy(stock)
    pyarch.swap(ours)
    for model in (ours, stock):
        model.model.set_attn_implementation("eager")
    mine, theirs = (each.model(batch, output_attentions=True).attentions for each in (ours, stock))
    assert len(mine) == len(theirs) > 0
    assert all(torch.equal(*pair) for pair in zip(mine, theirs, strict=True))


def test_transformers_swin_drops_weights_in_training_alone():
    model, batch = swin(attention_probs_dropout_prob=0.5), images()
    wanted = model(batch)["tokens"]
    pyarch.swap(model)
    torch.testing.assert_close(model(batch)["tokens"], wanted)
    model.train()
    assert not torch.equal(model(batch)["tokens"], model(batch)["tokens"])


@pytest.mark.parametrize("heads", [True, False], ids=["heads", "mean"])
def test_transformers_swin_maps_are_its_own_weights(heads):
    """As transformers' eager attention gives them, which adds -100 for a token of another part."""
    stock, batch = swin("bias"), images()
    ours = copy.deepcopy(stock)
    pyarch.swap(ours)
    maps = pyarch.attention_maps(ours, batch, heads=heads)
    stock.model.set_attn_implementation("eager")
    theirs, exact = weights_of(stock, batch), weights_of(stock.double(), batch.double())
    assert list(maps) == LAYERS
    for name in LAYERS:
        check(name, maps[name], *(each[name] if heads else each[name].mean(1) for each in (theirs, exact)))


def weights_of(model: Swin, batch: Tensor) -> dict[str, Tensor]:
    """The weights that the attention of each layer returns beside its output."""
    found, model = {}, copy.deepcopy(model)
    for name in LAYERS:
        module = model.get_submodule(name)
        module.register_forward_hook(lambda _, args, output, name=name: found.update({name: output[1]}))
    with torch.no_grad():
        model(batch)
    return found
