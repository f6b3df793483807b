"""Strips of rendered digits, each at a place of its own, whose label is the number: the task of the CRNN."""

import torch
from torch import Tensor

# Five columns of seven rows; a digit is read from left to right, its top row in the lowest bit.
FONT = (
    (0x3E, 0x51, 0x49, 0x45, 0x3E),
    (0x00, 0x42, 0x7F, 0x40, 0x00),
    (0x42, 0x61, 0x51, 0x49, 0x46),
    (0x21, 0x41, 0x45, 0x4B, 0x31),
    (0x18, 0x14, 0x12, 0x7F, 0x10),
    (0x27, 0x45, 0x45, 0x45, 0x39),
    (0x3C, 0x4A, 0x49, 0x49, 0x30),
    (0x01, 0x71, 0x09, 0x05, 0x03),
    (0x36, 0x49, 0x49, 0x49, 0x36),
    (0x06, 0x49, 0x49, 0x29, 0x1E),
)
ROWS = 7
SCALE = (4, 3)  # pixels a bit: glyphs of 28 x 15 pixels
NOISE = 0.2  # standard deviation, against ink of 1


def glyphs() -> Tensor:
    """Return the ten digits as (10, 28, 15) float32 images of 0 and 1."""
    columns = torch.tensor(FONT)
    bits = columns.unsqueeze(1) >> torch.arange(ROWS).view(1, ROWS, 1) & 1
    return bits.float().repeat_interleave(SCALE[0], 1).repeat_interleave(SCALE[1], 2)


def strips(N: int, height: int, width: int, places: int, kinds: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return images of one to `places` digits and their labels.

    Args:
        N: strips.
        height, width: pixels; at least 28, and 15 for each place.
        places: digits at most; each place is `width // places` pixels wide.
        kinds: how many of the ten digits appear, from 0 on.
        seed: of the digits, their places and the noise.

    Returns:
        (N, 1, height, width) float32 images, and (N, places) int64 labels: digit + 1, filled up with 0.
    """
    generator = torch.Generator().manual_seed(seed)
    ink = glyphs()
    digits = torch.randint(kinds, (N, places), generator=generator)
    count = torch.randint(1, places + 1, (N, 1), generator=generator)
    shown = torch.arange(places) < count
    place = width // places
    slack = height - ink.shape[1], place - ink.shape[2]
    down = torch.randint(slack[0] + 1, (N, places), generator=generator)
    right = torch.randint(slack[1] + 1, (N, places), generator=generator)
    image = NOISE * torch.randn(N, 1, height, width, generator=generator)
    for n, p in shown.nonzero().tolist():
        left, top = p * place + right[n, p], down[n, p]
        image[n, 0, top : top + ink.shape[1], left : left + ink.shape[2]] += ink[digits[n, p]]
    return image, torch.where(shown, digits + 1, 0)
