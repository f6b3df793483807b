"""The sequence-to-sequence model: sampling, greedy and beam search, clipping, and all of it when swapped."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import pyarch
from pyarch import models
from pyarch.models import seq2seq
from tests.model_cases import KERNELS, need, tiny, trained, unseen

OPERATOR = "recurrent"


@pytest.fixture(scope="module")
def translator() -> seq2seq.Seq2Seq:
    torch.set_num_threads(1)
    return trained("seq2seq", steps=200)


def log_probability(model: nn.Module, source: Tensor, lengths: Tensor, words: Tensor) -> Tensor:
    """Of each sentence up to its first END, by teacher forcing."""
    previous = torch.cat([torch.full_like(words[:, :1], seq2seq.BEGIN), words[:, :-1]], 1)
    gained = model(source, lengths, previous).log_softmax(2).gather(2, words.unsqueeze(2)).squeeze(2)
    return gained.masked_fill((previous == seq2seq.END).cumsum(1) > 0, 0.0).sum(1)


def test_seq2seq_target_is_the_sentence_backwards():
    (source, lengths, previous), target = unseen("seq2seq")
    for row in range(len(source)):
        words = source[row, : lengths[row]].tolist()
        assert min(words) >= seq2seq.WORDS
        written = [*words[::-1], seq2seq.END]
        assert target[row].tolist() == written + [seq2seq.IGNORED] * (len(target[row]) - len(written))
        assert previous[row, : len(written)].tolist() == [seq2seq.BEGIN, *written[:-1]]


def test_seq2seq_translates_unseen_sentences(translator):
    (source, lengths, _), target = unseen("seq2seq")
    wanted = target.masked_fill(target == seq2seq.IGNORED, seq2seq.END)
    words = translator.greedy(source, lengths, limit=target.shape[1]).words
    assert (words == wanted).all(1).float().mean() > 0.8


def test_seq2seq_scheduled_sampling_of_nothing_is_teacher_forcing():
    model, (inputs, _) = tiny("seq2seq"), unseen("seq2seq")
    forced = model(*inputs)
    assert torch.equal(model(*inputs, sampled=0.0), forced)
    assert not torch.allclose(model(*inputs, sampled=1.0), forced)
    # A probability too small to be drawn takes the sampling path, and none of its words.
    assert torch.equal(model(*inputs, sampled=1e-30), forced)


def test_seq2seq_scheduled_sampling_of_everything_is_greedy():
    model, ((source, lengths, previous), _) = tiny("seq2seq"), unseen("seq2seq")
    greedy = model.greedy(source, lengths, limit=previous.shape[1])
    own = model(source, lengths, previous, sampled=1.0).argmax(2)
    ended = (own == seq2seq.END).cumsum(1) > 0
    assert torch.equal(own.masked_fill(ended, seq2seq.END), greedy.words)


def test_seq2seq_scheduled_sampling_follows_the_generator():
    model, (inputs, _) = tiny("seq2seq"), unseen("seq2seq")

    def scores(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model(*inputs, sampled=0.5)

    assert torch.equal(scores(0), scores(0))
    assert not torch.equal(scores(0), scores(1))


@pytest.mark.parametrize("steps", (20, 160))
def test_seq2seq_log_probability_is_that_of_teacher_forcing(steps):
    """Both of a model that still hesitates, whose best beginning changes its place in the beam, and after."""
    model, ((source, lengths, _), _) = trained("seq2seq", steps), unseen("seq2seq")
    found = [model.greedy(source, lengths, 5)]
    found += [model.beam_search(source, lengths, beam, 5) for beam in (1, 2, 5, 9)]
    for words, claimed in found:
        torch.testing.assert_close(claimed, log_probability(model, source, lengths, words))


@pytest.mark.parametrize("steps", (0, 20))
def test_seq2seq_beam_of_one_is_greedy(steps):
    model, ((source, lengths, _), _) = trained("seq2seq", steps), unseen("seq2seq")
    greedy, beam = model.greedy(source, lengths, 5), model.beam_search(source, lengths, 1, 5)
    assert torch.equal(beam.words, greedy.words)
    torch.testing.assert_close(beam.log_probability, greedy.log_probability)


def test_seq2seq_beam_is_at_least_as_likely_as_greedy():
    """Undecided after few steps, so that a beam finds likelier sentences than greedy."""
    model, ((source, lengths, _), _) = trained("seq2seq", steps=20), unseen("seq2seq")
    greedy, beam = model.greedy(source, lengths, 5), model.beam_search(source, lengths, 6, 5)
    assert (beam.log_probability >= greedy.log_probability - 1e-5).all()
    assert (beam.log_probability > greedy.log_probability + 1e-3).any()


def test_seq2seq_full_beam_finds_the_likeliest_of_all():
    model, ((source, lengths, _), _) = trained("seq2seq", steps=20), unseen("seq2seq")
    source, lengths, limit = source[:3], lengths[:3], 3
    every = torch.tensor(list(itertools.product(range(8), repeat=limit)))
    beam = model.beam_search(source, lengths, 8 ** (limit - 1), limit)
    for row in range(len(source)):
        alike = (every.new_ones(len(every), 1) * source[row], lengths[row].expand(len(every)))
        best = log_probability(model, *alike, every).max()
        torch.testing.assert_close(beam.log_probability[row], best)


def test_seq2seq_train_step_clips_the_gradient():
    (inputs, target), largest = unseen("seq2seq"), 0.01
    model = tiny("seq2seq")
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    loss, norm = seq2seq.train_step(model, optimizer, inputs, target, largest_norm=largest)
    moved = [one - other for one, other in zip(before, model.parameters(), strict=True)]
    length = torch.cat([each.flatten() for each in moved]).norm().item()
    assert norm > largest
    assert length == pytest.approx(largest, rel=1e-3)
    # What was clipped is the direction of the whole gradient, and the loss is of before the step.
    unclipped = tiny("seq2seq")
    assert seq2seq.loss(unclipped(*inputs), target).item() == pytest.approx(loss)
    seq2seq.loss(unclipped(*inputs), target).backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in unclipped.parameters()])
    assert gradient.norm().item() == pytest.approx(norm, rel=1e-5)
    step = torch.cat([each.detach().flatten() for each in moved])
    assert torch.cosine_similarity(step, gradient, 0) > 0.999


def test_seq2seq_train_step_leaves_a_short_gradient_alone():
    (inputs, target), model = unseen("seq2seq"), tiny("seq2seq")
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    _, norm = seq2seq.train_step(model, optimizer, inputs, target, largest_norm=100.0)
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert gradient.norm().item() == pytest.approx(norm, rel=1e-5)


def test_seq2seq_learns_with_scheduled_sampling():
    config, model = models.config("seq2seq", "tiny"), tiny("seq2seq")
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = [
        seq2seq.train_step(model, optimizer, *seq2seq.batch(config, seed=step), sampled=step / 320)[0]
        for step in range(160)
    ]
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])


@pytest.mark.parametrize("backend", KERNELS)
def test_seq2seq_swapped_translates_alike(translator, backend):
    need(backend)
    (source, lengths, _), _ = unseen("seq2seq")
    stock = translator.beam_search(source, lengths, 3, 5)
    with pyarch.swapped(translator, backend=backend) as report:
        ours = translator.beam_search(source, lengths, 3, 5)
    assert {record.name for record in report.swapped} == {"encoder", "decoder"}
    assert torch.equal(ours.words, stock.words)
    torch.testing.assert_close(ours.log_probability, stock.log_probability)
