"""What every test runs under: one thread, a fixed seed, new tensors that hold NaN until they are written."""

from __future__ import annotations

import os
import random
import signal

# oneDNN reads this when it first runs. Where a CPU has AVX512-FP16 it takes minutes to prepare a float16
# depthwise convolution with rows of 15 taps or more, and the tests ask torch for such answers.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

import hypothesis
import pytest
import torch

pytest_plugins = ["tests.ledger", "tests.browser", "tests.gpu_session"]

ALLOCATORS = ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty"))
POISONED_DTYPES = {
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
}

hypothesis.settings.register_profile("local", deadline=None, print_blob=True)
hypothesis.settings.register_profile("ci", deadline=None, print_blob=True, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") == "true" else "local")


def poisoned(allocate):
    """An allocator whose floating tensors hold NaN, so that an unwritten element shows in a comparison."""

    def allocate_poisoned(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if tensor.dtype in POISONED_DTYPES and not tensor.is_meta:
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    return allocate_poisoned


@pytest.fixture(autouse=True)
def poison(request, monkeypatch):
    """Fill what torch.empty and its kin return with NaN; the marker `unpoisoned` leaves a test out."""
    if request.node.get_closest_marker("unpoisoned") is None:
        for owner, name in ALLOCATORS:
            monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def seeds():
    """The same random numbers in every run and in any order of the tests."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def one_thread():
    """One thread a test, because the tests run side by side; a test that needs more sets more."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def hears_ctrl_c():
    """What a shell starts in the background ignores Ctrl-C, and so would every test in it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
