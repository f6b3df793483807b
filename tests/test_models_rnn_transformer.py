"""The R-Transformer beyond what every model must do: its windows, its order, its two reaches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import pyarch
from pyarch.models import rnn_transformer
from tests.model_cases import KERNELS, need, tiny, unseen

OPERATOR = "attention"
TINY = rnn_transformer.TINY


def reached(model: nn.Module, place: int) -> list[int]:
    """The words that the scores at a place depend on."""
    embedded = torch.randn(1, TINY.words, TINY.width, requires_grad=True)
    model.embedding.forward = lambda words: embedded
    model(torch.zeros(1, TINY.words, dtype=torch.long))[0, place].square().sum().backward()
    return embedded.grad[0].abs().sum(1).nonzero().flatten().tolist()


def local_gru(window: int) -> tuple[rnn_transformer.LocalGRU, Tensor]:
    torch.manual_seed(0)
    return rnn_transformer.LocalGRU(5, window).double(), torch.randn(2, 7, 5, dtype=torch.float64)


@pytest.mark.parametrize("window", (1, 3, 9))
def test_local_gru_runs_over_each_window_from_zeros(window):
    local, x = local_gru(window)
    states = local(x)
    padded = torch.cat([torch.zeros(2, window - 1, 5, dtype=x.dtype), x], 1)
    for t in range(x.shape[1]):
        _, state = local.gru(padded[:, t : t + window])
        torch.testing.assert_close(states[:, t], state[0])


def test_local_gru_forgets_what_left_the_window():
    local, x = local_gru(window=3)
    other = x.clone()
    other[:, 2] += 1.0
    changed = (local(other) != local(x)).any(2).any(0)
    assert changed.nonzero().flatten().tolist() == [2, 3, 4]


def test_rnn_transformer_attention_reaches_beyond_the_windows():
    last = TINY.words - 1
    assert reached(tiny("rnn_transformer"), last) == list(range(TINY.words))
    local = tiny("rnn_transformer")
    for layer in local.layers:
        nn.init.zeros_(layer.transformer.self_attn.out_proj.weight)
    reach = TINY.layers * (TINY.window - 1)
    assert reached(local, last) == list(range(last - reach, TINY.words))


def test_rnn_transformer_recurrence_alone_tells_the_order():
    """To the last word; through a second layer it would also see whom the causal mask let see whom."""
    torch.manual_seed(0)
    model = rnn_transformer.build(replace(TINY, layers=1))
    (words,), _ = unseen("rnn_transformer")
    mirrored = torch.cat([words[:, :-1].flip(1), words[:, -1:]], 1)
    assert not torch.allclose(model(mirrored)[:, -1], model(words)[:, -1], atol=1e-3)
    model.layers[0].local.forward = torch.zeros_like
    torch.testing.assert_close(model(mirrored)[:, -1], model(words)[:, -1])


@pytest.mark.parametrize("backend", ("stock", *KERNELS))
def test_rnn_transformer_sees_no_later_word(backend):
    need(backend)
    model, ((words,), _) = tiny("rnn_transformer"), unseen("rnn_transformer")
    if backend != "stock":
        pyarch.swap(model, backend=backend)
    other = words.clone()
    other[:, 7] = (other[:, 7] + 1) % TINY.vocabulary
    before, after = model(words), model(other)
    torch.testing.assert_close(after[:, :7], before[:, :7])
    assert not torch.allclose(after[:, 7:], before[:, 7:], atol=1e-3)


def test_rnn_transformer_tags_name_the_first_word_and_the_one_before():
    (words,), target = rnn_transformer.batch(TINY, seed=0)
    for row, tags in zip(words.tolist(), target.tolist(), strict=True):
        kinds = [word % TINY.kinds for word in row]
        assert tags == [TINY.kinds * kinds[0] + before for before in [0, *kinds[:-1]]]


def test_rnn_transformer_swap_reaches_recurrence_and_attention():
    report = pyarch.swap(tiny("rnn_transformer"))
    layer = ("local.gru", "transformer", "transformer.self_attn")
    assert [record.name for record in report.swapped] == [
        f"layers.{index}.{name}" for index in range(TINY.layers) for name in layer
    ]
    assert [record.now for record in report.swapped[:2]] == [
        "pyarch.nn.GRU",
        "pyarch.nn.TransformerEncoderLayer",
    ]
