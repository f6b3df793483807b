"""Where attention is left to torch: as measured, and nowhere else."""

import pytest
import torch

from pyarch.ops.attention_call import AttentionCall
from pyarch.ops.attention_measured import EMERALD_RAPIDS, forward_concessions

SMALL = AttentionCall("cpu", "amx", torch.float32, 2, 8, 8, 16, 16, 64, 64)


@pytest.mark.parametrize(
    ("changes", "conceded"),
    [
        ({}, True),
        ({"dtype": torch.bfloat16}, True),
        ({"is_causal": True}, True),
        ({"dtype": torch.float16}, False),
        ({"architecture": "avx512_bf16"}, False),
        ({"save": True}, True),
        ({"save": True, "dtype": torch.bfloat16}, False),
        ({"save": True, "dtype": torch.bfloat16, "queries": 1, "keys": 1}, True),
        ({"device": "cuda"}, False),
        ({"kv_heads": 2}, False),
        ({"left": 3}, False),
        ({"mask": True}, False),
        ({"queries": 128, "keys": 128}, False),
    ],
    ids=str,
)
def test_attention_concedes_where_torch_was_measured_faster(changes, conceded):
    reasons = list(forward_concessions(SMALL._replace(**changes)))
    assert len(reasons) == conceded
    assert all("of torch" in reason and "see benchmarks/results" in reason for reason in reasons)


def test_attention_regions_are_each_there_once():
    assert len(EMERALD_RAPIDS) == len(set(EMERALD_RAPIDS))
