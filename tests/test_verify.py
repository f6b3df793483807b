"""verify: it passes what is right, fails what is wrong however little, and touches nothing of the user's."""

from __future__ import annotations

import copy
import dataclasses
import json
import random

import pytest
import torch
from torch import nn

import pyarch
from pyarch import native
from pyarch.dispatch import Backend, Op, accepts_all
from pyarch.ops import conv
from pyarch.reference import conv as reference
from pyarch.tolerance import allowed
from tests.swap_cases import depthwise, image, net

OPERATOR = "verify"


def verified(model, inputs, **options):
    return pyarch.verify(model, inputs, timing=False, **options)


@pytest.fixture
def kernel(monkeypatch):
    """Puts a backend named cpu before the others: the reference, with what a test makes of its results."""

    def install(forward=lambda output: output, backward=lambda grads: grads):
        def run_forward(*call):
            return forward(reference.forward(*call))

        def run_backward(*call):
            return backward(reference.backward(*call))

        for op, run in (("FORWARD", run_forward), ("BACKWARD", run_backward)):
            stock = getattr(conv, op)
            fake = Backend("cpu", "unused:unused", accepts_all)
            vars(fake)["run"] = run
            monkeypatch.setattr(conv, op, Op(stock.name, (fake, *stock.backends)))

    return install


# -------------------------------------------------------------------------------- right and wrong kernels


def test_verify_passes_a_right_kernel(kernel):
    kernel()
    report = verified(net(), image())
    assert report.ok and report.assert_ok() is report
    assert [(layer.name, layer.forward, layer.backward, layer.calls) for layer in report.layers] == [
        ("0", "cpu", "cpu", 1),
        ("3", "cpu", "cpu", 1),
    ]
    assert {each.name for each in report.gradients} >= {
        "input[0]",
        "0.weight",
        "0.bias",
        "2.weight",
        "3.bias",
    }
    assert {each.name for each in report.layers[0].gradients} == {"input[0]", "weight", "bias"}
    assert 0 < report.worst.ratio <= 1


def wrong_gradient(position):
    def damage(grads):
        damaged = list(grads)
        if grads[position] is not None:
            damaged[position] = grads[position] * 1.001
        return tuple(damaged)

    return damage


@pytest.mark.parametrize("position, name", [(0, "input[0]"), (1, "weight"), (2, "bias")])
def test_verify_fails_each_wrong_gradient(kernel, position, name):
    kernel(backward=wrong_gradient(position))
    report = verified(net(), image())
    assert not report.ok
    assert any(problem.startswith(f"layer '0': {name}: error") for problem in report.problems)
    with pytest.raises(AssertionError, match="verify failed"):
        report.assert_ok()


def test_verify_fails_a_wrong_output(kernel):
    kernel(forward=lambda output: output + 1e-5)
    report = verified(net(), image())
    assert any(problem.startswith("layer '0': output") for problem in report.problems)
    assert any(problem.startswith("model: output") for problem in report.problems)


def test_verify_fails_a_nan(kernel):
    def poison(output):
        output.view(-1)[3] = float("nan")
        return output

    kernel(forward=poison)
    report = verified(net(), image())
    assert not report.ok and report.worst.error == float("inf")
    assert '"inf"' in report.to_json()


# -------------------------------------------------------------------------------- models that give NaN


class Undefined(nn.Module):
    """NaN in a share of what it gives: all of it, two channels of eight, or in its layers alone."""

    def __init__(self, share):
        super().__init__()
        self.share, self.layers = share, net()

    def forward(self, x):
        if self.share == "inside":
            hidden = self.layers(x / torch.zeros(1))
            return self.layers(x) + torch.where(hidden.isnan(), 0.0, hidden)
        scale = torch.ones(8, 1, 1)
        scale[: 8 if self.share == "all" else 2] = torch.nan
        return self.layers(x) * scale


def test_verify_says_once_that_a_model_gives_nan(kernel):
    kernel()
    report = verified(Undefined("all"), image())
    (problem,) = report.problems
    gradients = len(report.gradients)
    assert problem == (
        f"torch's own model gives NaN too, in output (100% of it), {gradients} of {gradients} gradients: "
        "there only the places of NaN are compared; no output has a number left to compare"
    )
    assert report.outputs[0].nan == 1
    assert all(each.nan and each.kept for each in (*report.outputs, *report.gradients))


