"""Sequence to sequence with attention: a bidirectional GRU encoder, and a decoder that looks back at it.

D. Bahdanau, K. Cho, Y. Bengio. Neural Machine Translation by Jointly Learning to Align and Translate. 2014,
arXiv:1409.0473.
S. Bengio, O. Vinyals, N. Jaitly, N. Shazeer. Scheduled Sampling for Sequence Prediction with Recurrent Neural
Networks. 2015, arXiv:1506.03099.
R. Pascanu, T. Mikolov, Y. Bengio. On the difficulty of training recurrent neural networks. 2013,
arXiv:1211.5063 (gradient clipping).

    a_j     = softmax_j(v . tanh(W s_(t-1) + U h_j)),    context = sum_j a_j h_j
    s_t     = gru([E word_(t-1), context], s_(t-1))
    scores  = V tanh(R [s_t, context, E word_(t-1)])     the paper has a maxout where this has a tanh

Shown: a packed GRU, and a GRUCell that is called once for every word, because its input depends on its state.

N sentences, S source words at most, T target words, H hidden units.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from . import search
from .search import BEGIN, END, IGNORED, WORDS, Translation
from .sentences import beyond, ragged


@dataclass(frozen=True)
class Config:
    """Sizes of the model; source and target share the vocabulary."""

    vocabulary: int
    embedded: int
    hidden: int
    aligned: int
    readout: int
    batch: int
    words: int


# Widths of the paper's RNNsearch; a vocabulary of subwords in place of its 30,000 words, short sentences.
REAL = Config(vocabulary=8000, embedded=620, hidden=1000, aligned=1000, readout=500, batch=8, words=12)
TINY = Config(vocabulary=8, embedded=16, hidden=24, aligned=16, readout=16, batch=16, words=4)


class Memory(NamedTuple):
    """What the decoder looks at: encoder states (N, S, 2H), U h (N, S, aligned), mask (N, S) of padding."""

    states: Tensor
    keys: Tensor
    padding: Tensor


class Attention(nn.Module):
    """The additive attention of the decoder's state over the encoder's states."""

    def __init__(self, config: Config):
        super().__init__()
        self.query = nn.Linear(config.hidden, config.aligned, bias=False)
        self.key = nn.Linear(2 * config.hidden, config.aligned, bias=False)
        self.energy = nn.Linear(config.aligned, 1, bias=False)

    def forward(self, state: Tensor, memory: Memory) -> Tensor:
        """Return the context (N, 2H) for a state (N, H)."""
        energies = self.energy(torch.tanh(self.query(state).unsqueeze(1) + memory.keys)).squeeze(2)
        weights = energies.masked_fill(memory.padding, -torch.inf).softmax(1)
        return (weights.unsqueeze(1) @ memory.states).squeeze(1)


class Seq2Seq(nn.Module):
    """Encoder, attention, decoder; trained on given words, read by greedy or beam search."""

    def __init__(self, config: Config):
        super().__init__()
        self.source = nn.Embedding(config.vocabulary, config.embedded)
        self.encoder = nn.GRU(config.embedded, config.hidden, batch_first=True, bidirectional=True)
        self.bridge = nn.Linear(config.hidden, config.hidden)
        self.target = nn.Embedding(config.vocabulary, config.embedded)
        self.attention = Attention(config)
        self.decoder = nn.GRUCell(config.embedded + 2 * config.hidden, config.hidden)
        self.readout = nn.Linear(3 * config.hidden + config.embedded, config.readout)
        self.predict = nn.Linear(config.readout, config.vocabulary)

    def encode(self, source: Tensor, lengths: Tensor) -> tuple[Memory, Tensor]:
        """Read the source (N, S); returns the memory and the decoder's first state (N, H)."""
        # Packing reads the lengths on the host.
        packed = pack_padded_sequence(
            self.source(source), lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        packed, last = self.encoder(packed)
        S = source.shape[1]
        states, _ = pad_packed_sequence(packed, batch_first=True, total_length=S)
        memory = Memory(states, self.attention.key(states), beyond(lengths, S))
        return memory, torch.tanh(self.bridge(last[1]))

    def step(self, embedded: Tensor, state: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """Go on by one word: the embedding of the last and a state (N, H) give features and a state."""
        context = self.attention(state, memory)
        state = self.decoder(torch.cat([embedded, context], 1), state)
        return torch.cat([state, context, embedded], 1), state

    def score(self, features: Tensor) -> Tensor:
        """Map the features of a step, or of all of them, to scores (..., vocabulary) of the next word."""
        return self.predict(torch.tanh(self.readout(features)))

    def forward(self, source: Tensor, lengths: Tensor, previous: Tensor, sampled: float = 0.0) -> Tensor:
        """Score the words of a translation of which the previous word is given (teacher forcing).

        Args:
            source: (N, S) int64.
            lengths: (N,) int64, words of each source sentence.
            previous: (N, T) int64, BEGIN and the translation without its last word.
            sampled: probability, for each word, that the model's own likeliest word takes the place of the
                given one (scheduled sampling), drawn from torch's global generator.

        Returns:
            (N, T, vocabulary).
        """
        memory, state = self.encode(source, lengths)
        features: list[Tensor] = []
        for embedded in self.target(previous).unbind(1):
            if sampled and features:
                own = self.target(self.score(features[-1]).argmax(1))
                drawn = torch.rand(len(own), 1, device=own.device) < sampled
                embedded = torch.where(drawn, own, embedded)
            seen, state = self.step(embedded, state, memory)
            features.append(seen)
        return self.score(torch.stack(features, 1))

    @torch.no_grad()
    def greedy(self, source: Tensor, lengths: Tensor, limit: int) -> Translation:
        """Translate by the likeliest word each time, at most `limit` words with END."""
        memory, state = self.encode(source, lengths)
        return search.greedy(self._next(memory), state, limit)

    @torch.no_grad()
    def beam_search(self, source: Tensor, lengths: Tensor, beam: int, limit: int) -> Translation:
        """Translate by keeping the `beam` likeliest beginnings, at most `limit` words with END."""
        memory, state = self.encode(source, lengths)
        memory = Memory(*(each.repeat_interleave(beam, 0) for each in memory))
        return search.beam_search(self._next(memory), state, beam, limit)

    def _next(self, memory: Memory) -> search.Step:
        """The step of a search: the decoder's state is what it remembers."""

        def step(word: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            seen, state = self.step(self.target(word), state, memory)
            return self.score(seen), state

        return step


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: tuple[Tensor, Tensor, Tensor],
    target: Tensor,
    *,
    sampled: float = 0.0,
    largest_norm: float = 1.0,
) -> tuple[float, float]:
    """Train on one batch, the gradient shortened to `largest_norm`; returns the loss and the norm before."""
    optimizer.zero_grad()
    value = loss(model(*inputs, sampled=sampled), target)
    value.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), largest_norm)
    optimizer.step()
    return value.item(), norm.item()


