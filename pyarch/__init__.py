"""pyarch makes the PyTorch models people already have faster: `pyarch.swap(model)`.

Attention, recurrent and depthwise-convolution layers become drop-in subclasses of torch.nn's own that run
fused kernels, with the same parameters and the same state_dict; `pyarch.verify` proves outputs and gradients.
"""

from pathlib import Path

__version__ = "0.1.0"

# In a clone that is not installed, triton_kernels stands beside this folder and is imported as ours.
_sibling = Path(__file__).parent.parent
if (_sibling / "triton_kernels" / "configs").is_dir() and str(_sibling) not in __path__:
    __path__.append(str(_sibling))

from pyarch import integrations, nn, ops  # noqa: E402
from pyarch.attention_context import attention_context  # noqa: E402
from pyarch.dispatch import backend  # noqa: E402
from pyarch.explain import explain  # noqa: E402
from pyarch.info import info  # noqa: E402
from pyarch.maps import AttentionMaps, attention_maps  # noqa: E402
from pyarch.nn.config import Config  # noqa: E402
from pyarch.swap import apply_report, swap, swapped  # noqa: E402
from pyarch.swap_report import SwapReport  # noqa: E402
from pyarch.verify import verify  # noqa: E402

__all__ = [
    "AttentionMaps",
    "Config",
    "SwapReport",
    "apply_report",
    "attention_context",
    "attention_maps",
    "backend",
    "explain",
    "info",
    "integrations",
    "nn",
    "ops",
    "swap",
    "swapped",
    "verify",
]