def test_verify_compares_what_is_not_nan(kernel):
    """A quarter of the output has no number; the rest proves the model, and fails it where it is wrong."""
    kernel()
    report = verified(Undefined("some"), image(), backward=False).assert_ok()
    (note,) = [each for each in report.notes if "NaN" in each]
    assert note.startswith("torch's own model gives NaN too, in output (25% of it): there only the places")
    assert report.outputs[0].nan == 0.25 and 0 < report.outputs[0].allowed < 1e-3
    kernel(forward=lambda output: output + 1e-3)
    problem = verified(Undefined("some"), image(), backward=False).problems[0]
    assert problem.endswith("ours has NaN elsewhere, or other numbers beside it, in model: output")


def test_verify_fails_nan_in_other_places(kernel):
    def moved(output):
        output = output.clone()
        output[:, -1] = torch.nan
        return output

    kernel(forward=moved)
    problem = verified(Undefined("some"), image(), backward=False).problems[0]
    assert problem.endswith("ours has NaN elsewhere, or other numbers beside it, in model: output")


def test_verify_names_layers_that_give_nan_unseen(kernel):
    kernel()
    report = verified(Undefined("inside"), image(), backward=False)
    notes = [each for each in (*report.notes, *report.problems) if "NaN" in each]
    assert notes == [
        "torch's own model gives NaN too, in 2 of 2 layers ('layers.0', 'layers.3'): "
        "there only the places of NaN are compared"
    ]


def test_verify_does_not_grant_an_infinity_beside_numbers(kernel):
    """The largest finite value is what rounding is measured by."""

    class Overflowing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = depthwise()

        def forward(self, x):
            return torch.cat([self.layer(x).flatten(), torch.full((1,), torch.inf)])

    kernel()
    assert verified(Overflowing(), image(), backward=False).ok
    kernel(forward=lambda output: output + 1)
    assert any("model: output" in each for each in verified(Overflowing(), image(), backward=False).problems)


def test_verify_fails_a_gradient_end_to_end_that_no_layer_alone_shows(kernel, monkeypatch):
    """A gradient lost between the layers: each layer by itself is right."""
    kernel()
    stock = conv._DepthwiseConv.apply

    def detached(input, *rest):
        return stock(input if input.is_leaf else input.detach(), *rest)

    model = nn.Sequential(nn.Conv2d(4, 4, 1), depthwise(), nn.ReLU(), depthwise())
    assert verified(model, image()).ok
    monkeypatch.setattr(conv._DepthwiseConv, "apply", detached)
    assert any("0.weight" in problem for problem in verified(model, image()).problems)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_verify_judges_in_the_models_dtype(kernel, dtype):
    kernel()
    model, x = net().to(dtype), image().to(dtype)
    report = verified(model, x)
    assert report.ok and report.dtype == str(dtype).removeprefix("torch.")
    assert report.worst.error > 1e-4, "half precision cannot be this close: another dtype was compared"


@pytest.mark.parametrize("name", ["relu", "batch_norm_train", "deep", "scalar"])
def test_verify_is_not_upset_by_what_amplifies_rounding(kernel, name):
    kernel()
    models = {
        "relu": lambda: nn.Sequential(
            *[layer for _ in range(4) for layer in (depthwise(), nn.ReLU(inplace=True))]
        ),
        "batch_norm_train": lambda: nn.Sequential(depthwise(bias=True), nn.BatchNorm2d(4), depthwise()),
        "deep": lambda: nn.Sequential(*(depthwise(padding=1) for _ in range(20))),
        "scalar": lambda: nn.Sequential(depthwise(), nn.Flatten(), nn.LazyLinear(1)),
    }
    for seed in range(10):
        torch.manual_seed(seed)
        model, x = models[name](), image() if name != "relu" else torch.randn(2, 4, 12, 12)
        model(x)
        verified(model, x).assert_ok()


# -------------------------------------------------------------------------------- hollow proofs


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_verify_is_not_ok_without_a_kernel_of_ours(backend):
    with pyarch.backend(backend):
        report = verified(net(), image())
    assert [layer.forward for layer in report.layers] == [backend, backend]
    (problem,) = report.problems
    assert problem.startswith("no layer ran a kernel of ours: ")


def test_verify_quotes_the_backends_on_a_layer_called_by_name():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = depthwise()

        def forward(self, x):
            return self.layer(input=x)

    with pyarch.backend("reference"):
        (problem,) = verified(Named(), image()).problems
    assert problem.startswith("no layer ran a kernel of ours: triton: ")


