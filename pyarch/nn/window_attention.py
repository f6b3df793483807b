"""WindowAttention on pyarch's kernels: attention inside the windows of an image.

    output = concat_h(softmax(q_h k_h^T / sqrt(D) + bias_h) v_h) W_out^T,  q_h = h-th part of input W_q^T
    bias_h[i, j] = table[(y_i - y_j + Wh - 1) (2 Ww - 1) + x_i - x_j + Ww - 1, h],  token i at (y_i, x_i)

over the tokens of one window (Z. Liu et al. Swin Transformer: Hierarchical Vision Transformer using Shifted
Windows. 2021, arXiv:2103.14030). Shifted windows are windows of the image rolled by the shift. Where the roll
brings together what lies far apart, in the last row and column of windows, tokens see their own part only.

Parameters, buffer, state_dict and results are those of torchvision's ShiftedWindowAttention. There a token of
another part is seen with a score lowered by 100; here it is not seen. Dropout draws from a random stream of
its own. The windows lie in the batch of the kernels, the bias is broadcast over them and never multiplied
out; the mask of a shift is, but not over heads.

Legend: B images, H x W tokens, C width (dim), heads of width D, windows of Wh x Ww = N tokens, n in an image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyarch.dispatch import Verdict
from pyarch.nn.drop_in import DropIn, backend_of, config_of
from pyarch.ops import attention


class WindowAttention(DropIn, nn.Module):
    """Attention inside windows, shifted or not, with a learned bias by relative position.

        output = concat_h(softmax(q_h k_h^T / sqrt(D) + bias_h) v_h) W_out^T        in each window

    Z. Liu et al. Swin Transformer. 2021, arXiv:2103.14030. The constructor, the parameters and the state_dict
    are those of torchvision.models.swin_transformer.ShiftedWindowAttention.

    Args:
        dim: C, features of a token, a multiple of `num_heads`.
        window_size: (height, width) of a window in tokens, or one number for both. Images that are no
            multiple of it are padded below and at the right with zeros, and the padding is attended to.
        shift_size: (down, right) by which the windows are shifted, each at least 0 and less than the window;
            one number for both. A side on which one window holds the whole image is not shifted.
        num_heads: heads.
        qkv_bias, proj_bias: whether the products before and after the attention have a bias.
        attention_dropout: probability of dropping an attention weight, in training.
        dropout: probability of dropping an output, in training.
        device, dtype: of the parameters.

    Shape:
        input (B, H, W, C), any H and W; output the same.

    Attributes:
        qkv, proj: nn.Linear of (3 C, C) and (C, C).
        relative_position_bias_table: ((2 Wh - 1) (2 Ww - 1), heads), learned.
        relative_position_index: int64 (N * N,), the row of the table for each pair of tokens; a buffer.

    Raises:
        ValueError: a width that the heads do not share evenly, a window below 1, a shift outside the window.
    """

    def __init__(
        self,
        dim: int,
        window_size: int | Sequence[int],
        shift_size: int | Sequence[int],
        num_heads: int,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.window_size = _pair("window_size", window_size)
        self.shift_size = _pair("shift_size", shift_size)
        _check_sizes(dim, num_heads, self.window_size, self.shift_size)
        self.num_heads = num_heads
        self.attention_dropout = attention_dropout
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, device=device, dtype=dtype)
        high, wide = self.window_size
        table = torch.empty((2 * high - 1) * (2 * wide - 1), num_heads, device=device, dtype=dtype)
        self.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))
        index = relative_positions(high, wide, table.device).flatten()
        self.register_buffer("relative_position_index", index)

    def get_relative_position_bias(self) -> Tensor:
        """The bias of every pair of tokens in a window, (1, heads, N, N)."""
        tokens = self.window_size[0] * self.window_size[1]
        bias = self.relative_position_bias_table[self.relative_position_index]
        return bias.view(tokens, tokens, -1).permute(2, 0, 1).contiguous().unsqueeze(0)

    def forward(self, input: Tensor) -> Tensor:
        _check_input(self, input)
        B, H, W, C = input.shape
        H, W = _as_constant(H), _as_constant(W)
        (high, wide), (down, right) = self.window_size, _shift(self, H, W)
        query, key, value, mask = self._windows(input)
        dropout_p = self.attention_dropout if self.training else 0.0
        attended = attend_in_windows(
            query, key, value, self.get_relative_position_bias(), mask, dropout_p, backend_of(config_of(self))
        )
        tokens = F.linear(attended.transpose(1, 2).flatten(2), self.proj.weight, self.proj.bias)
        tokens = F.dropout(tokens, self.dropout, self.training)

        rows, columns = -(-H // high), -(-W // wide)  # of windows, n together
        windows = tokens.reshape(B, rows, columns, high, wide, C)
        x = windows.transpose(2, 3).reshape(B, rows * high, columns * wide, C)
        if mask is not None:
            x = x.roll((down, right), (1, 2))
        return x[:, :H, :W].contiguous()

    def attention_weights(self, input: Tensor, heads: bool = True) -> Tensor:
        """What a call on `input` weighs values with, without dropout: (B n, heads, N, N), query by key.

        Args:
            input: (B, H, W, C). The windows of an image follow each other row by row, those of the next
                image behind them; in each the tokens, row by row too. Of a shifted layer they are windows of
                the rolled image.
            heads: False for the mean over heads, (B n, N, N).
        """
        _check_input(self, input)
        query, key, value, mask = self._windows(input)
        bias, backend = self.get_relative_position_bias(), backend_of(config_of(self))
        return weights_in_windows(query, key, value, bias, mask, heads, backend)

    def _windows(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Query, key and value of every window, (B n, heads, N, D), and what a shift lets each token see."""
        B, H, W, C = input.shape
        H, W = _as_constant(H), _as_constant(W)
        (high, wide), (down, right) = self.window_size, _shift(self, H, W)
        x = F.pad(input, (0, 0, 0, -W % wide, 0, -H % high)) if H % high or W % wide else input
        mask = None
        if down or right:
            x = x.roll((-down, -right), (1, 2))
            mask = shift_mask(x.shape[1:3], self.window_size, (down, right), x.device).repeat(B, 1, 1, 1)
        rows, columns = x.shape[1] // high, x.shape[2] // wide
        windows = x.reshape(B, rows, high, columns, wide, C).transpose(2, 3)
        tokens = windows.reshape(B * rows * columns, high * wide, C)
        qkv = F.linear(tokens, self.qkv.weight, self.qkv.bias).unflatten(2, (3, self.num_heads, -1))
        return *qkv.permute(2, 0, 3, 1, 4).unbind(0), mask

    def explain(self, input) -> dict[str, tuple[Verdict, ...]]:
        """What each backend says of a call on `input`, for "forward" and "backward"."""
        B, H, W, C = input.shape
        high, wide = self.window_size
        return explain_in_windows(
            input,
            (B * -(-H // high) * -(-W // wide), self.num_heads, high * wide, C // self.num_heads),
            self.relative_position_bias_table,
            any(_shift(self, H, W)),
            self.attention_dropout if self.training else 0.0,
        )

    def extra_repr(self) -> str:
        stock = self.stock_class()
        if stock is not type(self):
            return stock.extra_repr(self)
        return f"window_size={self.window_size}, shift_size={self.shift_size}, num_heads={self.num_heads}"


# -------------------------------------------------------------------------------- windows of any layer


def relative_positions(high: int, wide: int, device: torch.device) -> Tensor:
    """The row of a bias table for each pair of tokens in a window: int64 (N, N), query by key."""
    y = torch.arange(high, device=device).repeat_interleave(wide)
    x = torch.arange(wide, device=device).repeat(high)
    rows = y[:, None] - y + high - 1
    columns = x[:, None] - x + wide - 1
    return rows * (2 * wide - 1) + columns


def shift_mask(
    image: Sequence[int], window: Sequence[int], shift: Sequence[int], device: torch.device
) -> Tensor:
    """Which tokens of a window see each other in an image that was rolled by `shift`.

    Args:
        image: its height and width, multiples of the window's.
        window, shift: heights and widths.

    Returns:
        bool (n, 1, N, N), true for two tokens of one part.
    """
    rows, columns = (_parts(*each, device) for each in zip(image, window, shift, strict=True))
    parts = 3 * rows[:, None] + columns  # (H, W)
    across, along = image[0] // window[0], image[1] // window[1]  # windows
    windows = parts.reshape(across, window[0], along, window[1]).transpose(1, 2)
    tokens = windows.reshape(across * along, window[0] * window[1])  # (n, N)
    return (tokens[:, :, None] == tokens[:, None, :]).unsqueeze(1)


def attend_in_windows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    backend: str,
) -> Tensor:
    """Attend inside windows.

    Args:
        query, key, value: (B n, heads, N, D), of any strides.
        bias: (1, heads, N, N), learned.
        mask: bool (B n, 1, N, N), true where a token is seen, or None.
        dropout_p: the probability of dropping an attention weight.
        backend: "auto" or a backend's name.

    Returns:
        (B n, heads, N, D).
    """
    if torch.jit.is_tracing():  # which records torch's operators alone
        added = bias if mask is None else bias.masked_fill(~mask, -torch.inf)
        return F.scaled_dot_product_attention(query, key, value, added.to(query.dtype), dropout_p)
    settings = attention.Settings(query.shape[-1] ** -0.5, dropout_p=dropout_p)
    extras = attention.Extras(mask=mask, bias=bias, seed=attention.draw_seed(settings, query.device))
    return attention.attend(query, key, value, extras, settings, backend=backend)


def weights_in_windows(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, mask: Tensor | None, heads: bool, backend: str
) -> Tensor:
    """The weights of `attend_in_windows` without dropout: (B n, heads, N, N), or the mean over heads."""
    settings, extras = attention.Settings(query.shape[-1] ** -0.5), attention.Extras(mask=mask, bias=bias)
    wish = "heads" if heads else "mean"
    return attention.attend(query, key, value, extras, settings, return_weights=wish, backend=backend)[1]


def explain_in_windows(
    input: Tensor, sizes: tuple[int, int, int, int], table: Tensor, is_masked: bool, dropout_p: float
) -> dict[str, tuple[Verdict, ...]]:
    """What each backend says of `attend_in_windows`, without computing it.

    Args:
        input: its dtype and device.
        sizes: of the query.
        table: whose values the bias takes.
        is_masked: whether there is a mask.
        dropout_p: the probability of dropping an attention weight.
    """
    is_cast = torch.is_autocast_enabled(input.device.type)
    dtype = torch.get_autocast_dtype(input.device.type) if is_cast else input.dtype
    windows, heads, tokens, _ = sizes

    def element(dtype: torch.dtype) -> Tensor:
        return torch.empty(1, 1, 1, 1, dtype=dtype, device=input.device)

    bias = element(dtype if is_cast else table.dtype).requires_grad_(table.requires_grad)
    # Any seed will do, and drawing one would be noticed.
    seed = torch.zeros((), dtype=torch.int64, device=input.device) if 0 < dropout_p < 1 else None
    extras = attention.Extras(
        mask=element(torch.bool).expand(windows, 1, tokens, tokens) if is_masked else None,
        bias=bias.expand(1, heads, tokens, tokens),
        seed=seed,
    )
    queries = element(dtype).expand(sizes)
    return attention.explain(
        queries, queries, queries, extras, attention.Settings(sizes[3] ** -0.5, dropout_p=dropout_p)
    )


# -------------------------------------------------------------------------------- sizes


def _parts(length: int, window: int, shift: int, device: torch.device) -> Tensor:
    """To which of three parts each row of a rolled image belongs: uint8 (length,).

    The last windows hold rows of two parts, the others of one. Without a shift all windows do.
    """
    place = torch.arange(length, device=device)
    return (place >= length - window).to(torch.uint8) + (place >= length - shift).to(torch.uint8)


def _as_constant(size: int) -> int:
    """A size of an image, as a plain number for torch.compile too: a graph for each size, any batch in it.

    Of a symbol divided into windows it would take minutes to prove what a graph is good for.
    """
    return len(range(size)) if torch.compiler.is_compiling() else size


def _shift(module: nn.Module, H: int, W: int) -> list[int]:
    """The shift of each side; 0 where one window holds the whole image."""
    sides = zip(module.shift_size, module.window_size, (H, W), strict=True)
    return [shift if length > window else 0 for shift, window, length in sides]


def _pair(name: str, sizes: int | Sequence[int]) -> list[int]:
    pair = [sizes, sizes] if isinstance(sizes, int) else list(sizes)
    if len(pair) != 2:
        raise ValueError(f"{name} should be (height, width) or one number, got {sizes!r}")
    return pair


def _check_sizes(dim: int, num_heads: int, window: list[int], shift: list[int]) -> None:
    if num_heads < 1 or dim < 1 or dim % num_heads:
        raise ValueError(f"dim should be a positive multiple of num_heads, got {dim} and {num_heads}")
    if min(window) < 1:
        raise ValueError(f"window_size should be at least 1, got {window}")
    if any(not 0 <= by < size for by, size in zip(shift, window, strict=True)):
        raise ValueError(f"shift_size should be at least 0 and less than the window {window}, got {shift}")


def _check_input(module: nn.Module, input: Tensor) -> None:
    width = module.proj.weight.shape[1]
    if input.dim() != 4 or input.shape[3] != width:
        raise ValueError(f"input should be (B, H, W, {width}), got {tuple(input.shape)}")
