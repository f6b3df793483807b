"""The recurrent models of pyarch.models beyond what every model must do: memory, padding, CTC."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import pyarch
from pyarch import models
from pyarch.models import crnn, ctc, digits, language, speech, tagger
from pyarch.models.sentences import beyond, ragged
from tests.model_cases import KERNELS, RECURRENT, need, tiny, trained, unseen

OPERATOR = "recurrent"
LANGUAGE = ("rnn_language", "gru_language", "lstm_language")
PACKED = ("bilstm_classifier", "bilstm_tagger", "seq2seq")


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# -------------------------------------------------------------------------------- published sizes


@pytest.mark.parametrize(
    "name, classes, millions",
    [("lstm_language", None, 19.8), ("crnn", 37, 8.3)],
)
def test_recurrent_real_size_has_the_published_parameters(name, classes, millions):
    config = models.config(name, "real")
    with torch.device("meta"):
        model = models.load(name).build(replace(config, classes=classes) if classes else config)
    assert round(parameters(model) / 1e6, 1) == millions


def test_recurrent_cells_have_one_three_four_parts_of_the_parameters():
    with torch.device("meta"):
        sizes = {name: parameters(models.build(name, "real").recurrent) for name in LANGUAGE}
    assert sizes["gru_language"] * 4 == sizes["lstm_language"] * 3 == sizes["rnn_language"] * 12


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_every_parameter_gets_a_gradient(name):
    """Every direction of every layer reaches the loss."""
    module, model, (inputs, target) = models.load(name), tiny(name), unseen(name)
    module.loss(model(*inputs), target).backward()
    assert [key for key, each in model.named_parameters() if not each.grad.count_nonzero()] == []


# -------------------------------------------------------------------------------- language models


@pytest.mark.parametrize("name", LANGUAGE)
def test_language_model_remembers_the_word_before(name):
    """Who sees one word alone cannot do better than to guess the stride."""
    (words,), target = unseen(name)
    scores, _ = trained(name, steps=80)(words)
    loss = models.load(name).loss((scores[:, 1:], None), target[:, 1:])
    assert loss < 0.25 * math.log(models.config(name, "tiny").strides)


@pytest.mark.parametrize("name", LANGUAGE)
def test_language_model_goes_on_from_its_state(name):
    model = tiny(name)
    (words,), _ = unseen(name)
    whole, last = model(words)
    first, state = model(words[:, :5])
    second, state = model(words[:, 5:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(state, last)
    assert not torch.allclose(model(words[:, 5:])[0], second)


@pytest.mark.parametrize("name", LANGUAGE)
def test_language_model_tied_shares_its_embedding(name):
    config = replace(models.config(name, "tiny"), tied=True)
    torch.manual_seed(0)
    model = language.build(config)
    assert model.predict.weight is model.embedding.weight
    assert parameters(tiny(name)) - parameters(model) == config.vocabulary * config.width
    (words,), target = language.batch(config, seed=0)
    language.loss(model(words), target).backward()
    untied = tiny(name)
    untied.load_state_dict(model.state_dict())
    language.loss(untied(words), target).backward()
    both = untied.embedding.weight.grad + untied.predict.weight.grad
    torch.testing.assert_close(model.embedding.weight.grad, both)


@pytest.mark.parametrize("name", LANGUAGE)
def test_language_model_drops_only_in_training(name):
    torch.manual_seed(0)
    model = language.build(replace(models.config(name, "tiny"), dropout=0.5))
    (words,), _ = unseen(name)
    assert not torch.equal(model(words)[0], model(words)[0])
    model.eval()
    assert torch.equal(model(words)[0], model(words)[0])


# -------------------------------------------------------------------------------- padding


def test_sentences_are_ragged_and_end_where_their_length_says():
    _, lengths = ragged(64, 9, 5, torch.Generator().manual_seed(0))
    assert set(lengths.tolist()) == {4, 5, 6, 7, 8, 9}
    assert beyond(torch.tensor([3, 1]), 3).tolist() == [[False, False, False], [False, True, True]]


@pytest.mark.parametrize("name", PACKED)
def test_packed_models_never_read_the_padding(name):
    model = tiny(name)
    (words, lengths, *more), _ = unseen(name)
    padding = beyond(lengths, words.shape[1])
    assert padding.any()
    other = torch.where(padding, words.flip(0), words)
    assert not torch.equal(other, words)
    mine, yours = model(words, lengths, *more), model(other, lengths, *more)
    if name == "bilstm_tagger":
        mine, yours = mine[~padding], yours[~padding]
    assert torch.equal(mine, yours)
    # Whereas the words are read.
    assert not torch.equal(model(words.flip(1), lengths, *more), model(words, lengths, *more))


@pytest.mark.parametrize("name", PACKED)
def test_packed_models_give_a_sentence_alone_what_they_give_it_in_a_batch(name):
    model = tiny(name)
    (words, lengths, *more), _ = unseen(name)
    row, length = lengths.argmin().item(), lengths.min().item()
    assert length < words.shape[1]
    together = model(words, lengths, *more)[row]
    (alone,) = model(words[row : row + 1, :length], lengths[[row]], *(each[[row]] for each in more))
    if name == "bilstm_tagger":
        together = together[:length]
    torch.testing.assert_close(alone, together)


def test_speech_model_gives_an_utterance_alone_what_it_gives_it_in_a_batch():
    model, ((frames, lengths), _) = tiny("cnn_bilstm"), unseen("cnn_bilstm")
    row = lengths.argmin().item()
    together, shrunk = model(frames, lengths)
    alone, (length,) = model(frames[[row]], lengths[[row]])
    assert length == shrunk[row] < len(together)
    torch.testing.assert_close(alone[:length, 0], together[:length, row])


def test_tagger_reads_both_ways():
    model, T = tiny("bilstm_tagger"), models.config("bilstm_tagger", "tiny").words
    words, lengths = torch.zeros(1, T, dtype=torch.int64), torch.tensor([T])
    before = model(words, lengths)
    for place, last in ((0, T - 1), (T - 1, 0)):
        changed = words.index_fill(1, torch.tensor([place]), 1)
        assert not torch.equal(model(changed, lengths)[0, last], before[0, last])


def test_tagger_targets_name_the_neighbours_and_end_with_the_sentence():
    config = models.config("bilstm_tagger", "tiny")
    (words, lengths), target = tagger.batch(config, seed=0)
    assert config.words in lengths
    for row, length in enumerate(lengths.tolist()):
        kinds = [0, *(words[row, :length] % config.kinds).tolist(), 0]
        tags = [config.kinds * kinds[t] + kinds[t + 2] for t in range(length)]
        assert target[row].tolist() == tags + [tagger.IGNORED] * (config.words - length)


# -------------------------------------------------------------------------------- CTC


def test_ctc_reading_drops_repetitions_before_blanks():
    classes = torch.tensor([[1, 0], [1, 2], [0, 2], [1, 0], [2, 2], [2, 1]])
    scores = nn.functional.one_hot(classes, 3).float()
    assert ctc.read(scores, torch.tensor([6, 5])) == [[1, 1, 2], [2, 2]]


def test_ctc_loss_counts_every_alignment():
    """Two frames, one label: blank-label, label-blank and label-label read as it."""
    scores = torch.randn(2, 1, 3, dtype=torch.float64)
    blank, label = scores.log_softmax(2)[:, 0, 0].exp(), scores.log_softmax(2)[:, 0, 2].exp()
    likelihood = blank[0] * label[1] + label[0] * blank[1] + label[0] * label[1]
    loss = ctc.ctc_loss(scores, torch.tensor([2]), torch.tensor([[2, 0]]))
    torch.testing.assert_close(loss, -likelihood.log())


def test_digits_are_legible():
    """Every glyph differs from every other in three bits at least, and the seven looks like one."""
    ink = digits.glyphs()
    assert ink.shape == (10, 28, 15)
    for one, other in itertools.combinations(ink, 2):
        assert (one - other).abs().sum() >= 3 * 12
    seven = ["#####", "....#", "...#.", "..#..", ".#...", ".#...", ".#..."]
    rows = ink[7, ::4, ::3].tolist()
    assert ["".join("#" if bit else "." for bit in row) for row in rows] == seven


def test_digits_stand_in_their_places():
    images, target = digits.strips(8, 32, 100, 5, 10, seed=0)
    assert images.shape == (8, 1, 32, 100)
    edges = set()
    for image, labels in zip(images[:, 0], target.tolist(), strict=True):
        for place, label in enumerate(labels):
            ink = image[:, 20 * place : 20 * place + 20] > 0.8
            assert (ink.sum() > 60) == (label > 0)
            if label:
                edges.add((ink.sum(0) > 3).int().argmax().item())
    assert len(edges) > 3, "digits wander within their place"


@pytest.mark.parametrize("name, steps, rate", [("crnn", 240, 3e-3), ("cnn_bilstm", 100, 1e-2)])
def test_ctc_models_read_what_they_never_saw(name, steps, rate):
    model, (inputs, target) = trained(name, steps, rate), unseen(name)
    output = model(*inputs)
    scores, lengths = output if name == "cnn_bilstm" else (output, torch.full((len(target),), len(output)))
    wanted = [[label for label in labels if label] for labels in target.tolist()]
    right = [one == other for one, other in zip(ctc.read(scores, lengths), wanted, strict=True)]
    assert sum(right) >= 0.8 * len(right)


def test_crnn_columns_leave_room_for_the_longest_reading():
    """Between two equal digits a column must be blank."""
    for size in ("real", "tiny"):
        config = models.config("crnn", size)
        assert config.columns // 4 - 1 >= 2 * config.places - 1
        assert config.columns // config.places >= digits.glyphs().shape[2]
        (images,) = crnn.inputs(config, seed=0)
        assert images.shape == (config.batch, 1, 32, config.columns)


def test_speech_lengths_shrink_with_the_frames():
    config = models.config("cnn_bilstm", "tiny")
    (frames, lengths), target = speech.batch(config, seed=0)
    scores, shrunk = tiny("cnn_bilstm")(frames, lengths)
    assert len(scores) == frames.shape[1] // 4
    assert shrunk.tolist() == [math.ceil(length / 4) for length in lengths.tolist()]
    spoken = (target > 0).sum(1)
    assert (spoken * speech.SHORTEST <= lengths).all() and (lengths <= spoken * speech.LONGEST).all()
    assert (target[:, 1:] != target[:, :-1])[target[:, 1:] > 0].all()
    for row, length in zip(frames, lengths.tolist(), strict=True):
        assert row[:length].count_nonzero() == length * config.features and not row[length:].any()


# -------------------------------------------------------------------------------- swapped


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_swapped_in_evaluation_mode_agrees(name, backend):
    need(backend)
    model, (inputs, _) = tiny(name).eval(), unseen(name)
    with torch.no_grad():
        stock = model(*inputs)
        pyarch.swap(model, backend=backend)
        torch.testing.assert_close(model(*inputs), stock)