def test_verify_is_not_ok_when_nothing_can_be_swapped():
    report = verified(nn.Sequential(nn.Conv2d(4, 4, 1)), image())
    assert report.problems == ("nothing to swap: not depthwise (groups != in_channels)",)


class Zero(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = depthwise()

    def forward(self, x):
        return self.layer(x) * 0


def test_verify_is_not_ok_when_every_gradient_is_zero(kernel):
    kernel()
    assert (
        "no gradient is different from zero, so the backward is not proven"
        in verified(Zero(), image()).problems
    )
    assert verified(Zero(), image(), backward=False).ok


def test_verify_is_not_ok_without_an_output(kernel):
    kernel()

    class Mute(Zero):
        def forward(self, x):
            self.layer(x)
            return {"label": 3}

    assert "the model returned no floating tensor to compare" in verified(Mute(), image()).problems


def test_verify_proves_a_layer_whose_gradient_never_comes(kernel):
    """The layer by itself is proven backward too; that the model never asked is shown."""
    kernel(backward=wrong_gradient(1))

    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = depthwise(), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.head(self.layer(x).detach())

    report = verified(Cut(), image())
    assert report.layers[0].backward == "-"
    assert [problem.split(":")[0] for problem in report.problems] == ["layer 'layer'"]


def test_verify_names_layers_never_called(kernel):
    kernel()

    class Bypassed(nn.Module):
        def __init__(self):
            super().__init__()
            self.run, self.read = depthwise(), depthwise()

        def forward(self, x):
            return nn.functional.conv2d(self.run(x), self.read.weight, groups=4)

    report = verified(Bypassed(), image())
    assert report.ok and "never called: read" in report.notes
    assert (report.layers[1].calls, report.layers[1].forward) == (0, "-")


# -------------------------------------------------------------------------------- inputs and outputs


@dataclasses.dataclass
class Pair:
    first: torch.Tensor
    rest: list


class Many(nn.Module):
    """Takes ids and named tensors, gives a nested output."""

    def __init__(self):
        super().__init__()
        self.table, self.layer = nn.Embedding(7, 4, sparse=True), depthwise(cls=nn.Conv1d)

    def forward(self, ids, *, scale=None):
        ids.clamp_(max=6)
        x = self.table(ids).transpose(1, 2)
        y = self.layer(x if scale is None else x * scale)
        return {"pair": Pair(y, [y.relu(), 3]), "sum": (y.sum(),)}


def test_verify_reaches_every_output_and_named_input(kernel):
    kernel()
    ids = torch.randint(0, 9, (3, 8))
    given = ids.clone()
    report = verified(Many(), {"ids": ids, "scale": torch.tensor(2.0)}).assert_ok()
    assert [each.name for each in report.outputs] == [
        "output['pair'].first",
        "output['pair'].rest[0]",
        "output['sum'][0]",
    ]
    assert "input['scale']" in {each.name for each in report.gradients}
    assert torch.equal(ids, given)
    verified(Many(), (ids,)).assert_ok()


def test_verify_refuses_other_inputs():
    with pytest.raises(TypeError, match="needs a tensor, a tuple of arguments or a dict"):
        verified(net(), 3)


# -------------------------------------------------------------------------------- what is the user's


def test_verify_touches_nothing(kernel):
    kernel()
    model = nn.Sequential(depthwise(), nn.BatchNorm2d(4), nn.Dropout(0.5), depthwise())
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[3].eval()
    x = image()
    state, given = copy.deepcopy(model.state_dict()), x.clone()
    classes, modes = [type(each) for each in model], [each.training for each in model]
    generators = torch.get_rng_state(), random.getstate()
    report = pyarch.verify(model, x).assert_ok()
    assert torch.equal(torch.get_rng_state(), generators[0]) and random.getstate() == generators[1]
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    assert [type(each) for each in model] == classes and [each.training for each in model] == modes
    assert (
        torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight)) and model[3].weight.grad is None
    )
    assert torch.equal(x, given) and not x.requires_grad and model[2].p == 0.5
    assert "dropout set to 0 in 2" in report.notes
    assert set(report.timing) == {"forward", "step"}
    assert all(each.stock > 0 and each.swapped > 0 for each in report.timing.values())


