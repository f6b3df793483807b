"""ONNX Runtime on a CPU: the stock module exported, one session of torch's number of threads, bound tensors.

Torch's exporter of traced modules is exact and takes a tenth of a second; the newer one of torch.export takes
ten, and writes the same nodes but for attention. Its node is therefore written here for the operator's cases.
"""

from __future__ import annotations

import io

import torch
from torch import Tensor

from benchmarks.attention_modules import Stock
from benchmarks.peers import Prepared, timed
from benchmarks.peers.exported import Exported, forward_on_cpu_alone, tracing
from benchmarks.suites import Absent, reason_of
from benchmarks.twins import Twins

PROVIDERS = ["CPUExecutionProvider"]
TRACED_OPSET, ATTENTION_OPSET, IR_VERSION = 20, 23, 10
# As onnx.TensorProto numbers them.
ELEMENT_TYPES = {torch.float32: 1, torch.float16: 10, torch.float64: 11, torch.bfloat16: 16}


def attention_model(stock: Stock, inputs: tuple[Tensor, ...]) -> bytes:
    """A model of one Attention node: query, key, value and a bias or a mask (B, H, T, D) -> output."""
    from onnx import checker, helper, numpy_helper

    names = ["query", "key", "value", "bias"][: len(inputs)]
    infos = [
        helper.make_tensor_value_info(name, ELEMENT_TYPES[each.dtype], each.shape)
        for name, each in zip(names, inputs, strict=True)
    ]
    masks = [] if stock.mask is None else [numpy_helper.from_array(stock.mask.numpy(), "mask")]
    node = helper.make_node(
        "Attention", [*names, *(each.name for each in masks)], ["output"], is_causal=int(stock.is_causal)
    )
    query, value = inputs[0], inputs[2]
    shape = (*query.shape[:-1], value.shape[-1])
    output = helper.make_tensor_value_info("output", ELEMENT_TYPES[query.dtype], shape)
    graph = helper.make_graph([node], "attention", infos, [output], masks)
    opset = helper.make_opsetid("", ATTENTION_OPSET)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION)
    checker.check_model(model)
    return model.SerializeToString()


def traced_model(exported: Exported, arrays: tuple[Tensor, ...]) -> bytes:
    """The module as torch's exporter of traced modules writes it; Absent where it has no such operator."""
    file = io.BytesIO()
    try:
        with tracing():
            torch.onnx.export(exported, arrays, file, dynamo=False, opset_version=TRACED_OPSET)
    except torch.onnx.errors.OnnxExporterError as error:
        raise Absent(f"torch.onnx: {reason_of(error)}") from error
    return file.getvalue()


def session_of(model: bytes):
    """An inference session; Absent where the provider has no kernel for a node or a dtype."""
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as refusals

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Threads that wait busily after a call would take the cores of whoever is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return onnxruntime.InferenceSession(model, options, providers=PROVIDERS)
    except (refusals.NotImplemented, refusals.InvalidGraph, refusals.InvalidArgument) as error:
        raise Absent(f"onnxruntime: {reason_of(error)}") from error


def prepare(twins: Twins, pass_name: str, case) -> Prepared:
    """The exported forward, its inputs bound to torch's memory, its outputs in the session's own."""
    forward_on_cpu_alone("onnxruntime", ("onnxruntime", "onnx"), twins, pass_name)
    exported = Exported(twins, case)
    arrays = exported.arrays(twins.inputs)
    is_operator = isinstance(twins.stock, Stock)

    def make():
        model = attention_model(exported.stock, arrays) if is_operator else traced_model(exported, arrays)
        session = session_of(model)
        binding = session.io_binding()
        for node, array in zip(session.get_inputs(), arrays, strict=True):
            kind = ELEMENT_TYPES[array.dtype]
            binding.bind_input(node.name, "cpu", 0, kind, array.shape, array.data_ptr())
        for node in session.get_outputs():
            binding.bind_output(node.name, "cpu")

        def call():
            session.run_with_iobinding(binding)
            return binding, arrays

        return call

    call, seconds = timed(make)

    def outputs() -> tuple[Tensor, ...]:
        binding, _ = call()
        return exported.restored([torch.from_numpy(each.numpy()) for each in binding.get_outputs()])

    return Prepared(call, outputs, seconds)
