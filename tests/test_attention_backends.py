"""Every backend of attention that takes CPU tensors, held to float64 by the tolerance rule.

The C++ kernels run once for each instruction set that this CPU has.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.attention_cases import (
    CASES,
    DTYPES,
    EMPTY,
    EVERY_ATTENTION,
    RESIDUES,
    SOME,
    Case,
    answers,
    cases,
    each_dtype,
    every_attention,
    heads_last,
    prove,
    shows_gradients,
    table,
)
from tests.attention_definition import (
    GRADIENTS,
    NEGATIVE_INFINITY,
    Answers,
    absolute_terms,
    answers_to,
    by_definition,
    composed,
    hold,
    kept,
    philox,
    visible_of,
)
from tests.compare import check
from tests.conv_cases import contiguous

OPERATOR = "attention"


# The largest sizes once, in float32: what differs by dtype shows in small ones.
MANY = {
    f"{name}, {dtype}".replace("torch.", ""): (case, dtype)
    for dtype in DTYPES
    for name, case in CASES.items()
    if dtype == torch.float32 or case.queries * case.keys < 30_000
}


@pytest.mark.parametrize(("case", "dtype"), MANY.values(), ids=MANY)
@every_attention
def test_attention_backends_results_and_gradients(backend, case, dtype, monkeypatch):
    backend.serve(monkeypatch)
    prove(backend, case, dtype)


@cases(CASES)
def test_attention_cases_have_gradients(case):
    """What is compared above is not all zero, but for the cases that are about just that."""
    truth = answers(case, torch.float32).truth
    assert any(truth[name].any() for name in GRADIENTS if truth[name] is not None) == shows_gradients(case)


@every_attention
@pytest.mark.parametrize("causal", [False, True], ids=["dense", "causal"])
def test_attention_backends_every_remainder_of_both_lengths(backend, causal, monkeypatch):
    backend.serve(monkeypatch)
    assert {case.queries % 64 for case in RESIDUES} == {case.keys % 64 for case in RESIDUES} == set(range(64))
    for case in RESIDUES:
        prove(backend, replace(case, causal=causal), torch.float32)


@pytest.mark.parametrize("seed", range(3))
@cases(SOME)
@every_attention
def test_attention_backends_other_numbers(backend, case, seed, monkeypatch):
    backend.serve(monkeypatch)
    prove(backend, replace(case, seed=seed + 1), torch.float32)


# ------------------------------------------------------------------------------------ some of the gradients


def some_needs(operands):
    """Each gradient alone, and all but each."""
    possible = operands.needs
    for index in [index for index, is_there in enumerate(possible) if is_there]:
        yield [place == index for place in range(len(possible))]
        yield [is_there and place != index for place, is_there in enumerate(possible)]


@cases(SOME)
@every_attention
def test_attention_backends_only_the_gradients_asked_for(backend, case, monkeypatch):
    backend.serve(monkeypatch)
    operands = case.operands(torch.float32)
    backend.need(operands)
    for needs in some_needs(operands):
        hold(backend.run(operands, needs), answers(case, torch.float32))


LSE = table(
    Case(33, 35, causal=True, lse_grad=True),
    Case(33, 35, value_dim=5, left=3, right=0, heads=4, kv_heads=2, lse_grad=True),
    Case(33, 35, mask="bqk", lost=True, sinks=True, bias="hqk", lse_grad=True),
)


@cases(LSE)
@every_attention
def test_attention_backends_an_unused_lse_has_no_gradient(backend, case, monkeypatch):
    """None and zeros are the same, and differ from a gradient that is used."""
    backend.serve(monkeypatch)
    used = case.operands(torch.float32)
    backend.need(used)
    unused, zeros = used._replace(grad_lse=None), used._replace(grad_lse=torch.zeros_like(used.grad_lse))
    without = backend.run(unused)
    hold(without, answers_to(unused))
    hold(backend.run(zeros), answers_to(unused))
    assert not torch.allclose(without["grad query"], backend.run(used)["grad query"])


@cases(LSE)
@every_attention
def test_attention_backends_gradient_of_lse_alone(backend, case, monkeypatch):
    backend.serve(monkeypatch)
    operands = case.operands(torch.float32)
    backend.need(operands)
    operands = operands._replace(grad_out=torch.zeros_like(operands.grad_out))
    results = backend.run(operands)
    hold(results, answers_to(operands))
    assert results["grad key"].any() and not results["grad value"].any()


# ------------------------------------------------------------------------------------ blind queries


LOST = table(
    Case(33, 35, mask="qk", lost=True),
    Case(33, 35, mask="bhqk", lost=True, causal=True, heads=4, kv_heads=2, value_dim=5),
    Case(33, 35, padding=True, lost=True, bias="hqk", lse_grad=True),
    Case(33, 35, padding=True, lost=True, mask="bqk", left=3, right=0, layout=heads_last),
    Case(33, 35, mask="qk", lost=True, sinks=True, lse_grad=True),
    Case(33, 20, left=3, right=0, offset=4, causal=True),
    Case(20, 33, causal=True, offset=-6),
    Case(5, 0, sinks=True, lse_grad=True),
    Case(5, 0),
)


@each_dtype
@cases(LOST)
@every_attention
def test_attention_backends_a_query_that_sees_nothing_is_zero(backend, case, dtype, monkeypatch):
    """Zeros, not small numbers: output and every gradient; lse is -inf, with sinks the sink."""
    backend.serve(monkeypatch)
    operands = case.operands(dtype)
    backend.need(operands)
    results = backend.run(operands)
    visible = visible_of(operands)
    lost = ~visible.any(-1)
    assert lost.any() and (lost.all() or not case.keys or not lost.all())
    assert not results["out"][lost].any() and not results["grad query"][lost].any()
    sinks = operands.extras.sinks
    expected = torch.full(lost.shape, NEGATIVE_INFINITY)
    if sinks is not None:
        expected = sinks.float()[:, None].expand(lost.shape)
    torch.testing.assert_close(results["lse"][lost], expected[lost])
    group = case.heads // (case.kv_heads or case.heads)
    unseen = ~visible.any(-2).unflatten(1, (-1, group)).any(2)
    assert not results["grad key"][unseen].any() and not results["grad value"][unseen].any()
    if operands.extras.bias is not None:
        hidden = ~visible.any(0, keepdim=True)
        assert not results["grad bias"][hidden].any()
    hold(results, answers(case, dtype))


@each_dtype
@every_attention
def test_attention_backends_a_bias_of_minus_infinity_hides(backend, dtype, monkeypatch):
    """Some keys of every query, and every key of two; the gradient of such a bias is zero."""
    backend.serve(monkeypatch)
    case = Case(33, 35, bias="bhqk")
    operands = case.operands(dtype)
    backend.need(operands)
    operands.extras.bias[..., 3:20:4] = NEGATIVE_INFINITY
    operands.extras.bias[:, :, [2, 32]] = NEGATIVE_INFINITY
    results = backend.run(operands)
    hold(results, answers_to(operands))
    assert not results["out"][:, :, [2, 32]].any() and not results["grad query"][:, :, [2, 32]].any()
    assert (results["lse"][:, :, [2, 32]] == NEGATIVE_INFINITY).all()
    assert not results["grad bias"][operands.extras.bias == NEGATIVE_INFINITY].any()


@every_attention
def test_attention_backends_everything_hidden(backend, monkeypatch):
    backend.serve(monkeypatch)
    operands = Case(33, 35, mask="bhqk", bias="hqk").operands(torch.float32)
    operands.extras.mask.fill_(False)
    backend.need(operands)
    results = backend.run(operands)
    assert not any(results[name].any() for name in ("out", *GRADIENTS[:4]))
    assert (results["lse"] == NEGATIVE_INFINITY).all()


@each_dtype
@every_attention
def test_attention_backends_everything_hidden_after_other_work(backend, dtype, monkeypatch):
    """Memory that an earlier call left behind has no say in blocks of keys that a strip does not see."""
    backend.serve(monkeypatch)
    hidden = Case(39, 39, heads=9, kv_heads=3, dim=64, mask="bqk").operands(dtype)
    hidden.extras.mask.fill_(False)
    backend.need(hidden)
    before = Case(39, 39, heads=9, kv_heads=3, dim=64).operands(dtype)
    before.value[:] = float("nan")
    for _ in range(3):
        backend.run(before)
        results = backend.run(hidden)
        assert not any(results[name].any() for name in GRADIENTS[:3])


# ------------------------------------------------------------------------------------ NaN and infinity

HIDING = table(
    Case(33, 70, padding=True),
    Case(33, 70, mask="k", heads=4, kv_heads=2, value_dim=5),
    Case(33, 70, mask="bhqk", lost=True),
    Case(33, 70, causal=True),
    Case(33, 70, left=5, right=5, offset=10),
    Case(70, 70, left=0, right=0, dilation=2, padding=True, bias="hqk", sinks=True, softcap=3.0),
    Case(33, 70, padding=True, lost=True, dropout=0.3),
    Case(33, 70, padding=True, lost=True, global_tokens=1, left=3, right=3, layout=heads_last),
)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@each_dtype
@cases(HIDING)
@every_attention
def test_attention_backends_what_nobody_sees_does_not_leak(backend, case, dtype, value, monkeypatch):
    """Neither keys and values that no query of their heads sees, nor queries that see nothing."""
    backend.serve(monkeypatch)
    operands = case.operands(dtype)
    backend.need(operands)
    visible = visible_of(operands)
    unseen = ~visible.any(-2).unflatten(1, (operands.key.shape[1], -1)).any(2)
    lost = ~visible.any(-1)
    assert unseen.any() or lost.any()
    query, key, value_ = (each.clone() for each in operands[:3])
    query[lost], key[unseen], value_[unseen] = value, value, value
    spoiled = operands._replace(query=query, key=key, value=value_)
    results = backend.run(spoiled)
    hold(results, answers(case, dtype))
    for name, hidden in (("grad query", lost), ("grad key", unseen), ("grad value", unseen)):
        assert not results[name][hidden].any(), name


@each_dtype
@cases(SOME)
@every_attention
def test_attention_backends_nan_stays_in_its_head(backend, case, dtype, monkeypatch):
    """NaN in a key that is seen reaches what reads it, and nothing of another sample or group of heads."""
    backend.serve(monkeypatch)
    operands = case.operands(dtype)
    backend.need(operands)
    clean = backend.run(operands)
    operands.key[0, 0, 0] = float("nan")
    results = backend.run(operands)
    group = case.heads // (case.kv_heads or case.heads)
    seen = visible_of(operands)[0, :group, :, 0]
    assert seen.any() and results["out"][0, :group][seen].isnan().all()
    for name in ("out", "lse", *GRADIENTS[:3]):
        other = results[name].clone(), clean[name].clone()
        for each in other:
            each[0, : group if each.shape[1] == case.heads else 1] = 0
        assert torch.equal(*other), name


@cases(SOME)
@every_attention
def test_attention_backends_nan_of_a_gradient_stays_in_its_head(backend, case, monkeypatch):
    backend.serve(monkeypatch)
    operands = case.operands(torch.float32)
    backend.need(operands)
    grad_out = operands.grad_out.clone()
    grad_out[0, 0, 0] = float("nan")
    results = backend.run(operands._replace(grad_out=grad_out))
    assert results["grad query"][0, 0, 0].isnan().any()
    assert not results["grad query"][0, 0, 1:].isnan().any()
    for name in GRADIENTS[:3]:
        results[name][0, 0] = 0
        assert not results[name].isnan().any(), name


# ------------------------------------------------------------------------------------ dropout


def test_attention_dropout_random_words_are_philoxs():
    """The vectors that Random123, the authors' own library, ships for philox4x32-10."""
    ones = 0xFFFFFFFF
    known = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, (ones,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, key, words in known:
        assert tuple(int(each) for each in philox([torch.tensor(each) for each in counter], key)) == words


DROPPED = table(
    *(Case(33, 70, dropout=p, seed=seed) for p, seed in ((0.1, 0), (0.5, 1), (0.9, 2), (1e-3, 3))),
    Case(33, 70, dropout=0.5, heads=4, kv_heads=2, left=8, right=3),
    Case(9, 10, batch=3, heads=5, dropout=0.5, mask="bqk"),
)


@each_dtype
@cases(DROPPED)
@every_attention
def test_attention_backends_dropout_follows_one_stream(backend, case, dtype, monkeypatch):
    """What is dropped is the same on every backend and in forward, weights and both sides of the backward."""
    backend.serve(monkeypatch)
    operands = case.operands(dtype)
    backend.need(operands, "forward", "backward", "weights")
    keep = kept(visible_of(operands).shape, case.dropout, int(operands.extras.seed)) & visible_of(operands)
    assert abs(keep.sum() / visible_of(operands).sum() - (1 - case.dropout)) < 0.1
    out, lse = backend.forward(operands)
    assert torch.equal(backend.weights(operands, lse, False) != 0, keep)
    # Through an identity as the value the output is the dropped probabilities themselves.
    group = case.heads // operands.key.shape[1]
    eye = torch.eye(case.keys, dtype=dtype).expand(case.batch, case.heads // group, -1, -1)
    shown = operands._replace(value=eye, grad_out=torch.ones(case.batch, case.heads, case.queries, case.keys))
    shown = shown._replace(grad_out=shown.grad_out.to(dtype))
    results = backend.run(shown)
    assert torch.equal(results["out"] != 0, keep)
    of_values = results["grad value"][..., 0].unflatten(1, (-1, 1)) != 0
    assert torch.equal(of_values.squeeze(2), keep.any(2).unflatten(1, (-1, group)).any(2))


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63), 2**32 + 5])
@every_attention
def test_attention_backends_dropout_takes_any_seed(backend, seed, monkeypatch):
    """Both halves of the seed are read: 2 ** 32 + 5 is not 5."""
    backend.serve(monkeypatch)
    operands = Case(20, 33, dropout=0.4).operands(torch.float32)
    operands = operands._replace(extras=operands.extras._replace(seed=torch.tensor(seed)))
    backend.need(operands, "forward", "weights")
    _, lse = backend.forward(operands)
    shape = visible_of(operands).shape
    assert torch.equal(backend.weights(operands, lse, False) != 0, kept(shape, 0.4, seed))
    assert not torch.equal(kept(shape, 0.4, seed), kept(shape, 0.4, 5))


