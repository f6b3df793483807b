"""What attention is timed with, as modules of one signature: (query, key, value[, bias]) -> output.

Torch's operator, its compiled FlexAttention, our operator, our operator on pieces of the sequence; and the
plain formula, which gives the exact results where torch's operator computes something else or takes too much
memory. None has parameters. Layout (B, H, T, D); of sequences of unequal length (tokens of all, H, D).
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from benchmarks.attention_cases import ADDITIONS, DENSE, DROPOUT, PADDING, AttentionCase
from pyarch.attention_context import attention_context
from pyarch.ops import attention_varlen, scaled_dot_product_attention
from pyarch.ops.attention import attend
from pyarch.reference.attention import Extras, Settings
from pyarch.reference.philox import keep_mask

SDPA_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
DROPOUT_P = 0.1
DROPOUT_SEED = 1234
# The queries of which the plain formula holds all probabilities at a time.
ROWS = 1024


def sees(case: AttentionCase, query: Tensor, key: Tensor) -> Tensor:
    """Whether the queries at these positions see the keys at those, by the case's window and causality."""
    seen = key >= 0
    if case.window:
        left, right = case.window
        seen = seen & (key >= query - left) & (key <= query + right)
    return seen & (key <= query) if case.is_causal else seen


def pattern(case: AttentionCase, device: str) -> Tensor:
    """The case's window and causality as a bool mask (T, S), True where a query may attend."""
    positions = (torch.arange(count, device=device) for count in (case.queries, case.key_count))
    query, key = positions
    return sees(case, query[:, None], key[None, :]).expand(case.queries, case.key_count)


class Stock(nn.Module):
    """torch's operator on the named kernel, or torch's choice; a window is its mask, but for DENSE."""

    def __init__(self, case: AttentionCase, device: str, kernel: str | None = None) -> None:
        super().__init__()
        self.kernel = kernel
        self.is_masked = case.window is not None and case.against != DENSE
        self.register_buffer("mask", pattern(case, device).contiguous() if self.is_masked else None)
        self.is_causal = case.is_causal and not self.is_masked
        self.is_grouped = case.kv_heads is not None
        self.dropout_p = DROPOUT_P if case.form == DROPOUT else 0.0

    def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        with sdpa_kernel(SDPA_KERNELS[self.kernel]) if self.kernel else nullcontext():
            return F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=self.mask if bias is None else bias,
                dropout_p=self.dropout_p,
                is_causal=self.is_causal,
                enable_gqa=self.is_grouped,
            )


class Flex(nn.Module):
    """torch's FlexAttention under torch.compile, its block mask made beforehand."""

    def __init__(self, case: AttentionCase, device: str) -> None:
        super().__init__()

        def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return sees(case, query, key)

        self.block_mask = create_block_mask(mask_mod, None, None, case.queries, case.key_count, device=device)
        self.is_grouped = case.kv_heads is not None
        self.compiled = torch.compile(flex_attention)

    def forward(self, *sources: Tensor) -> Tensor:
        # On a CPU it refuses inputs that require a gradient, also where none is wanted.
        sources = sources if torch.is_grad_enabled() else tuple(each.detach() for each in sources)
        return self.compiled(*sources, block_mask=self.block_mask, enable_gqa=self.is_grouped)


class Ours(nn.Module):
    """Our operator; dropout with a seed of its own, so that its results can be checked."""

    def __init__(self, case: AttentionCase, device: str) -> None:
        super().__init__()
        self.options = {
            "is_causal": case.is_causal,
            "window": case.window,
            "enable_gqa": case.kv_heads is not None,
        }
        self.settings = Settings(case.head_dim**-0.5, is_causal=case.is_causal, dropout_p=DROPOUT_P)
        padding = torch.zeros(case.batch, case.key_count, dtype=torch.bool, device=device)
        self.register_buffer("padding", padding if case.form == PADDING else None)
        seed = torch.tensor(DROPOUT_SEED, device=device)
        self.register_buffer("seed", seed if case.form == DROPOUT else None)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.seed is not None:
            return attend(query, key, value, Extras(seed=self.seed), self.settings)
        return scaled_dot_product_attention(
            query, key, value, attn_mask=bias, key_padding_mask=self.padding, **self.options
        )


