"""ONNX files: the graph of a model with its scans in standard operators, or as nodes for the library of `ssm_ops`."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import onnx
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnxscript import ir, optimizer

import ssm_ops
import ssm_ops.onnxruntime
from ssm_train.common.errors import UserError

from .blocks import Outline, put_together
from .onnx_operators import translations
from .portable import as_functions, as_nodes, inline

SCANS = ("portable", "custom")
OPSETS = range(18, 21)
"""Versions of the standard operators that our forms of the scans are written in and PyTorch converts to."""
HALF = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
_LARGE = 1 << 30
_SMALL = 1024  # numbers of a weight that is not worth rounding


def check_opset(opset: int | None) -> None:
    """Raises UserError for a version of the standard operators of another time."""
    if opset is not None and opset not in OPSETS:
        raise UserError(f"--opset {opset} is not from {OPSETS[0]} to {OPSETS[-1]}")


def convert(outline: Outline, opset: int | None = None) -> ModelProto:
    """Images (batch, C, H, W) -> logits (batch, classes), with the weights in it, and scans as nodes of our own.

    Args:
        outline: of `blocks.trace`.
        opset: version of the standard operators, of `OPSETS`; None is the last one.

    Raises:
        UserError: an `opset` of another time.
    """
    check_opset(opset)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch's, of its own parts
        made = torch.onnx.export(
            outline.program,
            custom_translation_table=translations(),
            input_names=["images"],
            output_names=["logits"],
            opset_version=opset or OPSETS[-1],
            dynamo=True,
            verbose=False,
        )
    model = put_together(made.model_proto, outline)
    # what is made of weights alone becomes a weight: other tools look for these, as that for int8 does
    graph = ir.from_proto(model)
    optimizer.fold_constants(graph, input_size_limit=_LARGE, output_size_limit=_LARGE)
    optimizer.remove_unused_nodes(graph)
    model = ir.to_proto(graph)
    for number, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{number}"
        del node.metadata_props[:]  # PyTorch's notes on where in the source a node comes from
    del model.graph.metadata_props[:], model.graph.value_info[:]
    free = {0: "batch", 2: "height", 3: "width"}
    for value, names in ((model.graph.input[0], free), (model.graph.output[0], {0: "batch"})):
        for d, name in names.items():
            value.type.tensor_type.shape.dim[d].dim_param = name
    model.producer_name, model.producer_version = "vision-ssm", ssm_ops.__version__
    return model


def finish(
    model: ModelProto,
    scan: str,
    weights: str = "float32",
    quantise: Callable[[ModelProto], ModelProto] | None = None,
) -> ModelProto:
    """The content of a file.

    Args:
        model: of `convert`.
        scan: "custom" for nodes of our own, "portable" for standard operators.
        weights: "float32", or a name of `HALF`: they are stored so, and turned into float32 when the file is loaded.
        quantise: takes and gives a model in which the scans are functions.
    """
    before = as_functions(model)
    if quantise is not None:
        model = quantise(model)
    if scan == "portable":
        model = inline(model)
    else:
        model = as_nodes(model, before)
        module = ssm_ops.onnxruntime
        helper.set_model_props(model, {"library": module.__name__, "library_version": str(module.VERSION)})
    if weights != "float32":
        _round_weights(model, weights)
    onnx.checker.check_model(model)
    return model


def _round_weights(model: ModelProto, to: str) -> None:
    """Store weights in 16 bits; a Cast gives them back. Runtimes compute it once, when they load the file."""
    casts = []
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if tensor.data_type != TensorProto.FLOAT or values.size < _SMALL:
            continue
        name = tensor.name
        rounded = torch.from_numpy(values.copy()).to(getattr(torch, to))
        raw = rounded.view(torch.int16).numpy().tobytes()
        tensor.CopyFrom(helper.make_tensor(f"{name}.{to}", HALF[to], values.shape, raw, raw=True))
        casts.append(helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