@every_attention
def test_attention_backends_dropout_leaves_lse_alone(backend, monkeypatch):
    backend.serve(monkeypatch)
    dropped, whole = (Case(20, 33, dropout=p).operands(torch.float32) for p in (0.4, 0.0))
    backend.need(dropped)
    assert torch.equal(backend.forward(dropped)[1], backend.forward(whole)[1])


@each_dtype
@every_attention
def test_attention_backends_dropout_of_everything_is_zero(backend, dtype, monkeypatch):
    """Also where a value is infinite: nothing is left to multiply it."""
    backend.serve(monkeypatch)
    operands = Case(20, 33, dropout=1.0, bias="hqk").operands(dtype)
    operands.value[0, 0, 0, 0] = float("inf")
    backend.need(operands)
    results = backend.run(operands)
    assert not any(results[name].any() for name in ("out", *GRADIENTS[:4]))
    assert results["lse"].isfinite().all()


# ------------------------------------------------------------------------------------ weights

WEIGHED = table(
    Case(33, 70),
    Case(33, 70, heads=4, kv_heads=2, causal=True, layout=heads_last),
    Case(33, 70, mask="bqk", lost=True, bias="hqk", padding=True, left=9, right=3),
    Case(70, 33, sinks=True, softcap=4.0),
    Case(33, 35, dropout=0.3),
    Case(5, 7, dropout=1.0),
    Case(5, 7, factor=1e4),
    Case(70, 70, left=3, right=0, dilation=2, global_tokens=2, heads=3),
    Case(70, 33, distance="h", heads=4, kv_heads=2, causal=True),
    Case(33, 70, distance="b", bias="hqk", dropout=0.3),
    *EMPTY.values(),
)


