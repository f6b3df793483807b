"""Distillation: a small encoder learns from what a large one says, thinks and looks at.

G. Hinton, O. Vinyals, J. Dean. Distilling the Knowledge in a Neural Network. 2015, arXiv:1503.02531.
V. Sanh, L. Debut, J. Chaumond, T. Wolf. DistilBERT, a distilled version of BERT: smaller, faster, cheaper and
lighter. 2019, arXiv:1910.01108.
X. Jiao, Y. Yin, L. Shang, X. Jiang, X. Chen, L. Li, F. Wang, Q. Liu. TinyBERT: Distilling BERT for Natural
Language Understanding. 2019, arXiv:1909.10351.

    loss = sum_m mse(W hidden_m, teacher's hidden_(g m))     layer m learns from layer g m; m = 0, the
                                                             embedding, has a matrix W of its own
         + sum_m T mse(weights_m, teacher's weights_(g m))   of attention, head by head, m > 0
         + tau^2 KL(softmax(teacher's scores / tau) || softmax(scores / tau))
         + cross entropy(scores, labels)

Shown: nn.MultiheadAttention that returns the weights of every head, through which gradients go; and a frozen
teacher beside the student that trains. TinyBERT compares attention before its softmax, which torch's module
does not return; this compares the weights.

N sentences, T words at most, H heads of both, W width, g layers of the teacher to one of the student.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import encoder
from .sentences import beyond


@dataclass(frozen=True)
class Size:
    """Width, hidden units of the feed-forward, layers."""

    width: int
    hidden: int
    layers: int


@dataclass(frozen=True)
class Config:
    """Sizes of teacher and student; both have the same heads, and the words of the teacher."""

    teacher: Size
    student: Size
    vocabulary: int
    heads: int
    dropout: float
    classes: int
    batch: int
    words: int


# Widths of BERT base and of TinyBERT, 6 of 12 layers and 2 of 4, a vocabulary of 8000 words.
REAL = Config(
    teacher=Size(768, 3072, 6),
    student=Size(312, 1200, 2),
    vocabulary=8000,
    heads=12,
    dropout=0.1,
    classes=5,
    batch=4,
    words=64,
)
TINY = Config(
    teacher=Size(32, 64, 4),
    student=Size(16, 32, 2),
    vocabulary=16,
    heads=4,
    dropout=0.0,
    classes=4,
    batch=32,
    words=11,
)

TEMPERATURE = 2.0


class Seen(NamedTuple):
    """What an encoder makes of sentences. What it makes of padding is 0.

    Args:
        scores: (N, classes).
        hidden: (N, T, W) behind the embedding and behind each layer.
        weights: (N, H, T, T) of each layer's attention.
    """

    scores: Tensor
    hidden: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]


class Lesson(NamedTuple):
    """What the student sees, its hidden states brought to the teacher's width, and what the teacher sees."""

    student: Seen
    teacher: Seen


class Layer(nn.Module):
    """Attention that shows its weights, and feed-forward, each with normalisation after its residual."""

    def __init__(self, size: Size, heads: int, dropout: float):
        super().__init__()
        self.attention = nn.MultiheadAttention(size.width, heads, dropout, batch_first=True)
        self.attention_norm = nn.LayerNorm(size.width)
        self.feed_forward = nn.Sequential(
            nn.Linear(size.width, size.hidden), nn.GELU(), nn.Linear(size.hidden, size.width)
        )
        self.norm = nn.LayerNorm(size.width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        """Map x (N, T, W) to the same shape and to weights (N, H, T, T)."""
        attended, weights = self.attention(
            x, x, x, key_padding_mask=padding, need_weights=True, average_attn_weights=False
        )
        x = self.attention_norm(x + self.dropout(attended))
        return self.norm(x + self.dropout(self.feed_forward(x))), weights


class Encoder(nn.Module):
    """Word and position embeddings, the layers, a linear classifier of the first word."""

    def __init__(self, config: Config, size: Size):
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary, size.width)
        self.positions = nn.Embedding(config.words, size.width)
        self.norm = nn.LayerNorm(size.width)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Layer(size, config.heads, config.dropout) for _ in range(size.layers))
        self.classifier = nn.Linear(size.width, config.classes)

    def forward(self, words: Tensor, lengths: Tensor) -> Seen:
        """Read words (N, T) int64 of lengths (N,) int64."""
        T = words.shape[1]
        padding = beyond(lengths, T)
        place = torch.arange(T, device=words.device)
        x = self.dropout(self.norm(self.embedding(words) + self.positions(place)))
        hidden, weights = [x], []
        for layer in self.layers:
            x, looked = layer(x, padding)
            hidden.append(x)
            weights.append(looked)
        return Seen(
            self.classifier(x[:, 0]),
            tuple(each.masked_fill(padding.unsqueeze(2), 0.0) for each in hidden),
            tuple(each.masked_fill(padding[:, None, :, None], 0.0) for each in weights),
        )


