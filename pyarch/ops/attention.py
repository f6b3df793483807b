"""Attention on four-dimensional tensors: autocast, checks, the choice of a backend.

float32, 16-bit and float64 calls become one operator, whose backward is chosen on its own and which can be
differentiated twice. What `auto` leaves to torch on a CPU is torch's own function and autograd, whose fused
kernel cannot. Forward-mode and functorch transforms run on the differentiable reference.

The public function is in attention_functions.py.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter

import torch
from torch import Tensor

from pyarch.dispatch import Verdict, settled_backend
from pyarch.ops import attention_cpu, attention_torch
from pyarch.ops.attention_autograd import forward_of, run_tracked, run_tracked_weights, weights_of
from pyarch.ops.attention_call import BACKWARD, FORWARD, WEIGHTS, AttentionCall, describe, misfit
from pyarch.ops.attention_measured import forward_concessions
from pyarch.ops.kernel_refusals import KERNEL_DTYPES
from pyarch.ops.plain_calls import Decisions, is_ordinary, is_plain, under_transform, without_autocast
from pyarch.reference import attention as reference
from pyarch.reference.attention import Extras, Settings, visible

__all__ = [
    "BACKWARD",
    "FORWARD",
    "NO_EXTRAS",
    "WEIGHTS",
    "AttentionCall",
    "Extras",
    "Settings",
    "attend",
    "draw_seed",
    "explain",
    "run",
    "visible",
]

NO_EXTRAS = Extras()
DTYPES = (*KERNEL_DTYPES, torch.float64)
WEIGHTS_CHOICES = (None, "mean", "heads")


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    extras: Extras = NO_EXTRAS,
    settings: Settings | None = None,
    *,
    return_weights: str | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Attend, differentiably, twice too.

    Args:
        query: (B, H, Tq, D), float32, bfloat16, float16 or float64, of any strides.
        key: (B, Hk, Tk, D), H a multiple of Hk.
        value: (B, Hk, Tk, Dv).
        extras, settings: see `Extras` and `Settings`; None is scale 1 / sqrt(D) and nothing else.
        return_weights: None, "heads" for probabilities (B, H, Tq, Tk), "mean" for their mean (B, Tq, Tk).
        return_lse: whether to return lse (B, H, Tq), float32 or float64.
        backend: a backend's name or "auto".

    Returns:
        out (B, H, Tq, Dv), or a tuple (out[, weights][, lse]).

    Raises:
        ValueError, TypeError: shapes or dtypes do not fit; the message says which.
        NotImplementedError: a backend asked for by name refuses the call.
    """
    if settings is None:
        settings = Settings(query.shape[-1] ** -0.5)
    return run(query, key, value, extras, settings, return_weights, return_lse, backend, _refuse)


def _refuse(error: Exception):
    raise error


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    extras: Extras,
    settings: Settings,
    return_weights: str | None,
    return_lse: bool,
    backend: str,
    otherwise: Callable,
) -> Tensor | tuple[Tensor, ...]:
    """`attend`, which calls `otherwise` with the error for what is no call of ours and returns its result."""
    compiling = torch.compiler.is_compiling()
    if not compiling:
        backend = settled_backend(backend)
    like = None if compiling else _likeness(query, key, value, extras, settings, return_weights, backend)
    known = None if like is None else _decided.get(like)
    if known is None:
        query, key, value, extras = as_autocast_casts(query, key, value, extras)
        error = _fault(query, key, value, extras, settings)
        if error is not None:
            return otherwise(error)
        if return_weights not in WEIGHTS_CHOICES:
            raise ValueError(f"return_weights must be None, 'mean' or 'heads', got {return_weights!r}")
        if not compiling and under_transform():
            return _differentiable(query, key, value, extras, settings, return_weights, return_lse)
        known = _decided.remember(like, _decide(query, key, value, extras, settings, return_weights, backend))
    kernel, weights_kernel, save, by_torch = known
    if compiling:
        query, key, value = each_once(query, key, value)
    if by_torch and return_weights is None and not return_lse:
        return without_autocast(attention_torch.attend, query.device, query, key, value, extras, settings)
    if weights_kernel is not None and attention_cpu.make_both(kernel, weights_kernel):
        kernel, weights_kernel = attention_cpu.out_and_weights(return_weights == "mean")
    if save:
        given = () if extras is NO_EXTRAS else extras
        out, lse = run_tracked(kernel, settings, backend, query, key, value, *given)
    else:
        out, lse = forward_of(kernel, query, key, value, extras, settings, False, backend)
    if return_weights is None:
        return (out, lse) if return_lse else out
    mean = return_weights == "mean"
    if save:
        weights = run_tracked_weights(weights_kernel, settings, mean, backend, query, key, lse, *extras)
    else:
        weights = weights_of(weights_kernel, query, key, lse, extras, settings, mean, backend)
    return (out, weights, lse) if return_lse else (out, weights)


