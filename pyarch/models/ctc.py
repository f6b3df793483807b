"""Connectionist temporal classification: labels of a sequence whose places in it nobody told.

A. Graves, S. Fernandez, F. Gomez, J. Schmidhuber. Connectionist Temporal Classification: Labelling
Unsegmented Sequence Data with Recurrent Neural Networks. 2006, ICML.

Every frame names a class or the blank; a reading drops repetitions first and blanks then. The loss is the
negative log probability of all frame sequences that read as the labels.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

BLANK = 0


def ctc_loss(scores: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
    """Return the mean loss for each label.

    Args:
        scores: (T, N, C), class BLANK first.
        lengths: (N,) int64, frames that count.
        target: (N, S) int64 labels from 1, filled up with BLANK.
    """
    labels = (target != BLANK).sum(1)
    return F.ctc_loss(scores.log_softmax(2), target, lengths, labels, blank=BLANK)


def read(scores: Tensor, lengths: Tensor) -> list[list[int]]:
    """Return the labels along each sequence's likeliest classes, repetitions and blanks dropped."""
    readings = []
    for classes, length in zip(scores.argmax(2).T, lengths.tolist(), strict=True):
        kept = torch.unique_consecutive(classes[:length])
        readings.append(kept[kept != BLANK].tolist())
    return readings
