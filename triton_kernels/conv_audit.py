"""What the compile audit builds for depthwise convolution, and what must show in the machine code: data.

One case is one problem; its launches are planned from meta tensors exactly as a call plans them, so
together the cases reach every row of configs/conv.json on every architecture (a test holds that).
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from .conv_geometry import Window, window_of
from .conv_plan import plan_backward, plan_forward
from .launch import Launch, Requirement

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
# The share of 128-bit loads and of 128-bit stores that must show in a kernel where the layout allows them.
# Channels- last kernels load everything in vectors; channels-first ones load single taps besides, and every
# kernel that sums dw stores single sums.
SHARES = {
    ("channels_last", "depthwise_conv_forward_kernel"): Requirement(0.95, 0.95),
    ("channels_last", "depthwise_conv_backward_kernel"): Requirement(0.95, 0.1),
    ("channels_last", "depthwise_conv_backward_input_kernel"): Requirement(0.95, 0.95),
    ("channels_last", "depthwise_conv_backward_weight_kernel"): Requirement(0.95, 0.0),
    ("channels_first", "depthwise_conv_forward_kernel"): Requirement(0.09, 0.95),
    ("channels_first", "depthwise_conv_backward_kernel"): Requirement(0.1, 0.1),
    ("channels_first", "depthwise_conv_backward_input_kernel"): Requirement(0.09, 0.95),
    ("channels_first", "depthwise_conv_backward_weight_kernel"): Requirement(0.3, 0.0),
}


@dataclass(frozen=True)
class AuditCase:
    """One problem. `layout`: nchw, nhwc or nlc (a transposed one-dimensional input); `wide`: whether its
    kernels declare 128-bit accesses, which rows of an odd length and reflected columns rule out."""

    name: str
    input: tuple[int, ...]
    kernel: tuple[int, ...]
    dtype: torch.dtype = BF16
    layout: str = "nchw"
    stride: int = 1
    padding: tuple[int, int] | None = None
    padding_mode: str = "zeros"
    multiplier: int = 1
    backward: bool = True
    wide: bool = True

    @property
    def label(self) -> str:
        return f"{self.name} {self.layout} {NAMES[self.dtype]}"

    def requirement(self, kernel: str) -> Requirement:
        """What one of the case's kernels declares; nothing for kernels that are not listed."""
        family = "channels_last" if self.layout == "nhwc" else "channels_first"
        return SHARES.get((family, kernel), Requirement()) if self.wide else Requirement()

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Window]:
        """(input, weight, bias, output, window) on the meta device."""
        dims = len(self.kernel)
        channels = self.input[1]
        weight = torch.empty(channels * self.multiplier, 1, *self.kernel, dtype=self.dtype, device="meta")
        bias = torch.empty(channels * self.multiplier, dtype=self.dtype, device="meta")
        before, after = self.padding or (self.kernel[-1] // 2, self.kernel[-1] // 2)
        window = window_of(
            weight, [self.stride] * dims, [before, after] * dims, [1] * dims, self.padding_mode
        )
        shape = (self.input[0], weight.shape[0], *window.output_size(self.input[2:]))
        return self.empty(self.input), weight, bias, self.empty(shape), window

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        if self.layout == "nhwc":
            layout = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
            return torch.empty(shape, dtype=self.dtype, device="meta", memory_format=layout)
        return torch.empty(shape, dtype=self.dtype, device="meta")

    def launches(self, architecture: str) -> list[Launch]:
        """Every launch of the forward and, where asked, of a backward that needs all three gradients."""
        input, weight, bias, output, window = self.tensors()
        channels_last = self.layout == "nhwc"
        x = input.transpose(1, 2).contiguous().transpose(1, 2) if self.layout == "nlc" else input
        launches = plan_forward(x, weight, bias, output, window, channels_last, architecture)
        if self.backward:
            grads = (torch.empty_like(input), torch.empty_like(weight), torch.empty_like(bias))
            launches += plan_backward(output, x, weight, grads, window, channels_last, architecture)
        return launches

    def floor(self) -> dict[str, int]:
        """Least bytes and floating-point operations of the forward and of the backward (each tensor moved
        once)."""
        input, weight, bias, output, _ = self.tensors()
        small = weight.numel() + bias.numel()
        forward_bytes = (input.numel() + output.numel() + small) * self.dtype.itemsize
        backward_bytes = (2 * input.numel() + output.numel() + 2 * small) * self.dtype.itemsize
        flops = 2 * output.numel() * prod(self.kernel)
        return {
            "forward_bytes": forward_bytes,
            "forward_flops": flops,
            "backward_bytes": backward_bytes,
            "backward_flops": 2 * flops,
        }


MAP, WIDER, SMALL, LARGE = (8, 96, 56, 56), (8, 144, 56, 56), (8, 768, 7, 7), (2, 64, 32, 32)
VOLUME = (2, 64, 16, 16, 16)

AUDIT = (
    AuditCase("k4 causal", (8, 512, 2048), (4,), padding=(3, 0)),
    AuditCase("k4 causal", (8, 512, 2048), (4,), padding=(3, 0), layout="nlc", backward=False, wide=False),
    AuditCase("k31", (8, 256, 1000), (31,)),
    AuditCase("k31", (8, 256, 1000), (31,), dtype=FP32),
    AuditCase("3x3", MAP, (3, 3)),
    AuditCase("3x3", MAP, (3, 3), dtype=FP32),
    AuditCase("3x3", MAP, (3, 3), layout="nhwc"),
    AuditCase("3x3", MAP, (3, 3), dtype=FP32, layout="nhwc"),
    AuditCase("3x3 stride 2", WIDER, (3, 3), stride=2, wide=False),
    AuditCase("3x3 stride 2", WIDER, (3, 3), stride=2, layout="nhwc"),
    AuditCase("3x3 reflect", MAP, (3, 3), padding_mode="reflect", wide=False),
    AuditCase("3x3 multiplier 2", MAP, (3, 3), multiplier=2),
    AuditCase("7x7", MAP, (7, 7)),
    AuditCase("7x7", MAP, (7, 7), layout="nhwc"),
    AuditCase("7x7", MAP, (7, 7), dtype=FP32, layout="nhwc"),
    AuditCase("7x7 small map", SMALL, (7, 7), wide=False),
    AuditCase("31x31", LARGE, (31, 31)),
    AuditCase("31x31", LARGE, (31, 31), dtype=FP32),
    AuditCase("31x31", LARGE, (31, 31), layout="nhwc"),
    AuditCase("3x3x3", VOLUME, (3, 3, 3)),
    AuditCase("3x3x3", VOLUME, (3, 3, 3), layout="nhwc"),
)
