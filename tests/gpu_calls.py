"""Calls of the public functions as data, to be made on a GPU, and the same bodies to be rehearsed on a CPU.

The numbers of each kernel are held to the tolerance rule in the files test_*_triton.py, by the tables of all
backends. These calls prove what lies around the kernels: the choice of a backend, autograd, streams, devices,
graphs, compilation.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

import pyarch
from pyarch import dispatch, ops
from tests.compare import check

INTERPRETED = pyarch.hardware.triton_interprets()
no_gpu = INTERPRETED or not torch.cuda.is_available()
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
each_dtype = pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
# The kernels' own numbers are held tighter elsewhere. Here a result may differ by some roundings of its
# largest number: a 16-bit kernel rounds what lies between (probabilities, states) and the float32 reference
# does not, and in float32 sums of a hundred terms are added in another order.
ROUNDINGS = {FP32: 64, FP16: 8, BF16: 8}


def on_gpu(test):
    """Mark a test that needs a GPU."""
    return pytest.mark.gpu(pytest.mark.skipif(no_gpu, reason="no CUDA GPU")(test))


@dataclass(frozen=True)
class Call:
    """One call: shapes of the tensors that get gradients, tensors that stay as they are, and the function.

    Args:
        captured: whether a CUDA graph can hold it (lengths on the host cannot be).
        differentiable: whether there is a backward.
        drawn: whether it draws random numbers, so that a CPU cannot give its answer.
    """

    run: Callable[..., Tensor | tuple[Tensor, ...]]
    shapes: dict[str, tuple[int, ...]]
    fixed: dict[str, Tensor] = field(default_factory=dict)
    captured: bool = True
    differentiable: bool = True
    drawn: bool = False

    def leaves(self, dtype: torch.dtype, device: str | torch.device, seed: int = 0) -> dict[str, Tensor]:
        """The same numbers for every device; weights scaled so that recurrences stay in range."""
        generator = torch.Generator().manual_seed(seed)
        drawn = {
            name: torch.randn(shape, generator=generator)
            * (shape[-1] ** -0.5 if name.startswith("w") and len(shape) == 2 else 1)
            for name, shape in self.shapes.items()
        }
        return {name: tensor.to(dtype).to(device) for name, tensor in drawn.items()}

    def fixed_on(self, device: torch.device) -> dict[str, Tensor]:
        """The tensors that stay as they are, copied once: a CUDA graph takes no copy from the host."""
        key = id(self), str(device)
        if key not in _fixed:
            _fixed[key] = {name: tensor.to(device) for name, tensor in self.fixed.items()}
        return _fixed[key]

    def results(self, leaves: dict[str, Tensor]) -> list[Tensor]:
        """What the function returns on these tensors."""
        return self.made(leaves, self.fixed_on(next(iter(leaves.values())).device))

    def made(self, leaves: dict[str, Tensor], fixed: dict[str, Tensor]) -> list[Tensor]:
        made = self.run(**leaves, **fixed)
        return [each for each in (made if isinstance(made, tuple) else (made,)) if each is not None]

    def outcome(self, leaves: dict[str, Tensor], run: Callable | None = None) -> dict[str, Tensor]:
        """Results, and gradients for cotangents that every run repeats."""
        run = run or self.results
        if not self.differentiable:
            with torch.no_grad():
                return named("result", run(leaves))
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in leaves.items()}
        results = run(leaves)
        cotangents = [cotangent_of(each) for each in results]
        grads = torch.autograd.grad(results, list(leaves.values()), cotangents, allow_unused=True)
        gradients = {f"gradient of {name}": g for name, g in zip(leaves, grads, strict=True) if g is not None}
        return named("result", [each.detach() for each in results]) | gradients


_fixed: dict[tuple[int, str], dict[str, Tensor]] = {}


def cotangent_of(result: Tensor) -> Tensor:
    """Scattered numbers from -0.4 to 0.6, the same to the bit on every device, in a CUDA graph too."""
    places = torch.arange(result.numel(), device=result.device)
    return ((places * 7919 % 1009) / 1009 - 0.4).to(result.dtype).view(result.shape)


def named(what: str, tensors: list[Tensor]) -> dict[str, Tensor]:
    return {f"{what} {number}": tensor for number, tensor in enumerate(tensors)}


def stack_shapes(
    gates: int, hidden: int, inputs: int, layers: int, directions: int, proj: int = 0
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of torch's flat list of weights."""
    shapes, width = {}, proj or hidden
    for layer in range(layers):
        for direction in range(directions):
            own = f"{layer}{direction}"
            shapes[f"w_ih{own}"] = gates * hidden, inputs if layer == 0 else directions * width
            shapes[f"w_hh{own}"] = gates * hidden, width
            shapes |= {f"b_ih{own}": (gates * hidden,), f"b_hh{own}": (gates * hidden,)}
            shapes |= {f"w_hr{own}": (proj, hidden)} if proj else {}
    return shapes


