"""pyarch.nn's recurrent layers and cells are torch's modules: weights, copies, files, training, TorchScript.

What they compute, take and refuse is proven in test_recurrent_semantics.py, _packed.py and _arguments.py.
"""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import pyarch
from pyarch import native
from pyarch.nn.config import Config
from pyarch.nn.drop_in import CONFIG_ATTRIBUTE
from tests.swap_cases import operators_of

OPERATOR = "recurrent"
LAYERS = ("RNN", "LSTM", "GRU")
CELLS = ("RNNCell", "LSTMCell", "GRUCell")
FORWARD = "recurrent_forward"
each_backend = pytest.mark.parametrize("backend", ["cpu", "reference"])
each_layer = pytest.mark.parametrize("name", LAYERS)
each_class = pytest.mark.parametrize("name", [*LAYERS, *CELLS])


@pytest.fixture(autouse=True)
def the_backend_runs_here(request):
    """Skip, quoting the refusal, where the asked backend cannot run on this machine."""
    name = getattr(request.node, "callspec", None) and request.node.callspec.params.get("backend")
    if name == "cpu" and (problem := native.serving()[1]):
        pytest.skip(problem)


def pair(name, **settings):
    """A stock layer and ours with the same numbers: two layers of two directions, or a cell."""
    if name in LAYERS:
        settings = {"num_layers": 2, "bidirectional": True, **settings}
    stock = getattr(nn, name)(3, 5, **settings)
    ours = getattr(pyarch.nn, name)(3, 5, **settings)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def data(name, dtype=torch.float32):
    """An input: four steps of two, or one step of two."""
    return torch.randn((4, 2, 3) if name in LAYERS else (2, 3), dtype=dtype)


def tensors_of(value):
    """The floating tensors that a layer gave, in order."""
    if isinstance(value, PackedSequence):
        return [value.data]
    if isinstance(value, torch.Tensor):
        return [value]
    return [each for part in value for each in tensors_of(part)]


def outcome(layer, *inputs):
    """Outputs and gradients by name; the inputs' gradients too."""
    layer.zero_grad()
    inputs = [each.detach().clone().requires_grad_() for each in inputs]
    outputs = tensors_of(layer(*inputs))
    sum((each * torch.linspace(-1, 1, each.numel()).view_as(each)).sum() for each in outputs).backward()
    results = {f"output {index}": each.detach() for index, each in enumerate(outputs)}
    results |= {f"input {index}": each.grad for index, each in enumerate(inputs)}
    return results | {name: each.grad for name, each in layer.named_parameters()}


