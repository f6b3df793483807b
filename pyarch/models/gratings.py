"""Striped images whose label is the direction of the stripes: the task of the vision models.

    image[y, x] = sin(2 pi (x cos a + y sin a) / period + phase) + noise,    a = pi label / classes

The phase is random in each image, so no pixel tells the label: only a filter that spans several pixels does.
Labels are given per pixel, which makes the same images a task for classification (one label an image)
and for segmentation (one label a region).
"""

import math

import torch
from torch import Tensor

PERIOD = 8.0  # pixels
NOISE = 0.3  # standard deviation, against an amplitude of 1


def gratings(labels: Tensor, classes: int, generator: torch.Generator) -> Tensor:
    """Return striped colour images for a map of labels.

    Args:
        labels: (N, H, W) integers below `classes`; expanded tensors are welcome.
        classes: how many directions the half circle is divided into.
        generator: source of the phases and of the noise.

    Returns:
        (N, 3, H, W) float32 images.
    """
    N, H, W = labels.shape
    angle = labels * (math.pi / classes)
    y = torch.arange(H).view(H, 1)
    x = torch.arange(W).view(1, W)
    phase = 2 * math.pi * torch.rand(N, 1, 1, generator=generator)
    stripes = torch.sin(2 * math.pi * (x * angle.cos() + y * angle.sin()) / PERIOD + phase)
    return stripes.unsqueeze(1) + NOISE * torch.randn(N, 3, H, W, generator=generator)


def classification(N: int, size: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return images (N, 3, size, size) float32 and labels (N,) int64; every class appears where N allows."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randperm(N, generator=generator) % classes
    images = gratings(target.view(N, 1, 1).expand(N, size, size), classes, generator)
    return images, target


def segmentation(N: int, size: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return images (N, 3, size, size) float32 and label maps (N, size, size) int64: a disc on a ground."""
    generator = torch.Generator().manual_seed(seed)
    outside = torch.randint(classes, (N, 1, 1), generator=generator)
    inside = (outside + torch.randint(1, classes, (N, 1, 1), generator=generator)) % classes
    centre_y = size * (0.3 + 0.4 * torch.rand(N, 1, 1, generator=generator))
    centre_x = size * (0.3 + 0.4 * torch.rand(N, 1, 1, generator=generator))
    y = torch.arange(size).view(1, size, 1)
    x = torch.arange(size).view(1, 1, size)
    disc = (y - centre_y) ** 2 + (x - centre_x) ** 2 < (0.3 * size) ** 2
    target = torch.where(disc, inside, outside)
    return gratings(target, classes, generator), target
