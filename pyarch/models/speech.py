"""CNN + BiLSTM for speech: a VGG front over spectrogram frames, and a stack of bidirectional LSTM layers.

T. Hori, S. Watanabe, Y. Zhang, W. Chan. Advances in Joint CTC-Attention based End-to-End Speech Recognition
with a Deep CNN Encoder and RNN-LM. 2017, arXiv:1706.02737.

    scores = W bilstm^4(vgg(frames)) + b,    vgg: four 3x3 convolutions, halving time and features twice

Shown: utterances of unequal length, packed, through a deep bidirectional stack. It is the paper's encoder,
read by its CTC branch alone; the projections between the layers are left out, so that torch runs the stack as
one module.

N utterances, T frames at most, F features a frame.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .ctc import BLANK, ctc_loss
from .sentences import beyond


@dataclass(frozen=True)
class Config:
    """Sizes of the model: channels of the two convolution blocks, hidden units of one direction."""

    features: int
    channels: tuple[int, int]
    hidden: int
    layers: int
    classes: int
    batch: int
    sounds: int


# Widths and depth of the paper, 80 filterbanks, up to three seconds of 10 ms frames.
REAL = Config(features=80, channels=(64, 128), hidden=320, layers=4, classes=30, batch=2, sounds=25)
TINY = Config(features=8, channels=(8, 8), hidden=16, layers=2, classes=5, batch=8, sounds=3)

REDUCTION = 4  # frames that the convolutions make one
SHORTEST, LONGEST = 8, 12  # frames of one sound


def block(inputs: int, outputs: int) -> list[nn.Module]:
    """Return two 3x3 convolutions with ReLUs and a pooling that halves time and features, rounded up."""
    return [
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2, ceil_mode=True),
    ]


class SpeechModel(nn.Module):
    """Convolutions over time and features, bidirectional LSTM layers, a linear classifier of each frame."""

    def __init__(self, config: Config):
        super().__init__()
        first, second = config.channels
        self.convolutions = nn.Sequential(*block(1, first), *block(first, second))
        self.lstm = nn.LSTM(
            second * -(-config.features // REDUCTION),
            config.hidden,
            config.layers,
            batch_first=True,
            bidirectional=True,
        )
        self.classifier = nn.Linear(2 * config.hidden, config.classes)

    def forward(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Score the sounds.

        Args:
            frames: (N, T, F), zero past the end of an utterance.
            lengths: (N,) int64, frames of each.

        Returns:
            Scores (T / 4, N, classes), class 0 the blank, and the lengths (N,) among them; both rounded up.
        """
        features = self.convolutions(frames.unsqueeze(1))  # (N, C, T / 4, F / 4)
        columns = features.transpose(1, 2).flatten(2)
        lengths = (lengths + REDUCTION - 1) // REDUCTION
        # Packing reads the lengths on the host.
        packed = pack_padded_sequence(columns, lengths.cpu(), batch_first=True, enforce_sorted=False)
        hidden, _ = pad_packed_sequence(self.lstm(packed)[0], total_length=columns.shape[1])
        return self.classifier(hidden), lengths


def build(config: Config) -> nn.Module:
    """Return a speech model with torch's default initialisation."""
    return SpeechModel(config)


def batch(config: Config, seed: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return ((frames, lengths), labels): name the sounds of each utterance in their order.

    An utterance is one to `sounds` sounds of SHORTEST to LONGEST frames, none twice in a row. Sound k raises
    every feature whose number is k modulo the number of sounds by twice the deviation of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    kinds, N, S = config.classes - 1, config.batch, config.sounds
    steps = torch.randint(1, kinds, (N, S), generator=generator)
    sounds = steps.cumsum(1) % kinds
    count = torch.randint(1, S + 1, (N, 1), generator=generator)
    spoken = torch.arange(S) < count
    frames_each = torch.randint(SHORTEST, LONGEST + 1, (N, S), generator=generator) * spoken
    ends = frames_each.cumsum(1)
    T = S * LONGEST
    place = torch.searchsorted(ends, torch.arange(T).expand(N, T).contiguous(), right=True)
    at_frame = sounds.gather(1, place.clamp(max=S - 1))
    raised = torch.arange(config.features) % kinds == at_frame.unsqueeze(2)
    noise = torch.randn(N, T, config.features, generator=generator)
    lengths = ends[:, -1]
    silent = beyond(lengths, T)
    frames = (noise + 2.0 * raised).masked_fill(silent.unsqueeze(2), 0.0)
    return (frames, lengths), torch.where(spoken, sounds + 1, BLANK)


def inputs(config: Config, seed: int) -> tuple[Tensor, Tensor]:
    """Return (frames, lengths), of shapes (batch, sounds * LONGEST, features) and (batch,) int64."""
    return batch(config, seed)[0]


def loss(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    """Return the mean CTC loss for each sound of (scores, lengths) and labels (N, sounds)."""
    return ctc_loss(*output, target)
