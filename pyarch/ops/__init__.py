"""The functional forms of pyarch's operators."""

from pyarch.ops.attention_biases import alibi_bias, alibi_slopes, t5_bias
from pyarch.ops.attention_functions import scaled_dot_product_attention
from pyarch.ops.conv import depthwise_conv
from pyarch.ops.decoding import attention_decode
from pyarch.ops.recurrent_functions import gru, gru_cell, lstm, lstm_cell, rnn, rnn_cell
from pyarch.ops.varlen import attention_varlen

__all__ = [
    "alibi_bias",
    "alibi_slopes",
    "attention_decode",
    "attention_varlen",
    "depthwise_conv",
    "gru",
    "gru_cell",
    "lstm",
    "lstm_cell",
    "rnn",
    "rnn_cell",
    "scaled_dot_product_attention",
    "t5_bias",
]