def assert_same(ours, stock):
    """Equal but for rounding, which test_recurrent_semantics.py holds to the tolerance rule."""
    assert ours.keys() == stock.keys()
    for name, wanted in stock.items():
        torch.testing.assert_close(
            ours[name], wanted, rtol=1e-4, atol=3e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


# ------------------------------------------------------------------------------------ who answers a call


@each_layer
def test_recurrent_modules_good_calls_reach_our_operator_once_a_layer(name):
    _, ours = pair(name)
    x = data(name)
    for input in (x, x[0], pack_padded_sequence(x, [2, 4], enforce_sorted=False)):
        assert [each for each, _ in operators_of(ours, input)] == [FORWARD] * 2
    h0 = torch.randn(4, 2, 5)
    assert len(operators_of(ours, x, [h0, h0] if name == "LSTM" else h0)) == 2
    assert len(operators_of(pair(name, batch_first=True)[1], x)) == 2


@pytest.mark.parametrize("name", CELLS)
def test_recurrent_modules_good_steps_reach_our_operator(name):
    _, ours = pair(name)
    x, h0 = data(name), torch.randn(2, 5)
    for given in ((x,), (x[0],), (x, (h0, h0) if name == "LSTMCell" else h0)):
        assert [each for each, _ in operators_of(ours, *given)] == [FORWARD]


@each_class
def test_recurrent_modules_in_float64_never_ask_dispatch(name):
    stock, ours = (each.double() for each in pair(name))
    x = data(name, torch.float64)
    assert operators_of(ours, x) == []
    assert_same(outcome(ours, x), outcome(stock, x))


@each_class
def test_recurrent_modules_on_meta_tensors_give_shapes(name):
    stock, ours = (getattr(library, name)(3, 5, device="meta") for library in (nn, pyarch.nn))
    x = data(name).to("meta")
    for mine, theirs in zip(tensors_of(ours(x)), tensors_of(stock(x)), strict=True):
        assert mine.is_meta and (mine.shape, mine.stride()) == (theirs.shape, theirs.stride())


@each_class
def test_recurrent_modules_config_names_the_backend(name):
    _, ours = pair(name)
    named = copy.deepcopy(ours)
    vars(named)[CONFIG_ATTRIBUTE] = Config(backend="reference")
    assert {backend for _, backend in operators_of(named, data(name))} == {"reference"}
    with pyarch.backend("torch"):
        assert {backend for _, backend in operators_of(named, data(name))} <= {"torch"}


def saved_bytes(layer, x):
    """What a forward keeps for its backward, the layer's own tensors and its input left out."""
    kept = {}
    own = {each.data_ptr() for each in (*layer.parameters(), x)}

    def pack(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = layer(x)[0]
    output.sum().backward()
    return sum(kept.values())


@each_backend
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_recurrent_modules_recompute_keeps_less_and_computes_the_same(backend, name):
    stock, plain = pair(name)
    frugal = copy.deepcopy(stock)
    pyarch.swap(frugal, rules={"": Config(backend=backend, recompute=True)})
    x = torch.randn(40, 3, 3)
    with pyarch.backend(backend):
        assert 2 * saved_bytes(frugal, x) < saved_bytes(plain, x)
        assert_same(outcome(frugal, x), outcome(stock, x))


# ------------------------------------------------------------------------------------ dropout


@each_backend
@each_layer
def test_recurrent_modules_drop_what_torch_drops(backend, name):
    """Between layers and only in training, the same elements from the same random numbers."""
    stock, ours = pair(name, num_layers=3, dropout=0.5)
    x, results, states = data(name), [], []
    for layer in (ours, stock):
        torch.manual_seed(3)
        with pyarch.backend(backend):
            results.append(outcome(layer, x))
        states.append(torch.get_rng_state())
    assert_same(*results)
    assert torch.equal(*states), "another count of random numbers was drawn"
    with pyarch.backend(backend):
        assert not torch.allclose(outcome(ours, x)["output 0"], results[0]["output 0"])
        assert_same(outcome(ours.eval(), x), outcome(stock.eval(), x))


@each_backend
def test_recurrent_modules_drop_from_packed_data_too(backend):
    stock, ours = pair("LSTM", dropout=0.5)
    sequence, results = pack_padded_sequence(data("LSTM"), [2, 4], enforce_sorted=False), []
    for layer in (ours, stock):
        torch.manual_seed(3)
        with pyarch.backend(backend):
            results.append(layer(sequence)[0].data)
    torch.testing.assert_close(*results)


# ------------------------------------------------------------------------------------ weights rewritten


def hidden_weight(layer):
    return "weight_hh" if isinstance(layer, nn.RNNCellBase) else "weight_hh_l0"


def parametrized(layer):
    return parametrize.register_parametrization(layer, hidden_weight(layer), nn.Softplus())


REWRITES = {
    "weight_norm": lambda layer: parametrizations.weight_norm(layer, hidden_weight(layer)),
    "weight_norm of old": lambda layer: weight_norm(layer, hidden_weight(layer)),
    "spectral_norm": lambda layer: parametrizations.spectral_norm(layer, hidden_weight(layer)),
    "spectral_norm of old": lambda layer: spectral_norm(layer, hidden_weight(layer)),
    "pruning": lambda layer: prune.l1_unstructured(layer, hidden_weight(layer), 0.5),
    "parametrization": parametrized,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("rewrite", REWRITES.values(), ids=REWRITES)
@each_class
def test_recurrent_modules_read_the_weights_at_every_call(name, rewrite):
    """In training mode, where spectral_norm takes one more step of its iteration at every reading."""
    layers = []
    for layer in pair(name):
        torch.manual_seed(0)
        layers.append(rewrite(layer) or layer)
    stock, ours = layers
    before = outcome(ours, x := data(name))
    assert_same(before, outcome(stock, x))
    with torch.no_grad():
        for layer in layers:
            for parameter in layer.parameters():
                parameter.add_(0.25)
    after = outcome(ours, x)
    assert not torch.allclose(after["output 0"], before["output 0"])
    assert_same(after, outcome(stock, x))
    assert operators_of(ours, x), "torch's own forward ran"


@each_class
def test_recurrent_modules_follow_functional_call(name):
    stock, ours = pair(name)
    other = {key: torch.randn_like(value).requires_grad_() for key, value in stock.state_dict().items()}
    x, results = data(name), []
    for layer in (ours, stock):
        outputs = tensors_of(torch.func.functional_call(layer, other, (x,)))
        results.append([*outputs, *torch.autograd.grad(sum(each.sum() for each in outputs), other.values())])
        results[-1].append(tensors_of(layer(x))[0])
    # Parameters of size one instead of 1/sqrt(H): gradients through both layers are ten times as large.
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-4)


@each_class
def test_recurrent_modules_take_new_parameters(name):
    """Set by name, frozen, shared between layers: the next call sees them."""
    x, results = data(name), []
    for layer in pair(name):
        first = next(iter(dict(layer.named_parameters())))
        torch.manual_seed(1)
        setattr(layer, first, nn.Parameter(torch.randn_like(getattr(layer, first)), requires_grad=False))
        if name in LAYERS:
            assert layer._flat_weights[0] is getattr(layer, first)
            layer.weight_hh_l1 = layer.weight_hh_l0
        results.append(outcome(layer, x))
        assert results[-1].pop(first) is None
    assert_same(results[1], results[0])


@each_layer
def test_recurrent_modules_hold_torchs_lists_of_weights(name):
    stock, ours = pair(name)
    for attribute in ("_flat_weights_names", "_all_weights"):
        assert getattr(ours, attribute) == getattr(stock, attribute)
    ours(data(name))
    assert all(held is weight for held, weight in zip(ours._flat_weights, ours.parameters(), strict=True))
    assert [reference() for reference in ours._flat_weight_refs] == ours._flat_weights
    assert sum(map(len, ours.all_weights)) == len(list(ours.parameters()))
    assert ours.flatten_parameters() is None
    ours.to(torch.bfloat16)
    assert {each.dtype for each in ours._flat_weights} == {torch.bfloat16}
    assert ours(data(name, torch.bfloat16))[0].dtype == torch.bfloat16


@each_layer
def test_recurrent_modules_without_a_weight_fail_as_torchs_do(name):
    failures = []
    for layer in pair(name):
        layer.weight_hh_l1 = None
        with pytest.raises((TypeError, RuntimeError)) as raised:
            layer(data(name))
        failures.append((raised.type, str(raised.value)))
    assert failures[1] == failures[0]


@each_layer
def test_recurrent_modules_replicate_for_data_parallel(name):
    """A replica holds plain tensors in the place of parameters, as nn.DataParallel sets them."""
    stock, ours = pair(name)
    replica = ours._replicate_for_data_parallel()
    replica._former_parameters = {}
    for key, value in stock.named_parameters():
        setattr(replica, key, 2 * value)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.mul_(2)
    torch.testing.assert_close(tensors_of(replica(x := data(name))), tensors_of(stock(x)))
    assert all(held is weight for held, weight in zip(ours._flat_weights, ours.parameters(), strict=True))


# ------------------------------------------------------------------------------------ copies and files


@each_class
def test_recurrent_modules_deepcopy_is_ours_and_its_own(name):
    _, ours = pair(name)
    ours(x := data(name))
    duplicate = copy.deepcopy(ours)
    assert type(duplicate) is getattr(pyarch.nn, name)
    assert_same(outcome(duplicate, x), outcome(ours, x))
    with torch.no_grad():
        for parameter in duplicate.parameters():
            parameter.zero_()
    assert not torch.equal(tensors_of(duplicate(x))[0], tensors_of(ours(x))[0])
    assert operators_of(duplicate, x)


@each_class
def test_recurrent_modules_pickle_as_stock(name):
    stock, ours = pair(name)
    text = pickle.dumps(ours)
    assert b"pyarch" not in text
    loaded = pickle.loads(text)
    assert type(loaded) is type(stock)
    assert_same(outcome(loaded, x := data(name)), outcome(stock, x))
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    fresh = pair(name)[1]
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert_same(outcome(fresh, x), outcome(stock, x))
    assert list(ours.state_dict()) == list(stock.state_dict()) and repr(ours) == repr(stock)


@each_layer
def test_recurrent_modules_load_the_state_of_an_old_file(name):
    """Files of torch before 1.8 know no proj_size, and lists of weights that are no names."""
    stock, ours = pair(name)
    old = {key: value for key, value in ours.__getstate__().items() if key != "proj_size"}
    old["_all_weights"] = [[None]]
    layer = object.__new__(type(ours))
    layer.__setstate__(old)
    assert layer.proj_size == 0 and layer._all_weights == stock._all_weights
    assert_same(outcome(layer, x := data(name)), outcome(stock, x))


# ------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW], ids=lambda cls: cls.__name__)
@each_class
@each_backend
def test_recurrent_modules_train_as_stock_does(backend, name, optimizer):
    losses, x = [], data(name)
    for layer in pair(name):
        steps = optimizer(layer.parameters(), lr=0.05)
        with pyarch.backend(backend):
            for _ in range(5):
                steps.zero_grad()
                loss = (tensors_of(layer(x))[0] - 1).square().mean()
                loss.backward()
                steps.step()
                losses.append(loss.detach())
    torch.testing.assert_close(losses[5:], losses[:5])
    assert losses[4] < losses[0]


# ------------------------------------------------------------------------------------ TorchScript


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
@each_class
def test_recurrent_modules_are_traced_as_torchs_own(name):
    """The trace holds torch's operator, so that it loads where pyarch is not installed, and goes to ONNX."""
    stock, ours = pair(name)
    x = data(name)
    traced = torch.jit.trace(ours, (x,))
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert kinds == {node.kind() for node in torch.jit.trace(stock, (x,)).inlined_graph.nodes()}
    again = torch.randn(9, *x.shape[1:])
    torch.testing.assert_close(tensors_of(traced(again)), tensors_of(stock(again)))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*deprecated")
@each_class
def test_recurrent_modules_are_scripted_after_restore(name):
    model = nn.Sequential(pair(name)[0])
    report = pyarch.swap(model)
    with pytest.raises(TypeError, match="restore"):
        torch.jit.script(model)
    assert type(model[0]) is getattr(pyarch.nn, name)
    report.restore()
    torch.testing.assert_close(torch.jit.script(model)(x := data(name)), model(x))
