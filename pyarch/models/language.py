"""Recurrent language models: a stack of RNN, GRU or LSTM layers that predicts the next word.

T. Mikolov, M. Karafiat, L. Burget, J. Cernocky, S. Khudanpur. Recurrent neural network based language model.
2010, Interspeech.
W. Zaremba, I. Sutskever, O. Vinyals. Recurrent Neural Network Regularization. 2014, arXiv:1409.2329.
O. Press, L. Wolf. Using the Output Embedding to Improve Language Models. 2016, arXiv:1608.05859.

    scores_t = W h_t + b,    h_t = cell(E word_t, h_(t-1))          tied: W is the embedding E itself

Shown: one width for three cells, of which the GRU has three quarters of the LSTM's recurrent parameters and
the RNN a quarter. The state that a batch ends in can be handed to the next, as truncated back-propagation
does.

N sentences, T words, W width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CELLS = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}

State = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Config:
    """Sizes of the model; `cell` is a key of CELLS, `strides` the number of hidden rules of the task."""

    vocabulary: int
    width: int
    layers: int
    dropout: float
    strides: int
    batch: int
    words: int
    cell: str = "lstm"
    tied: bool = False


# The medium LSTM of Zaremba et al. on the Penn Treebank.
REAL = Config(vocabulary=10_000, width=650, layers=2, dropout=0.5, strides=4, batch=20, words=35)
TINY = Config(vocabulary=8, width=20, layers=2, dropout=0.0, strides=3, batch=8, words=12)


class LanguageModel(nn.Module):
    """Word embedding, recurrent layers, a linear prediction of the next word; dropout between all of them."""

    def __init__(self, config: Config):
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.recurrent = CELLS[config.cell](
            config.width, config.width, config.layers, batch_first=True, dropout=config.dropout
        )
        self.predict = nn.Linear(config.width, config.vocabulary)
        if config.tied:
            self.predict.weight = self.embedding.weight

    def forward(self, words: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Score every next word.

        Args:
            words: (N, T) int64.
            state: what the previous call returned, or None for zeros.

        Returns:
            Scores (N, T, vocabulary), and the state (layers, N, W) after the last word; a pair for an LSTM.
        """
        hidden, state = self.recurrent(self.dropout(self.embedding(words)), state)
        return self.predict(self.dropout(hidden)), state


def build(config: Config) -> nn.Module:
    """Return a language model with torch's default initialisation."""
    return LanguageModel(config)


def batch(config: Config, seed: int) -> tuple[tuple[Tensor], Tensor]:
    """Return ((words,), next words): each sentence counts on by a stride of its own, round the vocabulary.

    One word tells the next only up to the stride; whoever remembers the word before it knows the next.
    """
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(config.vocabulary, (config.batch, 1), generator=generator)
    stride = torch.randint(1, config.strides + 1, (config.batch, 1), generator=generator)
    sentences = (start + stride * torch.arange(config.words + 1)) % config.vocabulary
    return (sentences[:, :-1],), sentences[:, 1:]


def inputs(config: Config, seed: int) -> tuple[Tensor]:
    """Return (words,), of shape (batch, words) int64."""
    return batch(config, seed)[0]


def loss(output: tuple[Tensor, State], target: Tensor) -> Tensor:
    """Return the cross entropy of (scores (N, T, vocabulary), state) and next words (N, T)."""
    return F.cross_entropy(output[0].transpose(1, 2), target)