@pytest.mark.parametrize("mean", [False, True], ids=["heads", "mean"])
@each_dtype
@cases(WEIGHED)
@every_attention
def test_attention_backends_weights(backend, case, dtype, mean, monkeypatch):
    backend.serve(monkeypatch)
    operands = case.operands(dtype)
    backend.need(operands, "forward", "weights")
    found = backend.weights(operands, backend.forward(operands)[1], mean)
    assert found.is_contiguous()
    wide = operands.as_dtype(torch.float64)
    exact, near = (dropped(each, mean) for each in (wide, operands.as_dtype(torch.float32)))
    noise = torch.finfo(torch.float32).eps * absolute_terms(wide)[1]
    check("weights", found, near.to(dtype), exact, noise=noise)


def dropped(operands, mean):
    """The probabilities after dropout, by definition."""
    result = composed(operands)
    found = result.probabilities * result.passed
    return found.mean(1) if mean else found


# ------------------------------------------------------------------------------------ layouts and sizes


@cases(table(*(Case(9, 11, heads=3, layout=layout) for layout in (contiguous, heads_last))))
@every_attention
def test_attention_backends_gradients_are_laid_out_as_their_tensors(backend, case, monkeypatch):
    backend.serve(monkeypatch)
    operands = case.operands(torch.float32)
    backend.need(operands)
    results = backend.run(operands)
    assert results["out"].stride() == operands.query.stride()
    for name, each in zip(GRADIENTS[:3], operands.differentiable, strict=False):
        assert results[name].stride() == each.stride(), name


