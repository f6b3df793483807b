"""The Transformer for translation: what it may see, greedy and beam search, smoothing, also when swapped."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import pyarch
from pyarch.models import translation
from tests.model_cases import KERNELS, need, tiny, trained, unseen

OPERATOR = "attention"
LIMIT = translation.TINY.words + 1


@pytest.fixture(scope="module")
def translator() -> translation.Transformer:
    torch.set_num_threads(1)
    return trained("translation", steps=400, rate=5e-3)


@pytest.fixture(scope="module")
def hesitant() -> translation.Transformer:
    """After few steps, so that a beam finds likelier sentences than greedy."""
    torch.set_num_threads(1)
    return trained("translation", steps=20)


def log_probability(model: nn.Module, source: Tensor, lengths: Tensor, words: Tensor) -> Tensor:
    """Of each sentence up to its first END, by teacher forcing."""
    previous = torch.cat([torch.full_like(words[:, :1], translation.BEGIN), words[:, :-1]], 1)
    gained = model(source, lengths, previous).log_softmax(2).gather(2, words.unsqueeze(2)).squeeze(2)
    return gained.masked_fill((previous == translation.END).cumsum(1) > 0, 0.0).sum(1)


def test_translation_target_is_the_sentence_in_the_other_language():
    (source, lengths, previous), target = unseen("translation")
    for row in range(len(source)):
        words = source[row, : lengths[row]].tolist()
        assert min(words) >= translation.WORDS
        neighbours = [word for i in range(0, len(words), 2) for word in reversed(words[i : i + 2])]
        if len(words) % 2:
            neighbours[-1] = words[-1]
        following = {word: word + 1 for word in range(2, 7)} | {7: 2}
        written = [*(following[word] for word in neighbours), translation.END]
        rest = [translation.IGNORED] * (LIMIT - len(written))
        assert target[row].tolist() == written + rest
        assert previous[row, : len(written)].tolist() == [translation.BEGIN, *written[:-1]]


@pytest.mark.parametrize("backend", ("stock", *KERNELS))
def test_translation_sees_no_later_word_and_no_padding(backend):
    need(backend)
    model, ((source, lengths, previous), _) = tiny("translation"), unseen("translation")
    if backend != "stock":
        pyarch.swap(model, backend=backend)
    before = model(source, lengths, previous)
    later = previous.clone()
    later[:, 3] = 2 + (later[:, 3] - 1) % 6
    after = model(source, lengths, later)
    torch.testing.assert_close(after[:, :3], before[:, :3])
    assert not torch.allclose(after[:, 3:], before[:, 3:], atol=1e-3)
    padding = translation.beyond(lengths, source.shape[1])
    other = torch.where(padding, 2 + (source - 1) % 6, source)
    assert not torch.equal(other, source)
    torch.testing.assert_close(model(other, lengths, previous), before)


def test_translation_shares_one_embedding():
    model = tiny("translation")
    shapes = [
        tuple(each.shape) for each in model.parameters() if each.shape[0] == translation.TINY.vocabulary
    ]
    assert shapes == [(8, 32)]


def test_translation_translates_unseen_sentences(translator):
    (source, lengths, _), target = unseen("translation")
    wanted = target.masked_fill(target == translation.IGNORED, translation.END)
    assert (translator.greedy(source, lengths, LIMIT).words == wanted).all(1).float().mean() > 0.8


def test_translation_log_probability_is_that_of_teacher_forcing(hesitant):
    (source, lengths, _), _ = unseen("translation")
    found = [hesitant.greedy(source, lengths, LIMIT)]
    found += [hesitant.beam_search(source, lengths, beam, LIMIT) for beam in (1, 2, 5)]
    for words, claimed in found:
        torch.testing.assert_close(claimed, log_probability(hesitant, source, lengths, words))


def test_translation_beam_of_one_is_greedy_and_wider_ones_are_likelier(hesitant):
    (source, lengths, _), _ = unseen("translation")
    greedy, one, wide = (
        hesitant.greedy(source, lengths, LIMIT),
        *(hesitant.beam_search(source, lengths, beam, LIMIT) for beam in (1, 6)),
    )
    assert torch.equal(one.words, greedy.words)
    torch.testing.assert_close(one.log_probability, greedy.log_probability)
    assert (wide.log_probability > greedy.log_probability + 1e-3).any()


def test_translation_full_beam_finds_the_likeliest_of_all(hesitant):
    (source, lengths, _), _ = unseen("translation")
    limit = 3
    every = torch.tensor(list(itertools.product(range(8), repeat=limit)))
    beam = hesitant.beam_search(source[:2], lengths[:2], 8 ** (limit - 1), limit)
    for row in range(2):
        alike = (source[row].expand(len(every), -1), lengths[row].expand(len(every)))
        best = log_probability(hesitant, *alike, every).max()
        torch.testing.assert_close(beam.log_probability[row], best)


@pytest.mark.parametrize("backend", KERNELS)
def test_translation_swapped_translates_alike(translator, backend):
    """Word by word the decoder runs on sequences of every length from 1 on."""
    need(backend)
    (source, lengths, _), _ = unseen("translation")
    stock = translator.beam_search(source, lengths, 3, LIMIT)
    with pyarch.swapped(translator, backend=backend) as report:
        ours = translator.beam_search(source, lengths, 3, LIMIT)
    assert {record.name for record in report.swapped} == {
        "transformer.encoder.layers.0",
        "transformer.encoder.layers.0.self_attn",
        "transformer.decoder.layers.0",
        "transformer.decoder.layers.0.self_attn",
        "transformer.decoder.layers.0.multihead_attn",
    }
    assert torch.equal(ours.words, stock.words)
    torch.testing.assert_close(ours.log_probability, stock.log_probability)


def test_translation_smoothing_spreads_a_share_of_the_target():
    (inputs, target), model = unseen("translation"), tiny("translation")
    scores = model(*inputs)
    told = target != translation.IGNORED
    gained = scores.log_softmax(2)[told]
    right = gained.gather(1, target[told].unsqueeze(1)).mean()
    expected = -(0.9 * right + 0.1 * gained.mean())
    torch.testing.assert_close(translation.loss(scores, target, smoothing=0.1), expected)
    torch.testing.assert_close(translation.loss(scores, target), -right)
