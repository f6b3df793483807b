"""The rules by which a backend is chosen, on operators made up for the purpose."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from typing import NamedTuple

import pytest
import torch

import pyarch
from pyarch import dispatch
from pyarch.dispatch import Backend, Op, Verdict, accepts_all

OPERATOR = "dispatch"


class Call(NamedTuple):
    size: int
    device: str = "cpu"


def too_large(call):
    if call.size > 10:
        yield f"size {call.size}, needs at most 10"


def odd(call):
    if call.size % 2:
        yield f"size {call.size} is odd"


def slow(call):
    if call.size < 3:
        yield f"size {call.size}, torch is faster below 3"


def made_up(name="made_up"):
    """Three backends: `cpu` refuses large and odd sizes and concedes small ones, the others take all."""

    def refusals(call):
        yield from too_large(call)
        yield from odd(call)

    return Op(
        name,
        (
            Backend("cpu", "operator:add", refusals, slow),
            Backend("torch", "operator:mul", accepts_all),
            Backend("reference", "operator:sub", accepts_all),
        ),
    )


@pytest.fixture(autouse=True)
def own_fallbacks(monkeypatch):
    monkeypatch.setattr(dispatch, "fallbacks", type(dispatch.fallbacks)())


def test_dispatch_the_first_that_accepts_wins():
    op = made_up()
    assert op.choose(Call(4)).name == "cpu"
    assert op.choose(Call(5)).name == "torch"
    assert op.choose(Call(12)).name == "torch"


def test_dispatch_concessions_matter_to_auto_only():
    op = made_up()
    assert op.choose(Call(2)).name == "torch"
    assert op.choose(Call(2), "cpu").name == "cpu"


def test_dispatch_explains_every_backend():
    assert made_up().explain(Call(13)) == (
        Verdict("cpu", ("size 13, needs at most 10", "size 13 is odd"), ()),
        Verdict("torch", (), ()),
        Verdict("reference", (), ()),
    )
    conceding = made_up().explain(Call(2))[0]
    assert not conceding.accepts and conceding.reason == "size 2, torch is faster below 3"
    assert made_up().explain(Call(1))[0].reason == "size 1 is odd; size 1, torch is faster below 3"


def test_dispatch_a_named_backend_that_refuses_says_every_reason():
    message = "made_up: backend 'cpu' refuses this call: size 13, needs at most 10; size 13 is odd"
    with pytest.raises(NotImplementedError) as raised:
        made_up().choose(Call(13), "cpu")
    assert str(raised.value) == message


def test_dispatch_a_backend_that_the_operator_lacks():
    with pytest.raises(NotImplementedError, match="^made_up has no backend 'triton'$"):
        made_up().choose(Call(4), "triton")


def test_dispatch_imports_the_target_at_the_first_use():
    backend = Backend("cpu", "module_that_is_not_there:run", accepts_all)
    op = Op("late", (backend,))
    assert op.choose(Call(1)) is backend
    with pytest.raises(ModuleNotFoundError, match="module_that_is_not_there"):
        _ = backend.run
    assert made_up().choose(Call(4)).run(20, 3) == 23


def test_dispatch_backend_block():
    op = made_up()
    with pyarch.backend("reference"):
        assert op.choose(Call(4)).name == "reference"
        with pyarch.backend("torch"):
            assert op.choose(Call(4)).name == "torch"
        assert op.choose(Call(4)).name == "reference"
        assert op.choose(Call(4), "cpu").name == "cpu"
        with pyarch.backend("auto"):
            assert op.choose(Call(4)).name == "cpu"
    assert op.choose(Call(4)).name == "cpu"


def test_dispatch_backend_block_ends_with_an_error():
    with pytest.raises(KeyError), pyarch.backend("reference"):
        raise KeyError
    assert dispatch.requested_backend() == "auto"


def test_dispatch_backend_block_rejects_unknown_names():
    choices = "auto, triton, cuda, cpu, torch, reference"
    with pytest.raises(ValueError, match=f"^unknown backend 'gpu', choose one of {choices}$"):
        with pyarch.backend("gpu"):
            pytest.fail("the block ran")


def test_dispatch_decides_each_call_once():
    asked = []

    def refusals(call):
        asked.append(call)
        return iter(())

    op = Op("counted", (Backend("cpu", "operator:add", refusals),))
    for _ in range(3):
        op.choose(Call(1))
    op.choose(Call(2))
    assert asked == [Call(1), Call(2)]


def test_dispatch_keeps_a_bounded_number_of_decisions(monkeypatch):
    monkeypatch.setattr(dispatch, "_CACHED_CHOICES", 8)
    op = made_up()
    for size in range(100):
        op.choose(Call(size))
        assert len(op._choices) <= 8
    assert op.choose(Call(4)).name == "cpu"


def test_dispatch_records_every_decision():
    op, seen = made_up(), []
    op.choose(Call(4))
    with dispatch.recording(lambda *decision: seen.append(decision)):
        cached, fresh = op.choose(Call(4)), op.choose(Call(6), "reference")
    op.choose(Call(4))
    assert seen == [(op, Call(4), cached), (op, Call(6), fresh)]


def test_dispatch_recordings_nest():
    op, outer, inner = made_up(), [], []
    with dispatch.recording(lambda *decision: outer.append(decision)):
        with dispatch.recording(lambda *decision: inner.append(decision)):
            op.choose(Call(4))
        op.choose(Call(6))
    assert [call for _, call, _ in inner] == [Call(4)]
    assert [call for _, call, _ in outer] == [Call(6)]


def test_dispatch_warns_once_when_a_gpu_falls_back_and_counts():
    op = made_up()
    reason = "cpu: size 5 is odd"
    with pytest.warns(RuntimeWarning, match=f"^made_up runs on torch's own kernel: {reason}$") as caught:
        op.choose(Call(5, "cuda"))
    assert len(caught) == 1 and dispatch.fallbacks["made_up", reason] == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        op._choices.clear()
        op.choose(Call(5, "cuda"))
    assert dispatch.fallbacks["made_up", reason] == 2


@pytest.mark.parametrize(
    "call, requested", [(Call(4, "cuda"), "auto"), (Call(5, "cpu"), "auto"), (Call(5, "cuda"), "torch")]
)
def test_dispatch_is_silent_where_nothing_falls_back(call, requested):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made_up().choose(call, requested)
    assert not dispatch.fallbacks


def in_a_fresh_process(code, **variables):
    environment = {**os.environ, **variables}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_dispatch_reads_the_environment():
    code = "from pyarch import dispatch; print(dispatch.requested_backend())"
    assert in_a_fresh_process(code, PYARCH_BACKEND="reference").stdout == "reference\n"
    assert in_a_fresh_process(code, PYARCH_BACKEND="").stdout == "auto\n"


def test_dispatch_rejects_a_bad_environment():
    failed = in_a_fresh_process("import pyarch", PYARCH_BACKEND="fastest")
    assert failed.returncode != 0
    assert (
        "unknown backend 'fastest', choose one of auto, triton, cuda, cpu, torch, reference" in failed.stderr
    )


def test_dispatch_rejects_a_bad_instruction_set():
    code = "from pyarch import native; native.serving()"
    failed = in_a_fresh_process(code, PYARCH_CPU_ISA="sse9")
    assert "PYARCH_CPU_ISA='sse9', choose one of amx, avx512_bf16, avx512, avx2" in failed.stderr


def test_dispatch_serves_the_instruction_set_asked_for():
    if (problem := pyarch.native.load("avx2")) is not None:
        pytest.skip(problem)
    code = "from pyarch import native; print(native.serving()[0], native.operators().name)"
    served = in_a_fresh_process(code, PYARCH_CPU_ISA="avx2")
    assert served.stdout == "avx2 pyarch_cpu_avx2\n", served.stderr


def test_dispatch_says_what_this_machine_lacks(monkeypatch):
    monkeypatch.setattr(pyarch.hardware, "supported_instruction_sets", lambda: ())
    assert pyarch.native.load.__wrapped__("avx2") == "instruction set avx2, this CPU lacks it"
    assert pyarch.native.serving.__wrapped__() == (None, "C++ CPU kernels, need an x86-64 CPU with AVX2")


def test_dispatch_says_that_a_library_is_not_built(monkeypatch, tmp_path):
    monkeypatch.setattr(pyarch.hardware, "supported_instruction_sets", lambda: ("avx2",))
    monkeypatch.setattr(pyarch.native, "_FOLDER", tmp_path)
    problem = pyarch.native.load.__wrapped__("avx2")
    assert problem == f"C++ CPU extension for avx2 not built, {pyarch.native.BUILD}"


def test_dispatch_says_that_a_library_does_not_load(monkeypatch, tmp_path):
    monkeypatch.setattr(pyarch.hardware, "supported_instruction_sets", lambda: ("avx2",))
    monkeypatch.setattr(pyarch.native, "_FOLDER", tmp_path)
    (tmp_path / "_cpu_avx2.so").write_bytes(b"not a library")
    problem = pyarch.native.load.__wrapped__("avx2")
    assert problem.startswith(f"_cpu_avx2.so does not load under torch {torch.__version__}: ")
    assert problem.endswith(pyarch.native.BUILD)
