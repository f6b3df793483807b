"""The functional forms of pyarch's operators."""

from pyarch.ops.conv import depthwise_conv

__all__ = ["depthwise_conv"]