def build(config: Config) -> nn.Module:
    """Return a model with torch's default initialisation."""
    return Seq2Seq(config)


def batch(config: Config, seed: int) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Return ((source, lengths, previous), target): write each sentence backwards, then END.

    Targets past END are IGNORED.
    """
    generator = torch.Generator().manual_seed(seed)
    source, lengths = ragged(config.batch, config.words, config.vocabulary - WORDS, generator)
    source += WORDS
    place = torch.arange(config.words + 1)
    mirrored = (lengths.unsqueeze(1) - 1 - place).clamp(min=0)
    target = source.gather(1, mirrored)
    target = target.masked_fill(place == lengths.unsqueeze(1), END)
    previous = F.pad(target[:, :-1], (1, 0), value=BEGIN)
    return (source, lengths, previous), target.masked_fill(place > lengths.unsqueeze(1), IGNORED)


def inputs(config: Config, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (source, lengths, previous), of shapes (batch, words), (batch,), (batch, words + 1), int64."""
    return batch(config, seed)[0]


def loss(output: Tensor, target: Tensor) -> Tensor:
    """Return the cross entropy of scores (N, T, vocabulary) and target (N, T), IGNORED words left out."""
    return F.cross_entropy(output.transpose(1, 2), target, ignore_index=IGNORED)