@each_dtype
@every_attention
def test_attention_backends_inputs_are_left_alone(backend, dtype, monkeypatch):
    backend.serve(monkeypatch)
    for case in SOME.values():
        operands, untouched = case.operands(dtype), case.operands(dtype)
        if not backend_refuses(backend, operands):
            backend.run(operands)
            for mine, before in zip(tensors_of(operands), tensors_of(untouched), strict=True):
                assert torch.equal(mine, before)


def backend_refuses(backend, operands):
    try:
        backend.need(operands)
    except pytest.skip.Exception:
        return True
    return False


def tensors_of(operands):
    flat = *operands[:3], *operands.extras, *operands[5:]
    return [each for each in flat if each is not None]


@pytest.mark.unpoisoned
@every_attention
def test_attention_backends_offsets_beyond_32_bits(backend, monkeypatch):
    """The third sample begins more than 2 ** 31 elements after the first; the gap is never touched.

    In 16 bits, so that the address space of a small machine holds it.
    """
    backend.serve(monkeypatch)
    dtype = torch.bfloat16
    case = Case(9, 11, batch=3, causal=True, bias="bhqk")
    operands = case.operands(dtype)
    backend.need(operands)
    step = 2**30 + 4096

    def apart(tensor):
        _, *inner = tensor.contiguous().stride()
        far = torch.empty(2 * step + tensor[0].numel(), dtype=tensor.dtype)
        return far.as_strided(tensor.shape, (step, *inner)).copy_(tensor)

    far = operands._replace(
        query=apart(operands.query),
        key=apart(operands.key),
        value=apart(operands.value),
        grad_out=apart(operands.grad_out),
        extras=operands.extras._replace(bias=apart(operands.extras.bias)),
    )
    assert far.query.stride(0) * 2 > 2**31
    results = dict(zip(("out", "lse"), backend.forward(far), strict=True))
    hold(results | gradients_of(backend, far, results), answers(case, dtype))


