"""Training with swapped recurrent layers follows torch's loss curve; dropout between layers is torch's."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import pyarch
from pyarch.models import crnn, language
from pyarch.tolerance import FLOOR_ULPS, STOCK_ERRORS_ALLOWED
from tests.recurrent_models import STOCK, drop_in, each_backend, each_mode

OPERATOR = "recurrent"
STEPS = 30
JITTERED_RUNS = 4

# ------------------------------------------------------------------------------------ loss curves

TASKS = {
    "CRNN": (crnn, crnn.TINY, 3e-3, 0.8),
    "LSTM language model": (language, replace(language.TINY, cell="lstm"), 3e-2, 0.8),
    "GRU language model": (language, replace(language.TINY, cell="gru"), 1e-2, 0.8),
    "RNN language model": (language, replace(language.TINY, cell="rnn"), 1e-2, 0.8),
    "tied LSTM language model": (language, replace(language.TINY, tied=True), 1e-2, 0.9),
}


def curve(task, config, model, rate) -> torch.Tensor:
    """The loss of every step; batch after batch in one order for all runs.

    Adam's eps is large, lest it make a full step out of a gradient that is nothing but rounding.
    """
    dtype = next(model.parameters()).dtype
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, eps=1e-3)
    losses = []
    for step in range(STEPS):
        inputs, target = task.batch(config, seed=step)
        optimizer.zero_grad()
        outputs = model(*(each.to(dtype) if each.is_floating_point() else each for each in inputs))
        loss = task.loss(outputs, target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def moved_by_a_rounding(model: nn.Module, seed: int) -> nn.Module:
    """A copy whose parameters are each the next number of their dtype, up or down."""
    generator = torch.Generator().manual_seed(seed)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in moved.parameters():
            up = torch.rand(parameter.shape, generator=generator) < 0.5
            parameter.copy_(torch.nextafter(parameter, torch.where(up, torch.inf, -torch.inf)))
    return moved


def allowed(truth: torch.Tensor, stocks: list[torch.Tensor]) -> torch.Tensor:
    """The rule of pyarch.tolerance for a curve, step by step.

    A step's error grows from the errors before it, as training amplifies a difference, and how fast is
    chance: so torch's error at a step is the largest that any of its runs had up to there, where all but one
    start from parameters moved by a rounding.
    """
    errors = torch.stack([(stock - truth).abs() for stock in stocks]).amax(0).cummax(0).values
    return STOCK_ERRORS_ALLOWED * errors + FLOOR_ULPS * torch.finfo(torch.float32).eps * truth.abs().max()


@pytest.fixture(scope="module")
def torchs():
    """Of each task: model, float64's curve, torch's curves; computed once for all backends."""
    return {}


def torchs_curves(torchs, name):
    if name not in torchs:
        task, config, rate, _ = TASKS[name]
        torch.manual_seed(1)
        model = task.build(config)
        stocks = [model, *(moved_by_a_rounding(model, seed) for seed in range(JITTERED_RUNS))]
        truth = curve(task, config, copy.deepcopy(model).double(), rate)
        torchs[name] = model, truth, [curve(task, config, copy.deepcopy(each), rate) for each in stocks]
    return torchs[name]


@each_backend
@pytest.mark.parametrize("name", TASKS)
def test_recurrent_training_follows_torchs_loss_curve(backend, name, torchs):
    task, config, rate, falls_to = TASKS[name]
    model, truth, stocks = torchs_curves(torchs, name)
    model = copy.deepcopy(model)
    report = pyarch.swap(model, backend=backend)
    assert len(report.swapped) == (2 if task is crnn else 1)
    mine = curve(task, config, model, rate)
    errors, limit = (mine - truth).abs(), allowed(truth, stocks)
    worst = int((errors - limit).argmax())
    assert (errors <= limit).all(), (
        f"step {worst}: error {errors[worst]:.2e}, allowed {limit[worst]:.2e}, loss {truth[worst]:.4f}"
    )
    assert mine[-5:].mean() < falls_to * mine[:5].mean(), "the task is not learned"


# ------------------------------------------------------------------------------------ dropout between layers

DROPPED = 0.3


def stack(mode: str, **settings) -> tuple[nn.Module, nn.Module]:
    """Two layers with dropout between them, ours and torch's, with equal numbers."""
    cls, options = STOCK[mode]
    stock = cls(4, 64, num_layers=2, dropout=DROPPED, **options, **settings)
    ours = drop_in(cls)(4, 64, num_layers=2, dropout=DROPPED, **options, **settings)
    ours.load_state_dict(stock.state_dict())
    return ours, stock


