"""Distillation: what is compared with what, the gradient of attention weights, a student that learns so."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pyarch
from pyarch.models import distillation
from pyarch.models.distillation import Seen
from tests.compare import check
from tests.model_cases import KERNELS, need, tiny, unseen

OPERATOR = "attention"
CONFIG = distillation.TINY


def seen(seed: int, width: int = 5) -> Seen:
    """Anything that two layers of one head could see."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    hidden = tuple(drawn(3, 4, width) for _ in range(3))
    return Seen(drawn(3, 7), hidden, tuple(drawn(3, 1, 4, 4).softmax(3) for _ in range(2)))


def attention_loss(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    return distillation.attention_loss(*model(*inputs))


# ------------------------------------------------------------------------------------------ the lesson


def test_distillation_layers_learn_from_their_own():
    """Of 4 layers from the second and the last, beside the embedding."""
    model, (inputs, _) = tiny("distillation"), unseen("distillation")
    whole, taught = model.teacher(*inputs), model(*inputs).teacher
    assert (len(whole.hidden), len(whole.weights)) == (5, 4)
    assert all(torch.equal(*pair) for pair in zip(taught.hidden, whole.hidden[::2], strict=True))
    assert all(torch.equal(*pair) for pair in zip(taught.weights, whole.weights[1::2], strict=True))
    assert torch.equal(taught.scores, whole.scores)


def test_distillation_brings_the_student_to_the_teachers_width():
    model, (inputs, _) = tiny("distillation"), unseen("distillation")
    own, shown = model.student(*inputs), model(*inputs).student
    projections = [model.project_embedding, model.project, model.project]
    expected = [project(each) for project, each in zip(projections, own.hidden, strict=True)]
    torch.testing.assert_close(list(shown.hidden), expected)
    assert {each.shape[2] for each in shown.hidden} == {CONFIG.teacher.width} != {CONFIG.student.width}


def test_distillation_needs_as_many_layers_for_each():
    config = replace(CONFIG, teacher=replace(CONFIG.teacher, layers=3))
    with pytest.raises(ValueError, match="teacher.layers=3 is no multiple of student.layers=2"):
        distillation.build(config)


def test_distillation_shows_weights_of_words_alone():
    """Each word's weights sum to 1 over the words of its sentence; of padding there is nothing."""
    model, (inputs, _) = tiny("distillation"), unseen("distillation")
    padding = distillation.beyond(inputs[1], CONFIG.words)
    for weights in model(*inputs).student.weights:
        assert weights.shape == (CONFIG.batch, CONFIG.heads, CONFIG.words, CONFIG.words)
        sums = (~padding).float()[:, None].expand(weights.shape[:3])
        torch.testing.assert_close(weights.sum(3), sums)
        assert not weights.masked_select(padding[:, None, None]).any()
    for hidden in model(*inputs).student.hidden:
        assert not hidden[padding].any()


def test_distillation_loss_is_the_sum_of_its_parts():
    student, teacher = seen(0), seen(1)
    labels = torch.tensor([0, 6, 3])
    soft = (teacher.scores / 2).softmax(1)
    soft_loss = 4 * (soft * (soft.log() - (student.scores / 2).softmax(1).log())).sum() / 3
    squares = [
        (mine - taught).square().mean() * scale
        for kind, scale in (("hidden", 1), ("weights", 4))
        for mine, taught in zip(getattr(student, kind), getattr(teacher, kind), strict=True)
    ]
    assert len(squares) == 5
    expected = soft_loss + sum(squares)
    torch.testing.assert_close(distillation.lesson_loss(student, teacher), expected)
    hard = -student.scores.softmax(1).log()[torch.arange(3), labels].mean()
    output = distillation.Lesson(student, teacher)
    torch.testing.assert_close(distillation.loss(output, labels), expected + hard)
    assert distillation.lesson_loss(teacher, teacher).item() == pytest.approx(0.0, abs=1e-6)


# ------------------------------------------------------------------------------------------ the teacher


def test_distillation_teacher_stays_as_it_is():
    model, (inputs, target) = tiny("distillation"), unseen("distillation")
    before = copy.deepcopy(model.teacher.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    distillation.loss(model(*inputs), target).backward()
    optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in model.teacher.state_dict().items())
    assert not any(each.requires_grad for each in model(*inputs).teacher.weights)


def test_distillation_teacher_drops_nothing():
    torch.manual_seed(0)
    model, (inputs, _) = distillation.build(replace(CONFIG, dropout=0.5)).train(), unseen("distillation")
    one, other = model(*inputs), model(*inputs)
    assert torch.equal(one.teacher.scores, other.teacher.scores)
    assert not torch.equal(one.student.scores, other.student.scores)


# ------------------------------------------------------------------------------------------ the student


@pytest.mark.parametrize("backend", KERNELS)
def test_distillation_gradient_of_attention_weights(backend):
    """All that a weight of the student's attention learns when nothing but attention weights is compared."""
    need(backend)
    inputs, _ = unseen("distillation")
    gradients = {}
    for kind in ("ours", "stock", "reference"):
        model = tiny("distillation")
        if kind == "ours":
            report = pyarch.swap(model, backend=backend)
            assert {record.now for record in report.swapped} == {"pyarch.nn.MultiheadAttention"}
        if kind == "reference":
            model.double()
        attention_loss(model, inputs).backward()
        gradients[kind] = {
            name: each.grad
            for name, each in model.named_parameters()
            if name.startswith("student.layers") and each.grad is not None
        }
    # What follows the last weights learns nothing.
    assert "student.layers.1.attention.in_proj_weight" in gradients["reference"]
    assert "student.layers.1.feed_forward.0.weight" not in gradients["reference"]
    for name, exact in gradients["reference"].items():
        ours, stock = gradients["ours"][name], gradients["stock"][name]
        largest = max(each.abs().max().item() for each in gradients["reference"].values())
        noise = max(
            ((gradients["stock"][each] - wanted).abs().max() / wanted.abs().max()).item()
            for each, wanted in gradients["reference"].items()
            if each.endswith("weight")
        )
        check(name, ours, stock, exact, layer_scale=largest, noise=noise)


@pytest.mark.parametrize("backend", ("stock", "cpu"))
def test_distillation_student_learns_without_labels(backend):
    """A trained teacher's lesson alone lets the student name key words, and look where its teacher looks."""
    need(backend)
    model, (inputs, target) = tiny("distillation"), unseen("distillation")
    if backend != "stock":
        pyarch.swap(model, backend=backend)

    model.teacher.requires_grad_()
    optimizer = torch.optim.Adam(model.teacher.parameters(), 5e-3)
    for step in range(60):
        told, labels = distillation.batch(CONFIG, seed=step)
        optimizer.zero_grad()
        F.cross_entropy(model.teacher(*told).scores, labels).backward()
        optimizer.step()
    model.teacher.requires_grad_(False)
    assert accuracy(model.teacher, inputs, target) > 0.9

    apart = attention_loss(model, inputs).item()
    optimizer = torch.optim.Adam([each for each in model.parameters() if each.requires_grad], 1e-2)
    for step in range(80):
        told, _ = distillation.batch(CONFIG, seed=step)
        optimizer.zero_grad()
        distillation.lesson_loss(*model(*told)).backward()
        optimizer.step()
    assert accuracy(model.student, inputs, target) > 0.9
    assert attention_loss(model, inputs).item() < 0.3 * apart


def accuracy(model: nn.Module, inputs: tuple[Tensor, ...], target: Tensor) -> float:
    with torch.no_grad():
        return (model(*inputs).scores.argmax(1) == target).float().mean().item()