def gradients_of(backend, operands, results):
    """Gradients from dense copies of nothing: the far bias's gradient would be as far apart as it is."""
    needs = [True, True, True, False, False, False]
    gradients = backend.backward(operands, results["out"], results["lse"], needs)
    return dict(zip(GRADIENTS, gradients, strict=True))


# ------------------------------------------------------------------------------------ repeatability


@pytest.mark.parametrize("threads", [1, 2])
@each_dtype
@cases(SOME)
@every_attention
def test_attention_backends_repeat_bit_by_bit(backend, case, dtype, threads, monkeypatch):
    backend.serve(monkeypatch)
    torch.set_num_threads(threads)
    operands = case.operands(dtype)
    backend.need(operands)
    once, again = backend.run(operands), backend.run(operands)
    assert all(torch.equal(each, again[name]) for name, each in once.items() if each is not None)


@cases(SOME)
@every_attention
def test_attention_backends_threads_do_not_change_a_bit(backend, case, monkeypatch):
    """Each program owns its tile of the output, so that nothing depends on who computed it."""
    backend.serve(monkeypatch)
    operands = replace(case, batch=3).operands(torch.float32)
    backend.need(operands)
    alone = backend.run(operands)
    torch.set_num_threads(2)
    together = backend.run(operands)
    assert all(torch.equal(each, together[name]) for name, each in alone.items() if each is not None)


