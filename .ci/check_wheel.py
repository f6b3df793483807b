"""Checks an installed wheel from outside the clone: what is imported, under which name, and that it runs."""

import importlib
import sys
from pathlib import Path

import torch

import pyarch
import pyarch.triton_kernels
from pyarch import hardware, native
from pyarch.page import Page, Prose

installed = Path(sys.argv[1]).resolve()
for module in (pyarch, pyarch.triton_kernels):
    path = Path(module.__file__).resolve()
    if installed not in path.parents:
        sys.exit(f"{module.__name__} was imported from {path}, not from {installed}")

try:
    importlib.import_module("triton_kernels")
except ImportError:
    pass
else:
    sys.exit("triton_kernels is importable at the top level")

missing = [name for name in hardware.CPU_INSTRUCTION_SETS if not native.library_path(name).exists()]
if missing:
    sys.exit(f"the wheel lacks the libraries {', '.join(missing)}")
problems = [problem for name in hardware.supported_instruction_sets() if (problem := native.load(name))]
if problems:
    sys.exit("; ".join(problems))

if len(Page("title", "lead", [Prose("title", ["line"])]).html()) < 1_000_000:
    sys.exit("the wheel lacks the chart library of its pages")

signal, weight = torch.randn(2, 8, 50), torch.randn(8, 1, 4)
expected = torch.nn.functional.conv1d(signal, weight, padding=3, groups=8)
torch.testing.assert_close(pyarch.ops.depthwise_conv(signal, weight, padding=3), expected)
print(
    f"pyarch {pyarch.__version__} from {installed}: {', '.join(hardware.supported_instruction_sets())} load"
)