class Distillation(nn.Module):
    """A teacher that stays as it is, a student, and the projections between their widths."""

    def __init__(self, config: Config):
        super().__init__()
        if config.teacher.layers % config.student.layers:
            raise ValueError(
                f"teacher.layers={config.teacher.layers} is no multiple of "
                f"student.layers={config.student.layers}: each layer of the student learns from its own"
            )
        self.teacher = Encoder(config, config.teacher).requires_grad_(False)
        self.project_embedding = nn.Linear(config.student.width, config.teacher.width, bias=False)
        self.project = nn.Linear(config.student.width, config.teacher.width, bias=False)
        self.student = Encoder(config, config.student)

    def train(self, mode: bool = True) -> "Distillation":
        """Set the mode of the student; the teacher drops nothing."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, words: Tensor, lengths: Tensor) -> Lesson:
        """Let both read words (N, T) int64 of lengths (N,) int64."""
        with torch.no_grad():
            taught = self.teacher(words, lengths)
        seen = self.student(words, lengths)
        hidden = (self.project_embedding(seen.hidden[0]), *map(self.project, seen.hidden[1:]))
        g = len(taught.weights) // len(seen.weights)
        taught = Seen(taught.scores, taught.hidden[::g], taught.weights[g - 1 :: g])
        return Lesson(seen._replace(hidden=hidden), taught)


def build(config: Config) -> nn.Module:
    """Return a student and its teacher with torch's default initialisation.

    The teacher knows nothing yet: train `teacher` first, or load its weights.
    """
    return Distillation(config)


def batch(config: Config, seed: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return ((words, lengths), labels) of the encoder's task: name the one key word."""
    return encoder.batch(config, seed)


def inputs(config: Config, seed: int) -> tuple[Tensor, Tensor]:
    """Return (words, lengths), of shapes (batch, words) and (batch,), both int64."""
    return batch(config, seed)[0]


def loss(output: Lesson, target: Tensor) -> Tensor:
    """Return the cross entropy of the student's scores and labels (N,), plus `lesson_loss`."""
    return F.cross_entropy(output.student.scores, target) + lesson_loss(*output)


def lesson_loss(student: Seen, teacher: Seen) -> Tensor:
    """Return what the student has not learnt yet: of scores, hidden states and attention weights.

    Args:
        student: its hidden states in the teacher's width.
        teacher: no gradient goes into it; as many layers.
    """
    soft = F.kl_div(
        (student.scores / TEMPERATURE).log_softmax(1),
        (teacher.scores / TEMPERATURE).log_softmax(1),
        reduction="batchmean",
        log_target=True,
    )
    hidden = _squares(student.hidden, teacher.hidden)
    return TEMPERATURE**2 * soft + hidden + attention_loss(student, teacher)


def attention_loss(student: Seen, teacher: Seen) -> Tensor:
    """Return how far the student's attention weights are from its teacher's, alone."""
    # The mean over keys would vanish in long sentences, of which each word looks at few.
    T = teacher.weights[0].shape[3]
    return T * _squares(student.weights, teacher.weights)


def _squares(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> Tensor:
    """The mean squared difference in each layer, of all layers together."""
    return sum(F.mse_loss(*pair) for pair in zip(student, teacher, strict=True))
