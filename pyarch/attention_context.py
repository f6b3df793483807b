"""Plain calls of torch's scaled_dot_product_attention on pyarch's kernels, for a block or a model's forward.

A torch function mode sees every call of a torch function in its thread and hands on all but one. Nothing is
patched: outside the block, and in other threads, the function is torch's. `swap(model, sdpa=True)` gives a
model a class whose forward is such a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as stock
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from pyarch.ops import scaled_dot_product_attention

Attend = Callable[..., Tensor]


@contextmanager
def attention_context() -> Iterator[None]:
    """Run `torch.nn.functional.scaled_dot_product_attention` as `pyarch.ops.scaled_dot_product_attention`.

    For models that call the function themselves and so have no layer to swap. The block holds for its thread,
    nests, may decorate a function, and may stand inside a function that torch.compile or torch.export traces
    (fullgraph too) or around the call of a compiled one, which is then compiled again, once. The backward of
    a call in the block is pyarch's, wherever it runs. torch.jit.trace records torch's own function.
    `pyarch.backend(...)` chooses the backend.

    It costs some microseconds for each call of a torch function inside, in eager mode, and more for those of
    torch.nn.functional that are written in Python: `python -m benchmarks attention --filter context`. While
    it holds, torch's own nn.MultiheadAttention, nn.TransformerEncoderLayer and nn.TransformerEncoder leave
    their fused paths of evaluation, as they do under any torch function mode; the last then gives numbers at
    padded positions, which were zeros. It sees neither torch.ops.aten's operators nor what runs inside
    torch.nn.functional.multi_head_attention_forward: swap the nn.MultiheadAttention instead. What
    torch.utils.checkpoint computes again in the backward runs outside the block, and it notices and raises an
    error: give it `context_fn=lambda: (contextlib.nullcontext(), pyarch.attention_context())`.
    use_reentrant=True takes no such function and notices nothing: its gradients are torch's, and with dropout
    those of another draw than the output's, so do not use it then.

    Example:
        >>> with pyarch.attention_context():
        ...     output = model(tokens)
    """
    if is_in_context():
        yield
        return
    with _AttentionMode():
        yield


def is_in_context() -> bool:
    """Whether an `attention_context` holds in this thread."""
    return any(isinstance(mode, _AttentionMode) for mode in _get_current_function_mode_stack())


@contextmanager
def answering(attend: Attend, *, also_ours: bool = False) -> Iterator[None]:
    """Let `attend` answer this thread's plain calls in an `attention_context`, for the block.

    Args:
        attend: takes what torch's scaled_dot_product_attention does.
        also_ours: whether it answers the calls of `answered` too, and takes what ours does.
    """
    thread = get_ident()
    outer = _answers.get(thread)
    _answers[thread] = attend, also_ours
    try:
        yield
    finally:
        if outer is None:
            del _answers[thread]
        else:
            _answers[thread] = outer


def answered(*args, **kwargs) -> Tensor | tuple[Tensor, Tensor]:
    """`pyarch.ops.scaled_dot_product_attention`, or who answers ours too while a model is watched."""
    attend, also_ours = _answer()
    return (attend if also_ours else scaled_dot_product_attention)(*args, **kwargs)


def _answer() -> tuple[Attend, bool]:
    """Who answers this thread's plain calls, and whether ours too."""
    answer = _answers.get(get_ident()) if _answers else None
    return answer or (scaled_dot_product_attention, False)


# By thread; empty but while somebody watches a model.
_answers: dict[int, tuple[Attend, bool]] = {}


class _AttentionMode(TorchFunctionMode):
    """Off while it answers a call, so that pyarch's own use of torch's function is left alone."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        # torch.jit.trace records torch's operators alone.
        if func is stock and not torch.jit.is_tracing():
            attend, _ = _answer()
            return attend(*args, **(kwargs or {}))
        if func is Tensor.unflatten and torch.compiler.is_compiling():
            # The same function; dynamo cannot trace the super() in this method when a mode calls it.
            func = torch.unflatten
        return func(*args, **(kwargs or {}))
