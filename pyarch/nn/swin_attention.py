"""Hugging Face's SwinAttention on pyarch's kernels: the same attention inside windows, cut out by its caller.

    output = concat_h(softmax(q_h k_h^T / sqrt(D) + bias_h + mask) v_h) W_out^T        in each window
    (Z. Liu et al. Swin Transformer. 2021, arXiv:2103.14030)

The bias and the mask of the shift stay apart, where transformers adds them into one tensor over windows and
heads. The mask is read as seen (0) or hidden (anything else; SwinLayer gives -100).

transformers is not imported: `swap` puts this class before the one that a model holds.

Legend: B images, n windows in an image, N tokens in a window, C width, heads of width D.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyarch.dispatch import Verdict
from pyarch.nn.drop_in import DropIn, backend_of, config_of, left_to_torch
from pyarch.nn.window_attention import attend_in_windows, explain_in_windows, weights_in_windows


class SwinAttention(DropIn):
    """Mixed in before transformers.models.swin.modeling_swin.SwinAttention.

    It serves `attn_implementation="sdpa"`, transformers' default. With any other the model asks for something
    else of the attention ("eager": its weights), and transformers' own forward runs.
    """

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs
    ) -> tuple[Tensor, Tensor | None]:
        if torch.jit.is_tracing() or not is_served(self):
            return super().forward(hidden_states, attention_mask, **kwargs)
        query, key, value, mask = self._windows(hidden_states, attention_mask)
        attended = attend_in_windows(
            query,
            key,
            value,
            self.relative_position_bias(),
            mask,
            self.attention_dropout if self.training else 0.0,
            backend_of(config_of(self)),
        )
        return self.o_proj(attended.transpose(1, 2).flatten(2)), None

    def attention_weights(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, heads: bool = True
    ) -> Tensor:
        """What a call weighs values with, without dropout: (B n, heads, N, N), or the mean (B n, N, N)."""
        query, key, value, mask = self._windows(hidden_states, attention_mask)
        bias, backend = self.relative_position_bias(), backend_of(config_of(self))
        return weights_in_windows(query, key, value, bias, mask, heads, backend)

    def _windows(
        self, hidden_states: Tensor, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Query, key and value of every window, (B n, heads, N, D), and what a shift lets each token see."""
        query, key, value = (
            project(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if attention_mask is None:
            return query, key, value, None
        images = hidden_states.shape[0] // attention_mask.shape[0]  # the mask is (n, N, N)
        return query, key, value, (attention_mask == 0).unsqueeze(1).repeat(images, 1, 1, 1)

    def explain(self, hidden_states, attention_mask=None) -> dict[str, tuple[Verdict, ...]]:
        """What each backend says of a call on these inputs, for "forward" and "backward"."""
        if not is_served(self):
            return left_to_torch(f"attn_implementation={self.config._attn_implementation!r}")
        windows, tokens, _ = hidden_states.shape
        return explain_in_windows(
            hidden_states,
            (windows, self.num_attention_heads, tokens, self.head_dim),
            self.relative_position_bias.relative_position_bias_table,
            attention_mask is not None,
            self.attention_dropout if self.training else 0.0,
        )


def is_served(module: torch.nn.Module) -> bool:
    """Whether a SwinAttention, transformers' or ours, is to compute nothing but its output."""
    return module.config._attn_implementation == "sdpa"
