"""float32 on a GPU: kernels take tf32 products where torch's own would, and nowhere else.

Attention follows torch's switch for matrices (torch.set_float32_matmul_precision,
torch.backends.cuda.matmul), which is off by default. Recurrent layers follow cuDNN's
(torch.backends.cudnn.allow_tf32), which is on. Convolution multiplies without tensor cores: always float32.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyarch.ops import scaled_dot_product_attention as attend
from tests.compare import check
from tests.gpu_calls import (
    CALLS,
    FP16,
    FP32,
    ROUNDINGS,
    Call,
    answers_of,
    assert_same,
    chosen_backends,
    hold,
    on_gpu,
    precision,
)

# A tf32 number has the 10 bits behind the point that a float16 has.
TF32_NOISE = ROUNDINGS[FP16] * 2.0**-10
# With products in kernels of our own; further ones are torch's, on which it decides by their sizes.
FOLLOWERS = [
    "attention",
    "attention causal, grouped",
    "attention bias, softcap, sinks",
    "attention distance bias",
    "attention weights",
    "attention of sequences",
    "lstm",
    "gru",
]
OTHERS = ["lstm projected", "lstm wide", "lstm of lengths", "rnn tanh", "lstm cell", "attention on a cache"]
CONVOLUTIONS = [name for name in CALLS if name.startswith("conv")]


def outcome_of_ours(call: Call, leaves: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    """What a call gives; on a GPU by Triton alone: torch's own would be compared with itself."""
    made = []
    chosen = chosen_backends(lambda: made.append(call.outcome(leaves)))
    assert device == "cpu" or {backend for _, backend in chosen} == {"triton"}
    return made[0]


def hold_tf32(name: str, device: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Hold a call with tf32 products to what those can give; its results, and those of float32 products."""
    call, made = CALLS[name], []
    for tf32 in (True, False):
        with precision(tf32):
            made.append(outcome_of_ours(call, call.leaves(FP32, device), device))
    hold(call, FP32, made[0], TF32_NOISE)
    hold(call, FP32, made[1])
    return made[0], made[1]


@on_gpu
@pytest.mark.parametrize("name", FOLLOWERS)
def test_gpu_products_are_tf32_where_torchs_are_fp32(name):
    coarse, fine = hold_tf32(name, "cuda")
    assert any(not torch.equal(each, fine[key]) for key, each in coarse.items())


@on_gpu
@pytest.mark.parametrize("name", OTHERS)
def test_gpu_results_keep_the_rule_under_tf32(name):
    hold_tf32(name, "cuda")


@on_gpu
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_gpu_convolution_is_never_tf32_fp32(name):
    assert_same(*hold_tf32(name, "cuda"))


def test_gpu_precision_rehearsed():
    for name in ("attention", "gru", "conv 3x3"):
        hold_tf32(name, "cpu")


# ------------------------------------------------------------------------------------ beside torch's own


SHAPES = {"query": (2, 4, 129, 64), "key": (2, 4, 257, 64), "value": (2, 4, 257, 64)}
OURS = Call(lambda query, key, value: attend(query, key, value), SHAPES)
STOCK = Call(lambda query, key, value: F.scaled_dot_product_attention(query, key, value), SHAPES)


def hold_beside_torch(device: str, tf32: bool) -> None:
    """Twice the error of torch's own attention under the same switch, forward and backward."""
    leaves = OURS.leaves(FP32, device)
    truth = answers_of(STOCK, FP32)[1]
    with precision(tf32), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        ours, stock = outcome_of_ours(OURS, leaves, device), STOCK.outcome(leaves)
    for name, each in ours.items():
        check(name, each.cpu(), stock[name].cpu(), truth[name])


@on_gpu
@pytest.mark.parametrize("tf32", [False, True], ids=["fp32", "fp32 as tf32"])
def test_gpu_attention_is_as_exact_as_torchs(tf32):
    hold_beside_torch("cuda", tf32)


def test_gpu_attention_beside_torchs_rehearsed():
    hold_beside_torch("cpu", False)


# ------------------------------------------------------------------------------------ the switches


@pytest.fixture
def matmul():
    """torch's settings for products of float32 matrices, put back behind the test."""
    settings = torch.backends.cuda.matmul
    before = torch.get_float32_matmul_precision(), settings.fp32_precision
    yield settings
    torch.set_float32_matmul_precision(before[0])
    settings.fp32_precision = before[1]


SWITCHES = {
    "highest": (lambda matmul: torch.set_float32_matmul_precision("highest"), "ieee"),
    "high": (lambda matmul: torch.set_float32_matmul_precision("high"), "tf32"),
    "medium": (lambda matmul: torch.set_float32_matmul_precision("medium"), "tf32"),
    "allow_tf32": (lambda matmul: setattr(matmul, "allow_tf32", True), "tf32"),
    "allow_tf32 off": (lambda matmul: setattr(matmul, "allow_tf32", False), "ieee"),
    "fp32_precision": (lambda matmul: setattr(matmul, "fp32_precision", "tf32"), "tf32"),
    "fp32_precision off": (lambda matmul: setattr(matmul, "fp32_precision", "ieee"), "ieee"),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_gpu_attention_reads_each_of_torchs_switches(name, matmul):
    pytest.importorskip("triton", reason="Triton is not installed")
    from pyarch.triton_kernels import attention

    switch, expected = SWITCHES[name]
    switch(matmul)
    assert attention.fp32_precision() == expected
