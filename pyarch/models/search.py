"""Writing a sequence word by word: greedily, or by a beam of the likeliest beginnings.

The model is one function, `step(word, state)`: it goes on by the last word (R,) int64 from a state whose
first dimension is R rows, and returns the scores (R, vocabulary) of the next word and the new state. The
state is whatever the model remembers: a recurrent state, or all the words so far. Neither search needs
gradients: the caller switches them off.

N sentences, K hypotheses of a beam, R = N or N K rows.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# The first entries of the vocabulary are no words.
BEGIN, END, WORDS = 0, 1, 2
IGNORED = -100  # the target that torch's cross entropy leaves out

Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Translation(NamedTuple):
    """Words (N, limit), filled up with END, and each sentence's log probability (N,), its END included."""

    words: Tensor
    log_probability: Tensor


def greedy(step: Step, state: Tensor, limit: int) -> Translation:
    """Write the likeliest word each time, at most `limit` words with END.

    Args:
        step: called with R = N rows.
        state: the first, of N rows.
        limit: how many words to write.
    """
    N, device = len(state), state.device
    word = torch.full((N,), BEGIN, device=device)
    ended = torch.zeros(N, dtype=torch.bool, device=device)
    gained_by_word, words = [], []
    for _ in range(limit):
        scores, state = step(word, state)
        gained, word = scores.log_softmax(1).max(1)
        word = word.masked_fill(ended, END)
        gained_by_word.append(gained.masked_fill(ended, 0.0))
        ended = ended | (word == END)
        words.append(word)
    return Translation(torch.stack(words, 1), torch.stack(gained_by_word).sum(0))


def beam_search(step: Step, state: Tensor, beam: int, limit: int) -> Translation:
    """Keep the `beam` likeliest beginnings, at most `limit` words with END.

    A beam of 1 is greedy; one as large as the number of all beginnings finds the likeliest sequence. One in
    between drops beginnings, and in rare cases that of the sequence which greedy finds.

    Args:
        step: called with R = N K rows, those of one sentence next to each other.
        state: the first, of N rows.
        beam: K.
        limit: how many words to write.
    """
    N, device = len(state), state.device
    state = state.repeat_interleave(beam, 0)
    # The row of each sentence's first hypothesis among all.
    first = beam * torch.arange(N, device=device).unsqueeze(1)
    word = torch.full((N, beam), BEGIN, device=device)
    words = word.new_empty(N, beam, 0)
    ended = torch.zeros(N, beam, dtype=torch.bool, device=device)
    # All hypotheses begin equal: only one of them may go on at first.
    total = torch.full((N, beam), -torch.inf, device=device)
    total[:, 0] = 0.0
    for _ in range(limit):
        scores, state = step(word.flatten(), state)
        vocabulary = scores.shape[1]
        gained = scores.log_softmax(1).view(N, beam, vocabulary)
        only_end = torch.where(torch.arange(vocabulary, device=device) == END, 0.0, -torch.inf)
        gained = torch.where(ended.unsqueeze(2), only_end.to(gained), gained)
        total, best = (total.to(gained).unsqueeze(2) + gained).flatten(1).topk(beam)
        origin, word = best // vocabulary, best % vocabulary
        words = words.gather(1, origin.unsqueeze(2).expand(words.shape))
        words = torch.cat([words, word.unsqueeze(2)], 2)
        ended = ended.gather(1, origin) | (word == END)
        state = state[(first + origin).flatten()]
    return Translation(words[:, 0], total[:, 0])