def each_once(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same as three tensors: torch.compile takes none twice in an autograd function."""
    value = value.view_as(value) if value is query or value is key else value
    return query, key.view_as(key) if key is query else key, value


def _likeness(query, key, value, extras, settings, return_weights, backend) -> tuple | None:
    """What a plain eager call has in common with those that are decided as it is; None for any other call."""
    if extras is NO_EXTRAS:
        present = query, key, value
        kinds = _KIND(query), _KIND(key), _KIND(value)
    else:
        present = [each for each in (query, key, value, *extras) if each is not None]
        kinds = tuple(each if each is None else _KIND(each) for each in (query, key, value, *extras))
    if not is_ordinary(present):
        return None
    return settings, backend, torch.is_grad_enabled(), return_weights, kinds


_decided = Decisions()
_KIND = attrgetter("shape", "dtype", "device", "layout", "requires_grad")


def _decide(query, key, value, extras, settings, return_weights, backend) -> tuple:
    """How to run a call.

    The kernels of out and weights, None where the opaque operator chooses; whether a backward may come;
    whether out alone is torch's function, with torch's autograd where a backward may come.
    """
    differentiable = query, key, value, extras.bias, extras.sinks, extras.distance_bias
    save = torch.is_grad_enabled() and any(each.requires_grad for each in differentiable if each is not None)
    present = [each for each in (query, key, value, *extras) if each is not None]
    if not is_plain(present) or query.device.type == "meta":
        return None, None, save, False
    bias_grad = save and extras.bias is not None and extras.bias.requires_grad
    call = describe(query, key, value, extras, settings, save, bias_grad)
    kernel = FORWARD.choose(call, backend)
    weights_kernel = WEIGHTS.choose(call, backend) if return_weights is not None else None
    conceded = backend == "auto" and any(forward_concessions(call))
    return kernel, weights_kernel, save, kernel.name == "torch" and (conceded or not save)


def _differentiable(query, key, value, extras, settings, return_weights, return_lse):
    """The same by the reference, for transforms."""
    out, lse = without_autocast(reference.attention, query.device, query, key, value, extras, settings)
    results = [out]
    if return_weights is not None:
        settings = settings, return_weights == "mean"
        results.append(
            without_autocast(reference.weights_from, query.device, query, key, lse, extras, *settings)
        )
    if return_lse:
        results.append(lse)
    return results[0] if len(results) == 1 else tuple(results)


def draw_seed(settings: Settings, device: torch.device) -> Tensor | None:
    """A new seed of dropout from torch's generator of the device; None where nothing is drawn."""
    if not 0 < settings.dropout_p < 1:
        return None
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)


# -------------------------------------------------------------------------------- which calls are ours


