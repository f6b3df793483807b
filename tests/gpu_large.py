"""What tests of more than 2^31 elements share: memory of one GPU, drawn tensors, and a recurrent layer."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from pyarch import ops
from tests.gpu_calls import BF16, FP32, on_gpu
from tests.gpu_session import TIMEOUT

BEYOND = 2**31
# bfloat16 results of a sum of few products of drawn numbers, beside float32: a few roundings of 2^-8.
CLOSE = dict(rtol=2e-2, atol=5e-2)


def large(gib: int):
    """Mark a test that needs so many GiB of one GPU, see the fixture `gpu_memory`."""

    def mark(test):
        for each in (
            pytest.mark.parametrize("gpu_memory", [gib], indirect=True),
            pytest.mark.usefixtures("gpu_memory"),
            pytest.mark.unpoisoned,
            # Waiting for the memory that other tests hold counts too; of several marks the closest acts.
            pytest.mark.timeout(4 * TIMEOUT, method="thread"),
        ):
            test = each(test)
        return on_gpu(test)

    return mark


def drawn(*shape: int, device: str) -> torch.Tensor:
    return torch.empty(shape, dtype=BF16, device=device).normal_()


FUNCTIONS = {"lstm": ops.lstm, "gru": ops.gru, "rnn_tanh": ops.rnn}
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1}


def hold_layer(
    device: str, mode: str, steps: int, batch: int, hidden: int, directions: int = 1, path: str | None = None
) -> None:
    """The last sequence, forward and backward, as if it were alone; by one path of the Triton kernels."""
    x = drawn(steps, batch, 4, device=device).requires_grad_()
    rows = GATES[mode] * hidden
    params = [
        drawn(rows, width, device=device) * scale
        for _ in range(directions)
        for width, scale in ((4, 0.5), (hidden, hidden**-0.5 / 2))
    ]
    with taking(path):
        out = FUNCTIONS[mode](x, None, params, bidirectional=directions == 2)[0]
        grad = drawn(*out.shape, device=device)
        (ours,) = torch.autograd.grad(out, x, grad)
    alone = x.detach()[:, -1:].to(FP32).requires_grad_()
    start = alone.new_zeros(directions, 1, hidden)
    expected = getattr(torch._VF, mode)(
        alone,
        (start, start) if mode == "lstm" else start,
        [each.float() for each in params],
        False,
        1,
        0.0,
        True,
        directions == 2,
        False,
    )[0]
    (theirs,) = torch.autograd.grad(expected, alone, grad[:, -1:].float())
    assert expected.abs().max() > 0.2 and theirs.abs().max() > 0.5
    torch.testing.assert_close(out[:, -1:].float(), expected, **CLOSE)
    torch.testing.assert_close(ours[:, -1:].float(), theirs, rtol=5e-2, atol=1e-1)


@contextmanager
def taking(path: str | None):
    """Recurrent layers on Triton take this path, or refuse; None leaves them their choice."""
    if path is None or not torch.cuda.is_available():
        yield
        return
    from pyarch.triton_kernels import recurrent

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recurrent, "path_of", lambda *call: recurrent.checked_path(path, *call))
        yield
