"""Drop-in layers: torch.nn's classes of the same names, computed by pyarch's operators."""

from pyarch.nn.config import Config
from pyarch.nn.conv import Conv1d, Conv2d, Conv3d

__all__ = ["Config", "Conv1d", "Conv2d", "Conv3d"]
