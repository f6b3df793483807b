"""BERT beyond what every model must do: its published size, its texts, what it reads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pyarch.models import bert
from tests.model_cases import tiny, trained, unseen

OPERATOR = "attention"


def test_bert_has_the_published_parameters():
    """Of the base model with the head of its masked language model."""
    with torch.device("meta"):
        model = bert.build(replace(bert.REAL, vocabulary=30_522, layers=12))
    assert sum(parameter.numel() for parameter in model.parameters()) == 109_514_298


def test_bert_texts_are_two_segments_that_repeat_one_word_each():
    (words, segments, lengths), target = unseen("bert")
    guessed = target != bert.IGNORED
    text = torch.where(guessed, target, words)
    for row in range(len(words)):
        length = lengths[row]
        read, of = text[row, :length].tolist(), segments[row, :length].tolist()
        first = [word for word, segment in zip(read, of, strict=True) if segment == 0]
        second = [word for word, segment in zip(read, of, strict=True) if segment == 1]
        assert read == first + second
        assert (first[0], first[-1], second[-1]) == (bert.FIRST, bert.BORDER, bert.BORDER)
        for subject in (set(first[1:-1]), set(second[:-1])):
            assert len(subject) == 1
            assert min(subject) >= bert.WORDS
        assert not guessed[row, length:].any()


def test_bert_hides_the_published_shares():
    config = replace(bert.TINY, batch=4000)
    (words, _, lengths), target = bert.batch(config, seed=0)
    guessed = target != bert.IGNORED
    inside = ~bert.beyond(lengths, config.words)
    # FIRST and two borders are never guessed.
    assert guessed.sum() / (inside.sum() - 3 * config.batch) == pytest.approx(0.15, abs=0.01)
    hidden = (words == bert.MASK) & inside
    assert torch.equal(hidden & guessed, hidden)
    assert hidden.sum() / guessed.sum() == pytest.approx(0.8, abs=0.02)
    # One in eight replacements is the word itself.
    kept = (words == target).sum() / guessed.sum()
    assert kept == pytest.approx(0.1 + 0.1 / 8, abs=0.02)


def test_bert_reads_no_padding():
    model, ((words, segments, lengths), _) = tiny("bert"), unseen("bert")
    padding = bert.beyond(lengths, words.shape[1])
    other = torch.where(padding, (words + 1) % bert.TINY.vocabulary, words)
    assert not torch.equal(other, words)
    before, after = model(words, segments, lengths), model(other, segments, lengths)
    torch.testing.assert_close(after[~padding], before[~padding])


@pytest.mark.parametrize("part", ("segments", "positions"))
def test_bert_reads_segments_and_places(part):
    model, (inputs, _) = tiny("bert"), unseen("bert")
    before = model(*inputs)
    with torch.no_grad():
        getattr(model.embedding, part).weight.zero_()
    assert not torch.allclose(model(*inputs), before, atol=1e-2)


def test_bert_guesses_hidden_words():
    model, (inputs, target) = trained("bert", steps=150, rate=5e-3), unseen("bert")
    guessed = target != bert.IGNORED
    right = model(*inputs).argmax(2)[guessed] == target[guessed]
    assert right.float().mean() > 0.8
