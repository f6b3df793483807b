"""What pyarch.ops.scaled_dot_product_attention returns: weights, lse, gradients, their layouts."""

from __future__ import annotations

import itertools

import pytest
import torch

import pyarch
from tests.attention_cases import (
    Case,
    cases,
    each_dtype,
    features_first,
    heads_last,
    misaligned,
    one_head_for_all,
    rows_reversed,
    sliced,
    table,
)
from tests.attention_definition import (
    GRADIENTS,
    answers_to,
    composed,
    hold,
    visible_of,
    with_gradients,
)
from tests.attention_functions import arguments_of, close, drawn, each_backend, ours, outcome, ran, stock

OPERATOR = "attention"


# ------------------------------------------------------------------------------------ weights and lse

SHOWN = table(
    Case(33, 35),
    Case(33, 35, causal=True, heads=4, kv_heads=2, layout=heads_last),
    Case(33, 35, mask="bqk", lost=True, bias="hqk", sinks=True),
    Case(33, 35, softcap=3.0, left=4, right=2, bias="bk"),
    Case(5, 7, dropout=1.0),
)


@pytest.mark.parametrize("kind", ["mean", "heads"])
@cases(SHOWN)
@each_backend
def test_attention_weights_and_their_gradients(backend, case, kind):
    """Gradients of out, weights and lse at once, each reaching query, key, bias and sinks."""
    operands = case.operands(torch.float32)
    generator = torch.Generator().manual_seed(9)
    shape = visible_of(operands).shape
    shape = shape if kind == "heads" else (shape[0], *shape[2:])
    of_weights = torch.randn(shape, generator=generator)
    of_lse = torch.randn(case.batch, case.heads, case.queries, generator=generator)

    def by_function(given):
        tensors, options = arguments_of(given)
        out, weights, lse = ours(*tensors, **options, return_weights=kind, return_lse=True)
        assert weights.shape == shape and lse.dtype == torch.float32
        return gathered(out, weights, lse)

    def by_definition(given):
        result = composed(given)
        weights = result.probabilities * result.passed
        return gathered(result.out, weights if kind == "heads" else weights.mean(1), result.lse)

    def gathered(out, weights, lse):
        seen = lse.isfinite()
        return out, (weights * of_weights).sum() + lse.masked_fill(~seen, 0).mul(of_lse).sum()

    operands = operands._replace(grad_lse=torch.ones(()))
    with pyarch.backend(backend):
        results = with_gradients(operands, by_function)
    stock_, truth = (
        with_gradients(each, by_definition) for each in (operands, operands.as_dtype(torch.float64))
    )
    assert results["grad query"].any() or case.dropout == 1
    for name in ("out", *GRADIENTS):
        if truth[name] is not None:
            torch.testing.assert_close(results[name].double(), truth[name], rtol=1e-4, atol=2e-5)
            assert results[name].dtype == stock_[name].dtype


@each_backend
def test_attention_returns_what_is_asked_for(backend):
    tensors = drawn()
    with pyarch.backend(backend):
        out = ours(*tensors)
        for kind, shape in (("mean", (2, 9, 11)), ("heads", (2, 3, 9, 11))):
            found, weights = ours(*tensors, return_weights=kind)
            assert torch.equal(found, out) and weights.shape == shape
            close(weights.sum(-1), torch.ones(shape[:-1]))
            assert [type(each) for each in ours(*tensors, return_weights=kind, return_lse=True)] == [
                torch.Tensor
            ] * 3
        found, lse = ours(*tensors, return_lse=True)
    assert torch.equal(found, out)
    close(lse, (tensors[0] @ tensors[1].mT * 8**-0.5).logsumexp(-1))


@each_backend
@pytest.mark.parametrize(
    ("leading", "mean", "heads", "lse"),
    [
        ((), (9, 11), (9, 11), (9,)),
        ((2,), (2, 9, 11), (2, 9, 11), (2, 9)),
        ((2, 3), (2, 9, 11), (2, 3, 9, 11), (2, 3, 9)),
        ((2, 2, 3), (2, 2, 9, 11), (2, 2, 3, 9, 11), (2, 2, 3, 9)),
    ],
)
def test_attention_weights_of_every_rank(backend, leading, mean, heads, lse):
    query, key = torch.randn(*leading, 9, 8), torch.randn(*leading, 11, 8)
    with pyarch.backend(backend):
        found = ours(query, key, key, return_weights="mean", return_lse=True)
        assert [each.shape for each in found] == [query.shape, mean, lse]
        assert ours(query, key, key, return_weights="heads")[1].shape == heads


@pytest.mark.parametrize("kind", ["mean", "heads"])
@each_backend
def test_attention_weights_are_after_dropout(backend, kind):
    """What the values are weighed with: out = weights @ value holds with dropout too."""
    query, key, value = drawn(33, 35, heads=1)
    with pyarch.backend(backend):
        out, weights = ours(query, key, value, dropout_p=0.4, return_weights=kind)
    assert (weights == 0).double().mean() > 0.3
    close(weights.view(2, 1, 33, 35) @ value, out)


# ------------------------------------------------------------------------------------ layouts and strides

LAYOUTS = [heads_last, features_first, sliced, misaligned, one_head_for_all, rows_reversed]


def named(layout):
    return layout.__name__


@each_dtype
@each_backend
@pytest.mark.parametrize("layout", LAYOUTS, ids=named)
def test_attention_output_strides_are_torchs(backend, layout, dtype):
    for queries, heads in itertools.product((1, 9), (1, 3)):
        tensors = [layout(each) for each in drawn(queries, heads=heads, dtype=dtype)]
        with pyarch.backend(backend):
            assert ours(*tensors).stride() == stock(*tensors).stride(), (queries, heads)