def layer_call(function, gates: int, hidden: int, layers=1, directions=1, proj=0, steps=7, batch=5, **more):
    """A recurrent stack of whole sequences on zero states."""
    shapes = {"x": (steps, batch, 13)} | stack_shapes(gates, hidden, 13, layers, directions, proj)
    options = dict(num_layers=layers, bidirectional=directions == 2) | (dict(proj_size=proj) if proj else {})
    lengths = more.pop("lengths", None)
    options |= more

    def run(x, **weights):
        return function(x, None, list(weights.values()), lengths=lengths, **options)

    return Call(run, shapes, captured=lengths is None)


def cell_call(function, gates: int, hidden: int = 33):
    shapes = {"x": (5, 13), "h": (5, hidden), **stack_shapes(gates, hidden, 13, 1, 1)}
    if gates == 4:
        shapes = {"x": (5, 13), "h": (5, hidden), "c": (5, hidden), **stack_shapes(gates, hidden, 13, 1, 1)}

    def run(x, h, c=None, **weights):
        return function(x, h if c is None else (h, c), *weights.values())

    return Call(run, shapes)


def conv_call(input, kernel, multiplier=1, layout=None, **options):
    outputs = input[1] * multiplier
    shapes = {"x": input, "w": (outputs, 1, *kernel), "b": (outputs,)}

    def run(x, w, b):
        x = x if layout is None else x.contiguous(memory_format=layout)
        return ops.depthwise_conv(x, w, b, **options)

    return Call(run, shapes)


def attention_call(heads=4, kv_heads=4, queries=65, keys=127, dim=40, more=(), fixed=None, **options):
    """Attention; `more` names and shapes of further tensors with gradients, `fixed` those without."""
    shapes = {"query": (2, heads, queries, dim), "key": (2, kv_heads, keys, dim)}
    shapes |= {"value": (2, kv_heads, keys, dim), **dict(more)}

    def run(query, key, value, **extras):
        return ops.scaled_dot_product_attention(
            query, key, value, enable_gqa=heads != kv_heads, **options, **extras
        )

    return Call(run, shapes, fixed or {}, drawn=bool(options.get("dropout_p")))