class Padded(nn.Module):
    """torch's operator on sequences of unequal length: copied into a padded batch, masked, copied back."""

    def __init__(self, case: AttentionCase, device: str) -> None:
        super().__init__()
        lengths = torch.tensor(case.lengths, device=device)
        is_token = torch.arange(case.queries, device=device) < lengths[:, None]
        self.sizes = case.batch * case.queries, case.batch, case.queries
        self.register_buffer("places", is_token.flatten().nonzero().squeeze(1))
        self.register_buffer("mask", is_token[:, None, None, :])

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        slots, batch, tokens = self.sizes
        padded = (
            each.new_zeros(slots, *each.shape[1:])
            .index_copy(0, self.places, each)
            .view(batch, tokens, *each.shape[1:])
            .transpose(1, 2)
            for each in (query, key, value)
        )
        output = F.scaled_dot_product_attention(*padded, attn_mask=self.mask)
        return output.transpose(1, 2).flatten(0, 1)[self.places]


class Unpadded(nn.Module):
    """Our operator for sequences of unequal length."""

    def __init__(self, case: AttentionCase, device: str) -> None:
        super().__init__()
        ends = torch.tensor([0, *case.lengths], device=device).cumsum(0).int()
        self.register_buffer("ends", ends)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention_varlen(query, key, value, self.ends)


class AmongAdditions(nn.Module):
    """torch's operator after ADDITIONS small torch functions, which change nothing."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        for _ in range(ADDITIONS):
            query = torch.add(query, 0)
        return F.scaled_dot_product_attention(query, key, value)


class InContext(AmongAdditions):
    """The same in a context, which is entered at every call."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with attention_context():
            return super().forward(query, key, value)


class InPieces(nn.Module):
    """Another module's attention within pieces of the sequence, as a batch of views: (1, H, T, D) each."""

    def __init__(self, whole: nn.Module, piece: int) -> None:
        super().__init__()
        self.whole = whole
        self.piece = piece

    def forward(self, *sources: Tensor) -> Tensor:
        pieces = (each.unflatten(2, (-1, self.piece)).squeeze(0).transpose(0, 1) for each in sources)
        return self.whole(*pieces).transpose(0, 1).flatten(1, 2).unsqueeze(0)


class Formula(nn.Module):
    """softmax(q k^T / sqrt(D) + bias) v over visible pairs in float32 or wider, ROWS queries at a time."""

    def __init__(self, case: AttentionCase, device: str) -> None:
        super().__init__()
        self.case = case
        self.register_buffer("keep", None)
        if case.form == DROPOUT:
            seed = torch.tensor(DROPOUT_SEED, device=device)
            sizes = case.batch, case.heads, case.queries, case.key_count
            self.keep = keep_mask(seed, DROPOUT_P, *sizes)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        wide = torch.promote_types(query.dtype, torch.float32)
        groups = query.shape[1] // key.shape[1]
        key, value = (each.to(wide).repeat_interleave(groups, 1) for each in (key, value))
        arguments = query.to(wide), key, value, bias
        # What a block holds is made again in its backward: memory is linear in T where a window is.
        settings = {"use_reentrant": False, "preserve_rng_state": False}
        firsts = range(0, self.case.queries, ROWS)
        blocks = [checkpoint(self.block, first, *arguments, **settings) for first in firsts]
        return torch.cat(blocks, 2).to(value.dtype if query.dtype == wide else query.dtype)

    def block(self, first: int, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        """The output of the queries from `first` on, ROWS at most."""
        last = min(first + ROWS, self.case.queries) - 1
        start, stop = self.case.keys_seen(first).start, self.case.keys_seen(last).stop
        rows, columns = slice(first, last + 1), slice(start, stop)
        scores = query[:, :, rows] @ key[:, :, columns].mT * self.case.head_dim**-0.5
        if bias is not None:
            scores = scores + bias[:, :, rows, columns]
        positions = torch.arange(max(stop, last + 1), device=query.device)
        seen = sees(self.case, positions[rows, None], positions[None, columns])
        probabilities = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        if self.keep is not None:
            probabilities = probabilities * self.keep[:, :, rows, columns] / (1 - DROPOUT_P)
        return probabilities @ value[:, :, columns]
