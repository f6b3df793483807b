"""OpenVINO on a CPU: the traced stock module converted, in the case's own precision, on torch's memory."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from benchmarks.peers import Prepared, timed
from benchmarks.peers.exported import Exported, forward_on_cpu_alone, tracing
from benchmarks.suites import Absent, reason_of
from benchmarks.twins import Twins

# By the names of openvino.Type. Without the hint a CPU with bfloat16 would compute float32 in it.
PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def settings_of(dtype: torch.dtype) -> dict[str, object]:
    """One stream of torch's number of threads, on cores that stay free for whoever is timed next."""
    return {
        "INFERENCE_PRECISION_HINT": PRECISIONS[dtype],
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "ENABLE_HYPER_THREADING": True,
        "ENABLE_CPU_PINNING": False,
        # A key-value cache in eight bits is a default that no other side has.
        "KV_CACHE_PRECISION": PRECISIONS[dtype],
    }


def converted(exported: Exported, arrays: tuple[Tensor, ...]):
    """The model of a traced module, with the shapes of the arrays; Absent where an operator is not known.

    The front end is asked itself: `openvino.convert_model` may report its use to a server.
    """
    from openvino import PartialShape, Type
    from openvino.frontend import FrontEndManager, OpConversionFailure
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    front_end = FrontEndManager().load_by_framework("pytorch")
    try:
        with tracing():
            traced = torch.jit.trace(exported, arrays, check_trace=False)
            # Named, so that it outlives the conversion that reads it.
            decoder = TorchScriptPythonDecoder(traced)
            model = front_end.convert(front_end.load(decoder))
    except OpConversionFailure as error:
        unknown = sorted(set(re.findall(r"aten::\w+", str(error))))
        raise Absent(f"openvino: converts no {', '.join(unknown) or reason_of(error)}") from error
    for node, array in zip(model.inputs, arrays, strict=True):
        node.get_node().set_partial_shape(PartialShape(array.shape))
        node.get_node().set_element_type(getattr(Type, PRECISIONS[array.dtype]))
    model.validate_nodes_and_infer_types()
    return model


def compiled_model(exported: Exported, arrays: tuple[Tensor, ...]):
    """The converted model compiled for the CPU.

    Raises Absent where it would run on other threads than torch's, or in another precision than the case's:
    without instructions for float16 OpenVINO takes bfloat16.
    """
    import openvino

    model = converted(exported, arrays)
    compiled = openvino.Core().compile_model(model, "CPU", settings_of(arrays[0].dtype))
    threads, wanted = compiled.get_property("INFERENCE_NUM_THREADS"), torch.get_num_threads()
    if threads != wanted:
        raise Absent(f"openvino: runs on {threads} threads where torch has {wanted}")
    precision = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if precision != PRECISIONS[arrays[0].dtype]:
        raise Absent(f"openvino: computes {PRECISIONS[arrays[0].dtype]} in {precision} on this CPU")
    return compiled


def shared(array: Tensor):
    """An openvino.Tensor over a torch tensor's memory; NumPy has no bfloat16, so its bits are passed."""
    import openvino

    if array.dtype != torch.bfloat16:
        return openvino.Tensor(array.numpy(), shared_memory=True)
    return openvino.Tensor(array.view(torch.int16).numpy(), array.shape, openvino.Type.bf16)


def as_torch(tensor, dtype: torch.dtype) -> Tensor:
    """A copy of an openvino.Tensor."""
    return torch.frombuffer(bytearray(tensor.data.tobytes()), dtype=dtype).reshape(tuple(tensor.shape))


def prepare(twins: Twins, pass_name: str, case) -> Prepared:
    """The converted forward on inputs that share torch's memory."""
    forward_on_cpu_alone("openvino", ("openvino",), twins, pass_name)
    exported = Exported(twins, case)
    arrays = exported.arrays(twins.inputs)
    dtype = arrays[0].dtype

    def make():
        request = compiled_model(exported, arrays).create_infer_request()
        for place, array in enumerate(arrays):
            request.set_input_tensor(place, shared(array))

        def call():
            request.infer()
            return request, arrays

        return call

    call, seconds = timed(make)

    def outputs() -> tuple[Tensor, ...]:
        request, _ = call()
        return exported.restored([as_torch(each, dtype) for each in request.output_tensors])

    return Prepared(call, outputs, seconds)
