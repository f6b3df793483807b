"""The attention cases as data: shapes, patterns, what they are timed against, and their goals.

Legend: B batch, H query heads, Hk key and value heads, T queries, S keys (T where not said), D head size,
Dv value size. window (left, right): query i sees the keys from i - left to i + right, both included.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from benchmarks.even_spread import evenly_spread
from benchmarks.goals import Goal

PASSES = {"cpu": ("fwd", "fwd+bwd"), "cuda": ("fwd", "bwd", "fwd+bwd")}
FORWARD_ONLY = ("fwd",)

# What is called: the operator, alone or with something added to it, or a module of H heads of size D.
OPERATOR = ""
BIAS = "learned bias"
DROPOUT = "dropout"
PADDING = "padding mask"
LENGTHS = "unequal lengths"
CONTEXT = "among additions in attention_context"
WEIGHTS = "MultiheadAttention need_weights"
MAPS = "MultiheadAttention need_weights of each head"
LAYER = "TransformerEncoderLayer"
SWIN = "Swin block"
MISTRAL = "Mistral attention"
MODULES = (WEIGHTS, MAPS, LAYER, SWIN, MISTRAL)
# Those with a feed-forward network.
BLOCKS = (LAYER, SWIN)
# Features of a transformer's feed-forward network for each feature of its input.
WIDENING = 4

# The shortest of unequal lengths, of which T is the longest; windows on a side of a Swin's image.
SHORTEST = 32
SWIN_WINDOWS = 8
# Small torch functions before a call in a context, each of which its mode sees.
ADDITIONS = 100

# What takes the stock side's place: torch's way to the same result (on a GPU its fastest kernel), a way that
# does more or less than is asked for, or our own call on an easier problem of the same amount of work.
STOCK = ""
MASKED = "masked SDPA"
DENSE = "dense SDPA"
FLEX = "compiled FlexAttention"
FLASH, CUDNN, EFFICIENT, MATH = (f"SDPA {name}" for name in ("flash", "cudnn", "efficient", "math"))
UNMASKED = "itself without mask"
PIECES = "itself in pieces"
KERNELS = (FLASH, CUDNN, EFFICIENT, MATH)
PIECE = 4096


@dataclass(frozen=True)
class AttentionCase:
    """One call of attention and what it is timed against.

    `only` are its passes, where it has not all; `quick`: part of --quick.
    """

    batch: int
    heads: int
    queries: int
    head_dim: int
    keys: int | None = None
    kv_heads: int | None = None
    value_dim: int | None = None
    is_causal: bool = False
    window: tuple[int, int] | None = None
    dtype: str = "fp32"
    form: str = OPERATOR
    against: str = STOCK
    only: tuple[str, ...] = ()
    goals: dict[str, Goal] = field(default_factory=dict)
    quick: bool = True

    @property
    def name(self) -> str:
        words = [self.form] * (self.form in MODULES)
        words += [f"B{self.batch}", f"H{self.heads}"] + [f"Hk{self.kv_heads}"] * (self.kv_heads is not None)
        words += [f"T{self.queries}"] + [f"S{self.keys}"] * (self.keys is not None)
        words += [f"D{self.head_dim}"] + [f"Dv{self.value_dim}"] * (self.value_dim is not None)
        words += [f"window {self.window[0]},{self.window[1]}"] if self.window else []
        words += ["causal"] * self.is_causal + [self.dtype]
        words += [self.form] * (self.form not in (OPERATOR, *MODULES))
        return " ".join(words) + f" vs {self.against}" * (self.against != STOCK)

    @property
    def key_count(self) -> int:
        return self.queries if self.keys is None else self.keys

    @property
    def kv_head_count(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def value_size(self) -> int:
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def width(self) -> int:
        """Features of a module's input and output."""
        return self.heads * self.head_dim

    def keys_seen(self, query: int) -> range:
        """The keys that a query sees."""
        first, last = 0, self.key_count - 1
        if self.window:
            left, right = self.window
            first, last = max(first, query - left), min(last, query + right)
        if self.is_causal:
            last = min(last, query)
        return range(first, max(first, last + 1))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence: T, or spread evenly from SHORTEST to T."""
        if self.form != LENGTHS:
            return [self.queries] * self.sequences
        steps = max(1, self.batch - 1)
        return [SHORTEST + (self.queries - SHORTEST) * index // steps for index in range(self.batch)]

    @property
    def sequences(self) -> int:
        """Sequences that attend on their own: B, or the windows of B images."""
        return self.batch * (SWIN_WINDOWS**2 if self.form == SWIN else 1)

    @property
    def visible_pairs(self) -> int:
        """Pairs of a query and a key that it sees, in one head of a sequence of T."""
        return sum(len(self.keys_seen(query)) for query in range(self.queries))

    @property
    def all_pairs(self) -> int:
        """The same over all sequences; where lengths are unequal every query sees its whole sequence."""
        if self.form == LENGTHS:
            return sum(length**2 for length in self.lengths)
        return self.sequences * self.visible_pairs

    def products(self, pass_name: str) -> int:
        """Floating-point operations of the matrix products, two for each multiplication with its addition.

        Only visible pairs count: two products of them in the forward (scores, output), five in the backward
        (scores again, and the gradients of probabilities, values, queries and keys). A module's weights add
        one product each in the forward and two in the backward.
        """
        pairs = 2 * self.heads * self.all_pairs
        forward = pairs * (self.head_dim + self.value_size) + self.weight_products
        backward = pairs * (3 * self.head_dim + 2 * self.value_size) + 2 * self.weight_products
        return {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward}[pass_name]

    @property
    def weight_products(self) -> int:
        """Operations of a module's linear layers, forward: four projections, and a layer's network."""
        if self.form not in MODULES:
            return 0
        squares = 2 + 2 * self.kv_head_count / self.heads + 2 * WIDENING * (self.form in BLOCKS)
        return round(2 * self.sequences * self.queries * squares * self.width**2)


def speedups(forward: float, both: float) -> dict[str, Goal]:
    return {"fwd": Goal("speedup", forward), "fwd+bwd": Goal("speedup", both)}


def backward_too(forward: float, backward: float) -> dict[str, Goal]:
    return {"fwd": Goal("speedup", forward), "bwd": Goal("speedup", backward)}


def of_itself(most: float) -> dict[str, Goal]:
    return {name: Goal("of_itself", most) for name in ("fwd", "fwd+bwd")}


def windows(batch: int, heads: int, head_dim: int, left: int, dtype: str) -> Iterator[AttentionCase]:
    """A causal window over 4k to 32k tokens, timed against the same work in sequences of PIECE tokens."""
    for tokens in (2 * PIECE, 4 * PIECE, 8 * PIECE):
        case = AttentionCase(batch, heads, tokens, head_dim, window=(left, 0), is_causal=True, dtype=dtype)
        yield replace(case, against=PIECES, goals=of_itself(1.1))


# Goals: times faster than stock, paired in one run with a steady allocator on two AVX-512 cores; or at most
# so much of the time that our own call takes for as much work. FlexAttention comes last: what it compiles
# stays in the process. --quick leaves the longest windows out, whose results in float64 alone take seconds.
OF_1024 = AttentionCase(1, 8, 1024, 64)
OF_128 = AttentionCase(8, 8, 128, 64)
WINDOW = AttentionCase(1, 4, PIECE, 64, window=(256, 0), is_causal=True)
STEP = AttentionCase(1, 8, 1, 64, keys=PIECE, only=FORWARD_ONLY, goals={"fwd": Goal("speedup", 1.3)})
GROUPED_STEP = replace(STEP, heads=32, kv_heads=8, head_dim=128)
CPU_TABLE = (
    replace(OF_1024, goals=speedups(1.25, 1.3)),
    replace(OF_1024, is_causal=True, goals=speedups(1.75, 1.7)),
    replace(OF_1024, dtype="bf16", goals=speedups(2.35, 2)),
    replace(OF_1024, dtype="bf16", is_causal=True, goals=speedups(3, 2.2)),
    replace(OF_1024, dtype="fp16", goals=speedups(1.9, 8)),
    replace(OF_128, goals=speedups(1.5, 1.4)),
    replace(OF_128, dtype="bf16", goals=speedups(2.5, 4)),
    replace(WINDOW, against=MASKED, goals=speedups(18, 12)),
    replace(WINDOW, against=DENSE, goals=speedups(9, 8)),
    *(replace(case, quick=case.queries == 2 * PIECE) for case in windows(1, 4, 64, 256, "fp32")),
    AttentionCase(1, 8, 512, 64, form=BIAS, goals=speedups(2, 1.8)),
    replace(OF_1024, form=DROPOUT, goals=speedups(2, 2)),
    replace(OF_1024, value_dim=128, goals=speedups(2, 2)),
    replace(OF_1024, form=PADDING, against=UNMASKED, goals=of_itself(1.1)),
    replace(OF_1024, form=WEIGHTS, goals={"fwd": Goal("speedup", 1.5)}),
    replace(OF_1024, form=MAPS, goals={"fwd": Goal("speedup", 1.5)}),
    replace(OF_1024, form=LAYER, goals={"fwd": Goal("speedup", 2)}),
    AttentionCase(4, 3, 49, 32, form=SWIN, goals=speedups(1.5, 1.5)),
    AttentionCase(
        1, 8, PIECE, 64, kv_heads=2, window=(511, 0), is_causal=True, form=MISTRAL, goals=speedups(5, 5)
    ),
    AttentionCase(8, 8, 512, 64, form=LENGTHS, goals=speedups(1.8, 1.8)),
    AttentionCase(1, 1, 2, 16, form=CONTEXT, only=FORWARD_ONLY),
    STEP,
    replace(STEP, dtype="bf16"),
    GROUPED_STEP,
    replace(GROUPED_STEP, dtype="bf16"),
    replace(WINDOW, against=FLEX, only=FORWARD_ONLY, goals={"fwd": Goal("speedup", 1.0)}),
)

# Goals: times faster than the named kernel of torch on the same card; at most so much of the time that our
# own call takes for as much work; or a share of the copy bandwidth measured in the same run.
LONG = AttentionCase(4, 16, PIECE, 64, dtype="bf16")
LONG_WINDOW = AttentionCase(1, 4, 8 * PIECE, 128, window=(2047, 0), is_causal=True, dtype="bf16")
CUDA_TABLE = (
    *(
        replace(LONG, head_dim=head_dim, is_causal=is_causal, against=against, goals=goals)
        for head_dim in (64, 128)
        for is_causal in (False, True)
        for against, goals in ((FLASH, backward_too(1.15, 1.1)), (CUDNN, backward_too(0.95, 0.95)))
    ),
    replace(LONG, head_dim=128, goals={}),
    replace(LONG, head_dim=128, dtype="fp16"),
    AttentionCase(
        1, 16, 4 * PIECE, 128, is_causal=True, dtype="bf16", against=FLASH, goals=backward_too(1.15, 1.1)
    ),
    AttentionCase(1, 8, 1024, 64),
    AttentionCase(8, 32, PIECE, 128, kv_heads=8, is_causal=True, dtype="bf16"),
    replace(LONG_WINDOW, against=DENSE, goals=speedups(12, 12)),
    replace(LONG_WINDOW, against=MASKED, goals=speedups(10, 10)),
    *windows(1, 4, 128, 2047, "bf16"),
    AttentionCase(4, 16, 1024, 64, dtype="bf16", form=BIAS, goals={"fwd+bwd": Goal("speedup", 1.5)}),
    replace(LONG, form=DROPOUT),
    replace(LONG, head_dim=64, value_dim=128),
    replace(LONG, form=PADDING, against=UNMASKED, goals=of_itself(1.1)),
    AttentionCase(
        16, 32, 1, 128, keys=8 * PIECE, kv_heads=8, dtype="bf16", goals={"fwd": Goal("copy_share", 0.85)}
    ),
    AttentionCase(8, 8, 1024, 64, dtype="bf16", form=WEIGHTS, goals={"fwd": Goal("speedup", 1.5)}),
    AttentionCase(8, 8, 1024, 64, dtype="bf16", form=LAYER),
    replace(LONG_WINDOW, against=FLEX, goals=speedups(1.2, 1.2)),
)
TABLES = {"cpu": CPU_TABLE, "cuda": CUDA_TABLE}

# A call so small that what is left is the Python around the kernel.
OVERHEAD_CASE = AttentionCase(1, 1, 2, 16, goals={"overhead": Goal("added_us", 15.0)})

SWEEP_AXES = {
    "queries": (1, 2, 7, 16, 33, 64, 100, 128, 200, 256, 384, 512, 777, 1024, 1536, 2048),
    "head_dim": (16, 24, 32, 40, 48, 64, 64, 80, 96, 128),
    "heads": (1, 2, 3, 4, 8, 8, 12, 16),
    "batch": (1, 1, 2, 3, 4),
    "is_causal": (False, True),
    "dtype": ("fp32", "bf16"),
}
SWEEP_COUNT = 200
# A coarse upper bound of torch's training step on two cores, which keeps the sweep within eight minutes.
SWEEP_MAX_MS = 100.0
OPERATIONS_PER_MS = 1e8


def sweep_cases(count: int = SWEEP_COUNT) -> Iterator[AttentionCase]:
    """Yield `count` distinct cases spread evenly over the product of SWEEP_AXES, the same ones every time.

    A case that would take too long loses batch, then heads, then tokens, so that long sequences are reached.
    """
    seen: set[str] = set()
    for place in evenly_spread(SWEEP_AXES):
        case = affordable(AttentionCase(**place))
        if case.name not in seen:
            seen.add(case.name)
            yield case
        if len(seen) == count:
            return


def affordable(case: AttentionCase) -> AttentionCase:
    """The case, or the largest part of it that torch trains within SWEEP_MAX_MS."""
    while case.products("fwd+bwd") > SWEEP_MAX_MS * OPERATIONS_PER_MS:
        part = next(name for name in ("batch", "heads", "queries") if getattr(case, name) > 1)
        case = replace(case, **{part: getattr(case, part) // 2})
    return case
