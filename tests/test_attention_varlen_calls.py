"""attention_varlen as a function: its errors, compilation, transforms, autocast and second derivatives."""

from __future__ import annotations

import pytest
import torch

import pyarch
from pyarch.ops import attention_varlen
from tests.attention_functions import CPU, close, each_backend
from tests.varlen_cases import VarlenCase

OPERATOR = "attention_varlen"
ENDS = torch.tensor([0, 4, 4, 9])


def drawn(heads=4, kv_heads=2, tokens=9, dim=8, dtype=torch.float32):
    return [torch.randn(tokens, each, dim).to(dtype) for each in (heads, kv_heads, kv_heads)]


# ------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        (dict(cu_seqlens_q=torch.tensor([0.0, 9.0])), TypeError, "cu_seqlens_q must be int32 or int64"),
        (dict(cu_seqlens_q=torch.tensor([[0, 9]])), ValueError, r"cu_seqlens_q must be \(sequences \+ 1,\)"),
        (dict(cu_seqlens_q=torch.tensor([], dtype=torch.int32)), ValueError, r"got \(0,\)"),
        (dict(cu_seqlens_q=torch.tensor([0, 8])), ValueError, "from 0 to the 9 tokens, got 0 to 8"),
        (dict(cu_seqlens_q=torch.tensor([1, 9])), ValueError, "from 0 to the 9 tokens, got 1 to 9"),
        (dict(cu_seqlens_q=torch.tensor([0, 7, 4, 9])), ValueError, r"never decrease, got \[0, 7, 4, 9\]"),
        (dict(cu_seqlens_k=torch.tensor([0, 7, 4, 9])), ValueError, "cu_seqlens_k must never decrease"),
        (dict(cu_seqlens_k=torch.tensor([0, 9])), ValueError, "as long, got 4 and 2"),
        (dict(cu_seqlens_q=ENDS.to("meta")), ValueError, "strided and on cpu, got torch.strided on meta"),
        (dict(query=torch.randn(9, 8)), ValueError, r"\(tokens, heads, width\), got 2-D, 3-D and 3-D"),
        (dict(query=torch.randn(9, 3, 8)), ValueError, "3 query heads cannot share 2 key and 2 value heads"),
        (dict(query=torch.randn(9, 4, 7)), ValueError, "one width, at least 1, got 7 and 8"),
        (dict(value=torch.randn(8, 2, 8)), ValueError, "as many tokens, got 9 and 8"),
        (dict(value=torch.randn(9, 2, 8).half()), TypeError, "query, key and value must have one dtype"),
        (dict(query_offset="start"), TypeError, "query_offset must be an integer or 'end', got 'start'"),
        (dict(query_offset=True), TypeError, "query_offset must be an integer or 'end', got True"),
        (dict(window=(-1, 0)), ValueError, "0 or more keys to each side, got left -1"),
        (dict(window=1.5), TypeError, "window must hold integers or None"),
        (dict(softcap=-1.0), ValueError, "softcap must be positive"),
        (dict(sinks=torch.randn(3)), ValueError, r"sinks must be \(heads,\) = \(4,\), got \(3,\)"),
        (dict(sinks=torch.ones(4, dtype=torch.int64)), TypeError, "sinks must be torch.float32"),
    ],
)
def test_attention_varlen_says_what_does_not_fit(changes, kind, text):
    query, key, value = drawn()
    given = dict(query=query, key=key, value=value, cu_seqlens_q=ENDS) | changes
    with pytest.raises(kind, match=text):
        attention_varlen(**given)


def test_attention_varlen_a_named_backend_refuses_by_name():
    with pyarch.backend("torch"), pytest.raises(NotImplementedError, match="softcap, stock SDPA has none"):
        attention_varlen(*drawn(), ENDS, softcap=2.0)


@pytest.mark.operator("attention_varlen", "cpu")
def test_attention_varlen_kernel_refuses_ends_beyond_its_tokens():
    """Below the public function, where a wrong end would be read as memory."""
    from pyarch import native

    if (problem := native.load("avx2")) is not None:
        pytest.skip(problem)
    query, key, value = drawn()
    out, lse = torch.empty_like(query), torch.empty(4, 9)
    numbers = torch.tensor([1.0, 0, 0, 0, -1, -1, 1, 0, 0], dtype=torch.float64)
    for ends in ([0, 4, 10], [0, 12, 9], [-3, 4, 9]):
        wrong = torch.tensor(ends, dtype=torch.int32)
        arguments = out, lse, query, key, value, wrong, wrong, None, numbers, False
        with pytest.raises(RuntimeError, match="from 0 to all tokens and never decrease"):
            native.operators("avx2").attention_varlen_forward(*arguments)


# ------------------------------------------------------------------------------------ the same in other ways


@each_backend
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_attention_varlen_takes_ends_of_both_types_and_any_stride(backend, dtype):
    tensors = drawn()
    strided = torch.stack([ENDS, ENDS + 1], 1)[:, 0].to(dtype)
    with pyarch.backend(backend):
        expected = attention_varlen(*tensors, ENDS)
        assert torch.equal(attention_varlen(*tensors, strided), expected)
        assert torch.equal(attention_varlen(*tensors, ENDS.to(dtype), ENDS.to(dtype)), expected)


