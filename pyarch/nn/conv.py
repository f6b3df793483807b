"""Conv1d, Conv2d and Conv3d that run depthwise calls (groups == in_channels) on pyarch's kernels.

Constructor, parameters, state_dict, repr, errors and results are torch's; a layer that is not depthwise
computes as its stock class does. The weight is read at every call, so parametrizations, weight_norm and
functional_call work.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyarch.dispatch import Verdict
from pyarch.nn.drop_in import DropIn
from pyarch.ops import conv


def is_depthwise(module: torch.nn.Module) -> bool:
    """Whether a convolution gives every input channel kernels of its own."""
    return module.groups == module.in_channels


def settings_of(module: torch.nn.Module) -> tuple:
    """Stride, padding, dilation, groups, padding mode; somebody may have set lists, which torch takes too."""
    padding = module.padding if isinstance(module.padding, str) else tuple(module.padding)
    return tuple(module.stride), padding, tuple(module.dilation), module.groups, module.padding_mode


class _DepthwiseDropIn(DropIn):
    """The one computation of the three classes."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not is_depthwise(self):
            return super()._conv_forward(input, weight, bias)
        return conv.convolve(input, weight, bias, *settings_of(self), self.requested_backend())

    def explain(self, *inputs: Tensor) -> dict[str, tuple[Verdict, ...]]:
        """What each backend says of a call on input (N, C, *spatial), for "forward" and "backward"."""
        return conv.explain(inputs[0], self.weight, self.bias, *settings_of(self))


class Conv1d(_DepthwiseDropIn, torch.nn.Conv1d):
    __doc__ = torch.nn.Conv1d.__doc__


class Conv2d(_DepthwiseDropIn, torch.nn.Conv2d):
    __doc__ = torch.nn.Conv2d.__doc__


class Conv3d(_DepthwiseDropIn, torch.nn.Conv3d):
    __doc__ = torch.nn.Conv3d.__doc__