def test_verify_leaves_a_swapped_model_swapped(kernel):
    kernel()
    model = net()
    pyarch.swap(model, where=lambda name, layer: name == "3")
    report = verified(model, image()).assert_ok()
    assert [layer.name for layer in report.layers] == ["3"] and not report.notes
    assert type(model[3]) is pyarch.nn.Conv2d and type(model[0]) is nn.Conv2d


@pytest.mark.parametrize(
    "wrap",
    [torch.nn.utils.weight_norm, torch.nn.utils.parametrizations.weight_norm, torch.nn.utils.spectral_norm],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_verify_copies_reparametrized_layers(kernel, wrap):
    kernel()
    model = nn.Sequential(wrap(depthwise()), nn.ReLU())
    model(image())
    verified(model, image()).assert_ok()


def test_verify_works_without_grad_mode_around_it(kernel):
    kernel()
    with torch.no_grad():
        assert verified(net(), image()).assert_ok().gradients


def test_verify_under_autocast(kernel):
    kernel()
    with torch.autocast("cpu", torch.bfloat16):
        report = verified(net(), image()).assert_ok()
    assert max(each.error for each in report.outputs) > 1e-4


def test_verify_the_inside_of_a_compiled_model(kernel):
    kernel()
    report = verified(torch.compile(net(), backend="eager"), image()).assert_ok()
    assert any("torch.compile" in note for note in report.notes)


def test_verify_a_class_derived_from_a_drop_in_runs_stock_beside_it(kernel):
    class Mine(pyarch.nn.Conv2d):
        pass

    kernel(forward=lambda output: output * 1.001)
    assert not verified(nn.Sequential(depthwise(cls=Mine)), image()).ok


def test_verify_says_which_copy_failed():
    class Stubborn(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = depthwise()

        def forward(self, x):
            return self.layer(x.float())

    with pytest.raises(RuntimeError) as raised:
        verified(Stubborn(), image())
    assert "copy of the model in torch.float64" in raised.value.__notes__[0]


@pytest.mark.parametrize("kind", [RuntimeError, KeyError])
def test_verify_says_when_only_the_swapped_copy_failed(kernel, kind):
    def failing(output):
        raise kind("out of kernels")

    kernel(forward=failing)
    with pytest.raises(kind, match="out of kernels") as raised:
        verified(net(), image())
    assert raised.value.__notes__ == ["raised by the swapped copy of the model; torch's own ran"]


# -------------------------------------------------------------------------------- the report


def test_verify_says_when_only_a_swapped_layer_by_itself_failed(kernel):
    calls = []

    def failing_later(output):
        calls.append(output)
        if len(calls) > 1:
            raise KeyError("out of kernels")
        return output

    kernel(forward=failing_later)
    with pytest.raises(KeyError, match="out of kernels") as raised:
        verified(nn.Sequential(depthwise()), image())
    assert raised.value.__notes__ == ["raised by the swapped copy of the layer '0'; torch's own ran"]


def test_verify_report_as_table_and_json(kernel):
    kernel()
    report = pyarch.verify(net(), image())
    assert str(report).startswith("verification (float32) ok") and "step: " in str(report)
    document = json.loads(report.to_json())
    assert document["schema"] == "pyarch.verify/1" and document["ok"] is True
    assert document["layers"][0]["gradients"][0].keys() == {
        "name",
        "error",
        "stock_error",
        "allowed",
        "nan",
        "left_out",
        "is_hollow",
    }


def test_tolerance_noise_stands_in_for_a_lucky_error():
    number = torch.tensor([4.0], dtype=torch.float64)
    strict = allowed(0.0, number, torch.float32)
    assert strict == 2 * torch.finfo(torch.float32).eps * 4
    assert allowed(0.0, number, torch.float32, noise=1e-3) == pytest.approx(strict + 2 * 1e-3 * 4)
    assert allowed(1e-2, number, torch.float32, noise=1e-3) == pytest.approx(strict + 2e-2)


@pytest.mark.parametrize("layer", [depthwise, lambda: depthwise(cls=nn.Conv1d)], ids=["conv2d", "conv1d"])
@pytest.mark.operator("conv", "cpu")
def test_verify_the_cpu_kernels(layer):
    refusal = native.serving()[1]
    if refusal:
        pytest.skip(refusal)
    module = layer()
    x = torch.randn(2, 4, *[33] * (module.weight.dim() - 2))
    report = verified(module, x).assert_ok()
    assert (report.layers[0].forward, report.layers[0].backward) == ("cpu", "cpu")