def transparent(layer: nn.Module) -> nn.Module:
    """A relu layer made to give its input: weight_ih the identity, no recurrence."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(
                torch.eye(*parameter.shape) if "weight_ih" in name else torch.zeros_like(parameter)
            )
    return layer


@each_backend
def test_recurrent_dropout_rate_scale_and_gradient(backend):
    """Between two layers that copy their input: an element is 0 or 1 / (1 - rate) times itself, both ways."""
    layer = transparent(drop_in(nn.RNN)(64, 64, num_layers=2, dropout=DROPPED, nonlinearity="relu"))
    x = (torch.rand(50, 16, 64) + 0.5).requires_grad_()
    with pyarch.backend(backend):
        output, _ = layer(x)
        cotangent = torch.rand_like(output) + 0.5
        (gradient,) = torch.autograd.grad(output, x, cotangent)
        quiet = layer.eval()(x)[0]
    mask = output / x
    kept = mask != 0
    torch.testing.assert_close(mask[kept], torch.full_like(mask[kept], 1 / (1 - DROPPED)))
    deviation = (DROPPED * (1 - DROPPED) / mask.numel()) ** 0.5
    assert abs(1 - kept.float().mean().item() - DROPPED) < 4 * deviation
    torch.testing.assert_close(gradient, mask * cotangent)
    torch.testing.assert_close(quiet, x)


@each_backend
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "both directions"])
@each_mode
def test_recurrent_dropout_is_torchs_under_one_seed(backend, mode, bidirectional):
    """The same mask, the same number of random draws, the same gradients; another mask at the next call."""
    ours, stock = stack(mode, bidirectional=bidirectional)
    x = torch.randn(9, 5, 4)
    runs = []
    for layer, engine in ((ours, backend), (ours, backend), (stock, "auto")):
        torch.manual_seed(11)
        layer.zero_grad()
        with pyarch.backend(engine):
            outputs = [layer(x)[0] for _ in range(2)]
            sum(each.square().sum() for each in outputs).backward()
        gradients = [each.grad.clone() for each in layer.parameters()]
        runs.append([*outputs, *gradients, torch.rand(3)])
    assert all(torch.equal(first, again) for first, again in zip(runs[0], runs[1], strict=True))
    torch.testing.assert_close(runs[0], runs[2], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(runs[0][0], runs[0][1])


@each_backend
@each_mode
def test_recurrent_dropout_of_packed_input_is_torchs(backend, mode):
    ours, stock = stack(mode)
    sequence = nn.utils.rnn.pack_padded_sequence(torch.randn(9, 3, 4), [4, 9, 1], enforce_sorted=False)
    outputs = []
    for layer, engine in ((ours, backend), (stock, "auto")):
        torch.manual_seed(11)
        with pyarch.backend(engine):
            outputs.append(layer(sequence)[0].data)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


@each_backend
@pytest.mark.parametrize("rate", [0.0, 1.0])
@each_mode
def test_recurrent_dropout_of_nothing_and_of_everything(backend, mode, rate):
    ours, stock = stack(mode)
    ours.dropout = stock.dropout = rate
    x = torch.randn(5, 3, 4)
    with pyarch.backend(backend):
        mine = ours(x)[0]
    torch.testing.assert_close(mine, stock(x)[0], rtol=1e-4, atol=1e-5)


@each_backend
def test_recurrent_dropout_never_touches_the_last_layer(backend):
    """One layer has nothing to drop between."""
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
        layer = drop_in(nn.GRU)(4, 8, dropout=0.9)
    x = torch.randn(5, 3, 4)
    with pyarch.backend(backend):
        assert torch.equal(layer(x)[0], layer(x)[0])
        assert torch.equal(layer(x)[0], layer.eval()(x)[0])