def _fault(query, key, value, extras: Extras, settings: Settings) -> Exception | None:
    """The error that a call is, None for one that the kernels carry."""
    dtype, device = query.dtype, query.device
    if dtype not in DTYPES or key.dtype != dtype or value.dtype != dtype:
        return TypeError(
            "query, key and value must have one dtype, float32, bfloat16, float16 or float64, got "
            f"{dtype}, {key.dtype} and {value.dtype}"
        )
    for name, tensor, allowed in (
        ("mask", extras.mask, (torch.bool,)),
        ("bias", extras.bias, (dtype, torch.float32)),
        ("padding", extras.padding, (torch.bool,)),
        ("the mask of global tokens", extras.global_mask, (torch.bool,)),
        ("sinks", extras.sinks, (dtype, torch.float32)),
        ("seed", extras.seed, (torch.int64,)),
        ("distance_bias", extras.distance_bias, (dtype, torch.float32)),
    ):
        if tensor is not None and tensor.dtype not in allowed:
            names = " or ".join(str(each) for each in dict.fromkeys(allowed))
            return TypeError(f"{name} must be {names}, got {tensor.dtype}")
    for tensor in (key, value, *extras):
        if tensor is not None and (tensor.device != device or tensor.layout != torch.strided):
            return ValueError(f"all tensors must be strided and on {device}, got one on {tensor.device}")
    if query.layout != torch.strided:
        return ValueError(f"all tensors must be strided, got {query.layout}")
    shapes = (
        each if each is None else each.shape for each in (key, value, *extras[:5], extras.distance_bias)
    )
    wrong = misfit(query.shape, *shapes)
    if wrong is not None:
        return ValueError(wrong)
    return fault_of_settings(extras, settings)


def fault_of_settings(extras: Extras, settings: Settings) -> Exception | None:
    """The error that the numbers of a call are, or its seed; None for good ones."""
    if not 0 <= settings.dropout_p <= 1:
        return ValueError(f"dropout_p must lie in 0 to 1, got {settings.dropout_p}")
    # Two questions: torch.compile may hold dropout_p as a symbol, and compares no bool with a symbolic one.
    if (extras.seed is None) if 0 < settings.dropout_p < 1 else (extras.seed is not None):
        return ValueError("seed must be given exactly when 0 < dropout_p < 1")
    for name, reach in (("left", settings.left), ("right", settings.right)):
        if reach is not None and reach < 0:
            return ValueError(f"the window must reach 0 or more keys to each side, got {name} {reach}")
    if settings.dilation < 1:
        return ValueError(f"dilation must be at least 1, got {settings.dilation}")
    if settings.global_tokens < 0:
        return ValueError(f"global_tokens must be at least 0, got {settings.global_tokens}")
    if settings.softcap < 0:
        return ValueError(f"softcap must be positive, or 0 or None for none, got {settings.softcap}")
    return None


def as_autocast_casts(query, key, value, extras: Extras) -> tuple[Tensor, Tensor, Tensor, Extras]:
    """The tensors as torch's autocast hands them to its own operator; sinks and biases of distances stay."""
    if query.device.type == "meta" or not torch.is_autocast_enabled(query.device.type):
        return query, key, value, extras
    target = torch.get_autocast_dtype(query.device.type)

    def cast(tensor: Tensor) -> Tensor:
        is_cast = tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(target) if is_cast else tensor

    bias = None if extras.bias is None else cast(extras.bias)
    return cast(query), cast(key), cast(value), extras._replace(bias=bias)


# -------------------------------------------------------------------------------- explaining


def explain(
    query: Tensor, key: Tensor, value: Tensor, extras: Extras = NO_EXTRAS, settings: Settings | None = None
) -> dict[str, tuple[Verdict, ...]]:
    """What every backend says of a call that a backward follows, for "forward" and "backward".

    Arguments as of `attend`.
    """
    if settings is None:
        settings = Settings(query.shape[-1] ** -0.5)
    if _fault(query, key, value, extras, settings) is not None:
        kind = f"{query.dtype} query {tuple(query.shape)} on key {tuple(key.shape)}"
        only_stock = (Verdict("torch", (), (f"{kind}: torch's own operator runs it directly",)),)
        return {"forward": only_stock, "backward": only_stock}
    bias_grad = extras.bias is not None and extras.bias.requires_grad
    call = describe(query, key, value, extras, settings, True, bias_grad)
    return {"forward": FORWARD.explain(call), "backward": BACKWARD.explain(call)}