@each_backend
@pytest.mark.parametrize("layout", [torch.clone, heads_last, features_first], ids=named)
def test_attention_accumulated_gradients_are_laid_out_as_torchs(backend, layout):
    strides = []
    for function, engine in ((ours, backend), (stock, "auto")):
        leaves = [layout(each).requires_grad_() for each in drawn()]
        with pyarch.backend(engine):
            function(*leaves).square().sum().backward()
        strides.append([each.grad.stride() for each in leaves])
    assert strides[0] == strides[1]


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS, ids=named)
def test_attention_layouts_of_inputs_and_of_the_gradient(backend, layout):
    tensors, cotangent = [layout(each) for each in drawn()], layout(torch.randn(2, 3, 9, 8))
    expected = outcome(stock, [each.contiguous() for each in tensors], cotangent.contiguous())
    with pyarch.backend(backend):
        close(outcome(ours, tensors, cotangent), expected)


@each_backend
def test_attention_sum_backward(backend):
    """The gradient of a sum is one number expanded over every stride."""
    gradients = []
    tensors = drawn()
    for function, engine in ((ours, backend), (stock, "auto")):
        leaves = [each.clone().requires_grad_() for each in tensors]
        with pyarch.backend(engine):
            function(*leaves, is_causal=True).sum().backward()
        gradients.append([each.grad for each in leaves])
    assert gradients[1][2].any()
    close(*gradients)


@each_backend
def test_attention_one_tensor_three_times(backend):
    """Self-attention on one tensor adds up its three gradients; so do views of one projection."""
    x, packed = torch.randn(2, 3, 9, 8), torch.randn(2, 9, 3, 3, 8)

    def unpacked(function):
        return lambda packed: function(*packed.permute(2, 0, 3, 1, 4).unbind(0))

    for run in (lambda function: lambda x: function(x, x, x), unpacked):
        tensor = packed if run is unpacked else x
        expected = outcome(run(stock), [tensor])
        with pyarch.backend(backend):
            close(outcome(run(ours), [tensor]), expected)


# ------------------------------------------------------------------------------------ which gradients


@each_backend
@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=4))[1:], ids=str)
def test_attention_only_some_inputs_need_gradients(backend, needed):
    tensors = [*drawn(), torch.randn(3, 9, 11)]
    gradients = []
    for function, engine in ((ours, backend), (stock, "auto")):
        leaves = [each.clone().requires_grad_(need) for each, need in zip(tensors, needed, strict=True)]
        with pyarch.backend(engine):
            function(*leaves).square().sum().backward()
        gradients.append([each.grad for each in leaves])
    for mine, theirs, need in zip(*gradients, needed, strict=True):
        assert (mine is not None) == (theirs is not None) == need
        if need:
            close(mine, theirs)


@each_backend
def test_attention_without_a_gradient_runs_no_backward(backend):
    tensors = drawn()
    out, seen = ran(backend, lambda: ours(*tensors))
    assert not out.requires_grad and seen == [("attention_forward", backend)]
    leaves = [each.requires_grad_() for each in tensors]
    with pyarch.backend(backend), torch.no_grad():
        assert not ours(*leaves).requires_grad
    with pyarch.backend(backend), torch.inference_mode():
        assert ours(*leaves).is_inference()


@each_backend
@pytest.mark.parametrize("used", ["out", "lse", "both"])
def test_attention_lse_may_go_unused(backend, used):
    """Whichever result the loss reads, the gradients are those of the definition."""
    operands = Case(33, 35, causal=True, lse_grad=True).operands(torch.float32)
    if used == "out":
        operands = operands._replace(grad_lse=None)
    if used == "lse":
        operands = operands._replace(grad_out=torch.zeros_like(operands.grad_out))
    leaves = [each.detach().requires_grad_() for each in operands[:3]]
    with pyarch.backend(backend):
        out, lse = ours(*leaves, is_causal=True, return_lse=True)
        results, grads = [out, lse], [operands.grad_out, operands.grad_lse]
        if used == "out":
            results, grads = results[:1], grads[:1]
        if used == "lse":
            results, grads = results[1:], grads[1:]
        found = torch.autograd.grad(results, leaves, grads, allow_unused=True)
    expected = answers_to(operands)
    hold({name: each for name, each in zip(GRADIENTS, found, strict=False) if each is not None}, expected)
    assert found[0].any() and found[1].any() and (found[2] is None or used == "lse" or found[2].any())


# ------------------------------------------------------------------------------------ steadiness


@each_dtype
@each_backend
def test_attention_is_bitwise_repeatable(backend, dtype):
    tensors = [*drawn(70, 90, dtype=dtype), torch.randn(3, 70, 90).to(dtype)]
    with pyarch.backend(backend):
        once, again = (outcome(lambda *given: ours(*given, is_causal=True), tensors) for _ in range(2))
    assert all(torch.equal(first, second) for first, second in zip(once, again, strict=True))


@each_dtype
@each_backend
def test_attention_does_not_depend_on_its_neighbours(backend, dtype):
    """A sample alone gives what it gives in a batch: padded batches and single requests agree."""
    tensors = drawn(33, 35, batch=3, dtype=dtype)
    with pyarch.backend(backend):
        together, alone = ours(*tensors), ours(*(each[1:2] for each in tensors))
    torch.testing.assert_close(together[1:2], alone)
