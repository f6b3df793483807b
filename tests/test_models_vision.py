"""ViT, TimeSformer and CvT beyond what every model must do: sizes, positions, what sees what."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import pyarch
from pyarch.models import cnn_transformer, timesformer, vit
from tests.model_cases import tiny, unseen

OPERATOR = "attention"

# Of the published networks with their depth and classes; the TimeSformer's with the 400 actions of Kinetics.
PUBLISHED = {
    "vit": (vit, replace(vit.REAL, layers=12, classes=1000), 86_567_656),
    "timesformer": (
        timesformer,
        replace(timesformer.REAL, layers=12, classes=400, resolution=224),
        121_566_352,
    ),
    "cnn_transformer": (
        cnn_transformer,
        replace(
            cnn_transformer.REAL,
            stages=(*cnn_transformer.REAL.stages[:2], replace(cnn_transformer.REAL.stages[2], blocks=10)),
            classes=1000,
        ),
        19_997_480,
    ),
}


def without(part: nn.Linear) -> None:
    """Let the branch that ends in a linear layer add nothing."""
    with torch.no_grad():
        part.weight.zero_()
        part.bias.zero_()


@pytest.mark.parametrize("name", PUBLISHED)
def test_vision_real_widths_have_the_published_parameters(name):
    module, config, published = PUBLISHED[name]
    with torch.device("meta"):
        model = module.build(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == published


@pytest.mark.parametrize("name", PUBLISHED)
def test_vision_class_token_sees_every_pixel(name):
    model, ((images,), _) = tiny(name), unseen(name)
    images.requires_grad_()
    model(images)[0, 0].backward()
    assert images.grad[0].count_nonzero() == images[0].numel()


# -------------------------------------------------------------------------------- ViT


def test_vit_positions_alone_tell_the_order_of_the_patches():
    """A picture whose quarters are exchanged, whole patches at a time."""
    model, ((images,), _) = tiny("vit"), unseen("vit")
    exchanged = images.roll((16, 16), dims=(2, 3))
    assert not torch.allclose(model(exchanged), model(images), atol=1e-4)
    with torch.no_grad():
        model.positions[:, 1:] = 0.0
    torch.testing.assert_close(model(exchanged), model(images))


# -------------------------------------------------------------------------------- TimeSformer


def reached(layer: timesformer.Layer) -> Tensor:
    """Which patches (T, S) the second patch of the third frame depends on, through one layer."""
    token, patches = torch.randn(1, 1, 32), torch.randn(1, 4, 5, 32, requires_grad=True)
    layer(token, patches)[1][0, 2, 1].square().sum().backward()
    return patches.grad[0].abs().sum(2) > 0


def test_timesformer_divides_space_and_time():
    time, space = torch.zeros(4, 5, dtype=torch.bool), torch.zeros(4, 5, dtype=torch.bool)
    time[:, 1], space[2] = True, True
    assert reached(timesformer.Layer(32, 4, 64)).all()
    for ends, seen in (
        (("space_attention.out_proj",), time),
        (("time_project",), space),
        (("space_attention.out_proj", "time_project"), time & space),
    ):
        layer = timesformer.Layer(32, 4, 64)
        for end in ends:
            without(layer.get_submodule(end))
        assert torch.equal(reached(layer), seen)


def test_timesformer_times_alone_tell_the_order_of_the_frames():
    model, ((videos,), _) = tiny("timesformer"), unseen("timesformer")
    backwards = videos.flip(1)
    assert not torch.allclose(model(backwards), model(videos), atol=1e-4)
    with torch.no_grad():
        model.times.zero_()
    torch.testing.assert_close(model(backwards), model(videos))


def test_timesformer_learns_from_the_frames_together():
    """The same model of one frame stays at the guess, whose loss is ln 2."""
    config = replace(timesformer.TINY, frames=1)
    torch.manual_seed(0)
    model = timesformer.build(config)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(40):
        inputs, target = timesformer.batch(config, seed=step)
        optimizer.zero_grad()
        timesformer.loss(model(*inputs), target).backward()
        optimizer.step()
    inputs, target = timesformer.batch(replace(config, batch=64), seed=1000)
    assert timesformer.loss(model(*inputs), target) > 0.65


def test_timesformer_digits_move_along_their_line(monkeypatch):
    monkeypatch.setattr(timesformer, "NOISE", 0.0)
    (videos,), target = timesformer.batch(replace(timesformer.TINY, classes=4), seed=0)
    assert sorted(target.unique().tolist()) == [0, 1, 2, 3]
    diagonal = round(timesformer.STEP / 2**0.5)
    steps = ((0, timesformer.STEP), (diagonal, diagonal), (timesformer.STEP, 0), (diagonal, -diagonal))
    for video, label in zip(videos, target.tolist(), strict=True):
        assert video.count_nonzero() > 0
        assert torch.equal(video[1:], video[:-1].roll(steps[label], dims=(2, 3)))


# -------------------------------------------------------------------------------- CvT


def test_cvt_tokens_join_and_part():
    token, places = torch.randn(2, 1, 3), torch.randn(2, 3, 4, 5)
    x = cnn_transformer.joined(token, places)
    assert x.shape == (2, 21, 3)
    assert torch.equal(x[:, 0], token[:, 0]) and torch.equal(x[:, 1 + 2 * 5 + 3], places[:, :, 2, 3])
    for tokens in (token, token[:, :0]):
        again = cnn_transformer.parted(cnn_transformer.joined(tokens, places), (4, 5))
        assert all(map(torch.equal, again, (tokens, places)))


def test_cvt_has_a_quarter_of_the_keys_and_a_class_token_in_the_last_stage():
    model, ((images,), _), seen = tiny("cnn_transformer"), unseen("cnn_transformer"), []
    for stage in model.stages:
        stage[0].attention.register_forward_pre_hook(
            lambda _, inputs: seen.append([each.shape[1] for each in inputs])
        )
    model(images)
    assert seen == [[64, 16, 16], [1 + 16, 1 + 4, 1 + 4]]


def test_cvt_convolutions_tell_the_order():
    model, ((images,), _) = tiny("cnn_transformer").eval(), unseen("cnn_transformer")
    # The places of the last stage, which its queries, keys and values alone still mix.
    places = model.embeddings[0](images)
    mixed = places.flatten(2)[:, :, torch.randperm(64)].unflatten(2, (8, 8))
    block, token = model.stages[0][0], torch.randn(len(images), 1, 16)
    assert not torch.allclose(block(token, mixed)[0], block(token, places)[0], atol=1e-4)


def test_cvt_swap_reaches_convolutions_and_attention():
    report = pyarch.swap(tiny("cnn_transformer"))
    block = ("query.0", "key.0", "value.0", "attention")
    assert [record.name for record in report.swapped] == [
        f"stages.{stage}.0.{layer}" for stage in range(2) for layer in block
    ]
