"""Hugging Face transformers: `attn_implementation="pyarch"`.

    pyarch.integrations.transformers.register()
    model.set_attn_implementation("pyarch")

transformers asks one registry for the attention function and another for the function that builds its mask.
With the first alone a mask arrives as None and a causal model sees the future, so one call registers both.
"""

from __future__ import annotations

import re
from contextlib import ExitStack

__all__ = ["register"]

# The first release whose mask functions are told where queries and keys begin.
_OLDEST = (5, 4)


def register(name: str = "pyarch") -> None:
    """Make pyarch's attention known to transformers, under a name for `attn_implementation`.

    Models then choose it as they choose any other: `from_pretrained(..., attn_implementation=name)`,
    `from_config`, or `model.set_attn_implementation(name)` and back with "sdpa". Causal, sliding and padded
    masks are not built: the kernels are told the pattern and skip what it hides. Other masks (packed
    sequences, chunks, image tokens, static caches, a mask of your own), and all masks of a model that
    torch.compile or torch.export traces, are the ones that "sdpa" gets. What "sdpa" has not comes too:
    softcap, attention sinks, and weights where a model asks its layers for them.

    A query that sees no key, as one on left padding, gives zeros.

    Calling it again with the same name changes nothing. A process that loads the model needs the call too.

    Args:
        name: what `attn_implementation` will be.

    Raises:
        ImportError: transformers is missing or older than 5.4.
        ValueError: the name belongs to another implementation, or transformers reads something else into it.
    """
    _check_version()
    from transformers import AttentionInterface, AttentionMaskInterface

    from pyarch.integrations.transformers_attention import attention
    from pyarch.integrations.transformers_mask import mask

    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name) or "flash" in name:
        raise ValueError(
            f"name must be letters, digits, '_', '-' and '.', without 'flash', which transformers takes for "
            f"flash-attention; got {name!r}"
        )
    pairs = (AttentionMaskInterface, mask), (AttentionInterface, attention)
    if any(registry().get(name, function) is not function for registry, function in pairs):
        raise ValueError(f"{name!r} is another attention implementation of transformers, choose another name")
    with ExitStack() as undo:
        for registry, function in pairs:
            undo.callback(registry._global_mapping.pop, name, None)
            registry.register(name, function)
        undo.pop_all()


def _check_version() -> None:
    oldest = ".".join(map(str, _OLDEST))
    fix = f"needs {oldest} or later: pip install -U 'transformers>={oldest}'"
    try:
        import transformers
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError(f"transformers is not installed, {fix}") from error
    found = transformers.__version__
    if tuple(map(int, re.findall(r"\d+", found)[:2])) < _OLDEST:
        raise ImportError(f"transformers {found} is too old, {fix}")
