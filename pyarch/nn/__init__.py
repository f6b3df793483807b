"""Drop-in layers: torch.nn's classes of the same names, and window attention, on pyarch's operators."""

from pyarch.nn.attention import MultiheadAttention
from pyarch.nn.config import Config
from pyarch.nn.conv import Conv1d, Conv2d, Conv3d
from pyarch.nn.recurrent import GRU, LSTM, RNN
from pyarch.nn.recurrent_cells import GRUCell, LSTMCell, RNNCell
from pyarch.nn.transformer import TransformerDecoderLayer, TransformerEncoderLayer
from pyarch.nn.window_attention import WindowAttention

__all__ = [
    "Config",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "GRU",
    "GRUCell",
    "LSTM",
    "LSTMCell",
    "MultiheadAttention",
    "RNN",
    "RNNCell",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
    "WindowAttention",
]
