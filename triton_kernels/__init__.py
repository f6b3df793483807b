"""Triton kernels of pyarch, imported as ``pyarch.triton_kernels``.

This folder imports torch, triton and its own siblings only; the operators in ``pyarch.ops`` name it lazily.
"""

if __name__ != "pyarch.triton_kernels":
    raise ImportError(
        f"this folder was imported as {__name__!r}, but it is the package 'pyarch.triton_kernels': "
        "run `pip install -e .` in the repository, or import pyarch from its root"
    )