def ends(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


PADDING = torch.arange(254).view(2, 127) % 5 == 3
MASK = torch.arange(65 * 127).view(65, 127) % 7 != 2
CALLS = {
    "conv 1-D causal": conv_call((2, 33, 127), (4,), padding=3),
    "conv 1-D same, dilated": conv_call((2, 33, 65), (5,), padding="same", dilation=3),
    "conv 3x3": conv_call((2, 31, 17, 63), (3, 3), padding=1),
    "conv 7x7 nhwc": conv_call((2, 40, 14, 15), (7, 7), padding=3, layout=torch.channels_last),
    "conv 3x3 stride 2, circular": conv_call(
        (2, 5, 20, 33), (3, 3), 2, stride=2, padding=1, padding_mode="circular"
    ),
    "conv 3x3x3 ndhwc": conv_call((1, 33, 5, 6, 7), (3, 3, 3), padding=1, layout=torch.channels_last_3d),
    "lstm": layer_call(ops.lstm, 4, 33),
    "lstm stack both ways": layer_call(ops.lstm, 4, 20, layers=2, directions=2),
    "lstm projected": layer_call(ops.lstm, 4, 33, directions=2, proj=9),
    "lstm wide": layer_call(ops.lstm, 4, 520, steps=3),
    "lstm of lengths": layer_call(ops.lstm, 4, 33, directions=2, lengths=[7, 3, 5, 1, 7]),
    "lstm recomputed": layer_call(ops.lstm, 4, 33, recompute=True),
    "gru": layer_call(ops.gru, 3, 65, directions=2),
    "gru of lengths": layer_call(ops.gru, 3, 33, lengths=[2, 7, 1, 7, 4]),
    "rnn tanh": layer_call(ops.rnn, 1, 127),
    "rnn relu": layer_call(ops.rnn, 1, 33, layers=2, nonlinearity="relu"),
    "lstm cell": cell_call(ops.lstm_cell, 4),
    "gru cell": cell_call(ops.gru_cell, 3),
    "rnn cell": cell_call(ops.rnn_cell, 1),
    "attention": attention_call(),
    "attention causal, grouped": attention_call(kv_heads=2, is_causal=True, query_offset=62),
    "attention window, dilation, global": attention_call(window=(5, 2), dilation=3, global_tokens=2),
    "attention bias, softcap, sinks": attention_call(
        more={"bias": (4, 65, 127), "sinks": (4,)}, softcap=5.0, fixed={"key_padding_mask": PADDING}
    ),
    "attention mask": attention_call(fixed={"attn_mask": MASK}),
    "attention distance bias": attention_call(more={"distance_bias": (4, 191)}, is_causal=True),
    "attention weights": attention_call(queries=33, return_weights="mean", return_lse=True, is_causal=True),
    "attention dropout": attention_call(dropout_p=0.3),
    "attention of sequences": Call(
        lambda query, key, value, ends: ops.attention_varlen(
            query, key, value, ends, is_causal=True, window=(20, 0), return_lse=True
        ),
        {"query": (101, 4, 40), "key": (101, 2, 40), "value": (101, 2, 24)},
        {"ends": ends(33, 0, 1, 67)},
    ),
    "attention on a cache": Call(
        lambda query, keys, values, sinks, lengths: ops.attention_decode(
            query, keys, values, lengths=lengths, sinks=sinks, window=200
        ),
        {"query": (3, 4, 1, 40), "keys": (3, 2, 300, 40), "values": (3, 2, 300, 40), "sinks": (4,)},
        {"lengths": torch.tensor([300, 1, 77])},
        differentiable=False,
    ),
}  # fmt: skip
CAPTURED = [name for name, call in CALLS.items() if call.captured]
ANSWERED = [name for name, call in CALLS.items() if not call.drawn]
# One of each family, rehearsed on a CPU by every body.
REHEARSED = ["conv 1-D causal", "gru", "lstm cell", "attention causal, grouped"]
REHEARSED += ["attention of sequences", "attention on a cache"]


def placed(tensor: Tensor, device: str | torch.device) -> Tensor:
    """The tensor on a device with its strides and its offset; `.to` would pack a view densely."""
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return storage.to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


@contextmanager
def precision(tf32: bool):
    """Products of float32 in tf32, by torch's switches for matrices and for cuDNN's layers, or in float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def full_precision():
    """float32 products in float32: what the rule compares with."""
    return precision(tf32=False)


def chosen_backends(run: Callable[[], object]) -> set[tuple[str, str]]:
    """Every (operator, backend) that was chosen while `run` ran."""
    seen = set()
    with dispatch.recording(lambda op, call, chosen: seen.add((op.name, chosen.name))):
        run()
    return seen


def answers_of(call: Call, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """On the CPU: the reference's float32 results in the dtype, and its float64 ones of the same inputs."""
    given = call.leaves(dtype, "cpu")
    with pyarch.backend("reference"):
        near = call.outcome({name: each.float() for name, each in given.items()})
    wide = call.outcome({name: each.double() for name, each in given.items()})
    return near, wide


def hold(call: Call, dtype: torch.dtype, ours: dict[str, Tensor], noise: float | None = None) -> None:
    """Hold results and gradients to the rule, see ROUNDINGS; `noise` stands in where products are coarser."""
    noise = ROUNDINGS[dtype] * torch.finfo(dtype).eps if noise is None else noise
    near, wide = answers_of(call, dtype)
    assert set(ours) == set(wide)
    largest = max((largest_of(each) for name, each in wide.items() if name.startswith("grad")), default=0.0)
    assert largest > 0 or not call.differentiable, "every gradient is zero, the case proves nothing"
    for name, result in ours.items():
        layer = largest if name.startswith("grad") else 0.0
        check(name, result.cpu(), near[name].to(result.dtype), wide[name], layer, noise)


def largest_of(tensor: Tensor) -> float:
    return tensor.nan_to_num(0, 0, 0).abs().max().item()


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal bit by bit, NaN too."""
    assert set(ours) == set(expected)
    for name, each in ours.items():
        assert each.dtype == expected[name].dtype
        is_same = torch.equal(each, expected[name]) or torch.equal(
            each.nan_to_num(17), expected[name].nan_to_num(17)
        )
        differing = (each != expected[name]).sum().item() if not is_same else 0
        assert is_same, f"{name}: {differing} of {each.numel()} elements differ"