# ------------------------------------------------------------------------------------ the yardstick itself


@cases(SOME)
def test_attention_definition_is_torchs_where_torch_has_it(case):
    """The float64 truth of these tests is torch's own operator, with mask and bias in place of a pattern."""
    plain = replace(case, dropout=0.0, softcap=0.0, sinks=False, lse_grad=False, lost=False)
    operands = plain.operands(torch.float64)
    stock = answers(plain, torch.float64).stock
    for name, each in by_definition(operands).items():
        if each is not None and name != "lse":
            torch.testing.assert_close(each, stock[name], msg=lambda text, name=name: f"{name}: {text}")


def test_attention_rule_sees_a_wrong_result():
    """One wrong element of a result or gradient fails the comparison, and so does a misplaced -inf."""
    case = Case(33, 35, mask="qk", lost=True, bias="hqk", sinks=True, lse_grad=True)
    # A sum over a diagonal of 16-bit roundings may well be off by a tenth.
    by_distance = replace(case, bias=None, distance="h")
    for each, dtype in (*((case, dtype) for dtype in DTYPES), (by_distance, torch.float32)):
        expected = answers(each, dtype)
        assert isinstance(expected, Answers)
        hold(dict(expected.stock), expected)
        for name, right in expected.stock.items():
            if right is None:
                continue
            spoiled = right.clone(memory_format=torch.contiguous_format)
            spoiled.view(-1)[-1] += 0.1 * spoiled[spoiled.isfinite()].abs().max()
            with pytest.raises(AssertionError, match=name):
                hold({name: spoiled}, expected)
    without_sinks = answers(replace(case, sinks=False), torch.float32)
    misplaced = without_sinks.stock["lse"].nan_to_num(neginf=-80.0)
    with pytest.raises(AssertionError, match="lse"):
        hold({"lse": misplaced}, without_sinks)


def test_attention_backends_stand_in_the_operators_order():
    from pyarch.ops import attention

    for op in (attention.FORWARD, attention.BACKWARD, attention.WEIGHTS):
        names = [each.name for each in op.backends]
        assert names == ["triton", "cuda", "cpu", "torch", "reference"]
    assert {each.name for each in EVERY_ATTENTION} <= set(names)