@each_backend
def test_attention_varlen_compiles_whole_with_dynamic_shapes(backend):
    torch._dynamo.reset()

    def train(query, key, value, ends):
        return attention_varlen(query, key, value, ends, is_causal=True, query_offset="end", return_lse=True)

    compiled = torch.compile(train, fullgraph=True, dynamic=True, backend="aot_eager")
    for ends in (ENDS, torch.tensor([0, 5, 30])):
        tensors, outcomes = drawn(tokens=int(ends[-1])), []
        with pyarch.backend(backend):
            for run in (compiled, train):
                leaves = [each.clone().requires_grad_() for each in tensors]
                found = run(*leaves, ends)
                sum(each.nan_to_num(neginf=0).square().sum() for each in found).backward()
                outcomes.append((found, [each.grad for each in leaves]))
                assert all(each.grad.any() for each in leaves)
        close(*outcomes)


def test_attention_varlen_compiled_still_checks_the_ends():
    torch._dynamo.reset()
    compiled = torch.compile(attention_varlen, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="from 0 to the 9 tokens, got 0 to 8"):
        compiled(*drawn(), torch.tensor([0, 8]))


@pytest.mark.parametrize("passes", ["forward", "backward"])
def test_attention_varlen_operators_keep_torchs_contract(passes):
    query, key, value = drawn()
    ends, settings = ENDS.int(), (0.3, True, 3, None, 1, 0, 0, 0.0, 0.0)
    forward = torch.ops.pyarch.attention_varlen_forward.default
    arguments = query, key, value, ends, ends, torch.randn(4), *settings, True
    if passes == "forward":
        torch.library.opcheck(forward, (*arguments, True, "auto"))
        return
    out, lse = forward(*arguments, True, "auto")
    backward = torch.ops.pyarch.attention_varlen_backward.default
    for needs in ([True] * 4, [False, True, False, False]):
        given = torch.randn_like(out), torch.randn_like(lse), *arguments[:3], out, lse, *arguments[3:]
        torch.library.opcheck(backward, (*given, needs, "auto"))


def causal_with_sinks(query, key, value, sinks):
    return attention_varlen(query, key, value, ENDS, is_causal=True, sinks=sinks)


def test_attention_varlen_second_derivatives_are_those_of_differences():
    query, key, value = (torch.randn(3, 1, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    ends = torch.tensor([0, 1, 3])
    assert torch.autograd.gradgradcheck(lambda *qkv: attention_varlen(*qkv, ends), (query, key, value))


@each_backend
def test_attention_varlen_differentiates_twice(backend):
    single = [each.requires_grad_() for each in (*drawn(), torch.randn(4))]
    wide, seconds = [each.detach().double().requires_grad_() for each in single], []
    for given, name in ((single, backend), (wide, "auto")):
        with pyarch.backend(name):
            first = torch.autograd.grad(causal_with_sinks(*given).square().sum(), given, create_graph=True)
            seconds.append(torch.autograd.grad(sum(each.square().sum() for each in first), given))
    assert all(each.any() for each in seconds[1])
    close([each.double() for each in seconds[0]], list(seconds[1]), 1e-4)


def test_attention_varlen_under_functorch():
    tensors = drawn()

    def loss(*given):
        return attention_varlen(*given, ENDS, is_causal=True).square().sum()

    found = torch.func.grad(loss, (0, 1, 2))(*tensors)
    leaves = [each.requires_grad_() for each in tensors]
    close(found, torch.autograd.grad(loss(*leaves), leaves))


@each_backend
def test_attention_varlen_follows_autocast(backend):
    tensors = drawn()
    with pyarch.backend(backend), torch.autocast("cpu", torch.bfloat16):
        cast = attention_varlen(*tensors, ENDS)
    with pyarch.backend(backend):
        by_hand = attention_varlen(*(each.bfloat16() for each in tensors), ENDS)
    assert cast.dtype == torch.bfloat16 and torch.equal(cast, by_hand)


@each_backend
def test_attention_varlen_gives_gradients_only_where_wanted(backend):
    for wanted in range(3):
        tensors = drawn()
        tensors[wanted].requires_grad_()
        with pyarch.backend(backend):
            attention_varlen(*tensors, ENDS).sum().backward()
        assert [each.grad is not None for each in tensors] == [place == wanted for place in range(3)]


@pytest.mark.parametrize("backend", [CPU])
def test_attention_varlen_is_one_call_however_many_sequences(backend):
    """A batch of sequences costs one decision and one native call, forward and backward."""
    from pyarch import native
    from pyarch.dispatch import recording

    case = VarlenCase((7,) * 64)
    given = case.tensors(torch.float32)
    leaves = [given[name].requires_grad_() for name in ("query", "key", "value")]
    decisions, made = [], []
    operators = native.operators()

    class Counted:
        def __getattr__(self, name):
            made.append(name)
            return getattr(operators, name)

    with pytest.MonkeyPatch.context() as patch, recording(lambda op, *_: decisions.append(op.name)):
        patch.setattr(native, "operators", lambda instruction_set=None: Counted())
        with pyarch.backend(backend):
            attention_varlen(*leaves, case.ends(case.lengths)).sum().backward()
    assert decisions == made == ["attention_varlen_forward", "attention_varlen_backward"]
