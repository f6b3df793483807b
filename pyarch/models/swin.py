"""Swin: a Transformer over images whose tokens attend inside small windows, which every other layer shifts.

Z. Liu, Y. Lin, Y. Cao, H. Hu, Y. Wei, Z. Zhang, S. Lin, B. Guo. Swin Transformer: Hierarchical Vision
Transformer using Shifted Windows. 2021, arXiv:2103.14030.

    layer(x) = y + ffn(norm(y)),   y = x + attention(norm(x))          windows shifted in every second layer
    attention = softmax(q k^T / sqrt(D) + bias) v inside each window, bias learned by relative position

Shown: attention over many small windows with a learned bias and, where the windows are shifted, a mask. The
attention is written out as in torchvision, with the names of its attributes and parameters.

The paper also drops whole branches at random in training, which is left out.

N images, H x W tokens, C features, windows of S x S tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .gratings import classification


@dataclass(frozen=True)
class Config:
    """Sizes of a Swin; each stage but the first has half the resolution and twice the width of the last."""

    depths: tuple[int, ...]
    heads: tuple[int, ...]
    width: int
    window: int
    patch: int
    classes: int
    batch: int
    resolution: int


# Swin-T of the paper, at its resolution.
REAL = Config(
    depths=(2, 2, 6, 2),
    heads=(3, 6, 12, 24),
    width=96,
    window=7,
    patch=4,
    classes=8,
    batch=1,
    resolution=224,
)
# Of 10 x 10 and 5 x 5 tokens: neither is a multiple of the window.
TINY = Config(depths=(2, 2), heads=(2, 4), width=16, window=4, patch=4, classes=4, batch=8, resolution=40)

HIDDEN = -100.0  # added to the score of a token of another part of the image
SPREAD = 0.02  # deviation of the first weights


class WindowAttention(nn.Module):
    """Attention inside windows of (N, H, W, C), rolled before by `shift_size` and back after it."""

    def __init__(self, width: int, heads: int, window: int, shift: int):
        super().__init__()
        self.num_heads = heads
        self.window_size = [window, window]
        self.shift_size = [shift, shift]
        self.attention_dropout = 0.0
        self.dropout = 0.0
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        place = torch.cartesian_prod(torch.arange(window), torch.arange(window))
        apart = place[:, None] - place + window - 1  # (S * S, S * S, 2)
        index = apart[..., 0] * (2 * window - 1) + apart[..., 1]
        self.register_buffer("relative_position_index", index.flatten())

    def forward(self, x: Tensor) -> Tensor:
        N, H, W, C = x.shape
        size = self.window_size[0]
        # One window that holds the whole image is not shifted.
        shift = [by if length > size else 0 for by, length in zip(self.shift_size, (H, W), strict=True)]
        x = F.pad(x, (0, 0, 0, -W % size, 0, -H % size))
        if any(shift):
            x = x.roll((-shift[0], -shift[1]), (1, 2))
        padded = x.shape
        windows = self._windows(x)  # (N, n, S * S, C)

        qkv = F.linear(windows, self.qkv.weight, self.qkv.bias).unflatten(3, (3, self.num_heads, -1))
        query, key, value = qkv.permute(3, 0, 1, 4, 2, 5)  # (N, n, heads, S * S, C / heads)
        scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5 + self._bias()
        if any(shift):
            scores = scores + self._hidden(padded[1:3], shift, x)
        attended = (scores.softmax(-1) @ value).transpose(2, 3).flatten(3)
        x = F.linear(attended, self.proj.weight, self.proj.bias)

        x = x.view(N, padded[1] // size, padded[2] // size, size, size, C).transpose(2, 3).reshape(padded)
        if any(shift):
            x = x.roll(shift, (1, 2))
        return x[:, :H, :W]

    def _windows(self, x: Tensor) -> Tensor:
        """Cut (N, H, W, C) into windows (N, n, S * S, C)."""
        size = self.window_size[0]
        return x.unflatten(1, (-1, size)).unflatten(3, (-1, size)).transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def _bias(self) -> Tensor:
        """The learned bias of each pair of tokens in a window, (heads, S * S, S * S)."""
        tokens = self.window_size[0] ** 2
        bias = self.relative_position_bias_table[self.relative_position_index]
        return bias.view(tokens, tokens, -1).permute(2, 0, 1)

    def _hidden(self, image: tuple[int, int], shift: list[int], like: Tensor) -> Tensor:
        """HIDDEN for two tokens that only the roll brought together, else 0: (n, 1, S * S, S * S)."""
        sizes = zip(image, self.window_size, shift, strict=True)
        rows, columns = (
            torch.arange(length, device=like.device).ge(length - size).long()
            + torch.arange(length, device=like.device).ge(length - by).long()
            for length, size, by in sizes
        )
        parts = self._windows((3 * rows[:, None] + columns)[None, :, :, None])[0]  # (n, S * S, 1)
        apart = parts != parts.transpose(1, 2)
        return HIDDEN * apart.unsqueeze(1).to(like.dtype)


class Layer(nn.Module):
    """Attention and feed-forward, each on a residual branch with normalisation before it."""

    def __init__(self, width: int, heads: int, window: int, shift: int):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = WindowAttention(width, heads, window, shift)
        self.norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.norm(x))


class PatchMerging(nn.Module):
    """Join 2 x 2 tokens into one of twice the width; an odd side is padded."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        x = x.unflatten(1, (-1, 2)).unflatten(3, (-1, 2))  # (N, H / 2, 2, W / 2, 2, C)
        return self.reduction(self.norm(x.permute(0, 1, 3, 4, 2, 5).flatten(3)))


class Swin(nn.Module):
    """Patches of the image, stages of layers with patch merging between them, a linear classifier."""

    def __init__(self, config: Config):
        super().__init__()
        width = config.width
        self.patches = nn.Conv2d(3, width, config.patch, stride=config.patch)
        self.patches_norm = nn.LayerNorm(width)
        stages: list[nn.Module] = []
        for stage, (depth, heads) in enumerate(zip(config.depths, config.heads, strict=True)):
            if stage:
                stages.append(PatchMerging(width))
                width *= 2
            shifts = [config.window // 2 * (layer % 2) for layer in range(depth)]
            stages += [Layer(width, heads, config.window, shift) for shift in shifts]
        self.stages = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, config.classes)
        self._initialise()

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to scores (N, classes)."""
        x = self.patches_norm(self.patches(images).permute(0, 2, 3, 1))  # (N, H, W, C)
        return self.classifier(self.norm(self.stages(x)).mean((1, 2)))

    def _initialise(self) -> None:
        """Draw linear weights and bias tables as the paper: normal, cut off at two units."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=SPREAD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, WindowAttention):
                nn.init.trunc_normal_(module.relative_position_bias_table, std=SPREAD)


def build(config: Config) -> nn.Module:
    """Return a Swin with the paper's initialisation."""
    return Swin(config)


def batch(config: Config, seed: int) -> tuple[tuple[Tensor], Tensor]:
    """Return ((images,), labels): tell the direction of stripes."""
    images, target = classification(config.batch, config.resolution, config.classes, seed)
    return (images,), target


def inputs(config: Config, seed: int) -> tuple[Tensor]:
    """Return (images,), of shape (batch, 3, resolution, resolution)."""
    return batch(config, seed)[0]


def loss(output: Tensor, target: Tensor) -> Tensor:
    """Return the cross entropy of scores (N, classes) and labels (N,)."""
    return F.cross_entropy(output, target)
