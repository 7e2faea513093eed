"""Static quantisation of an exported file by onnxruntime's own tools: QDQ, int8 weights per channel, int8 activations.

Matrix products with weights and convolutions are quantised. Scans, products of activations alone, which scans and
attention are made of, and norms stay in float32.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

QUANTISED = ("Conv", "MatMul", "Gemm")
_PREPARED = {"onnx.quant.pre_process": "onnxruntime.quant"}
"""What the tool writes into a file whose constants it has folded, and warns where it is not. Ours are folded."""


class _Images(CalibrationDataReader):
    """Images (1, C, H, W), one after another."""

    def __init__(self, images: Iterable[np.ndarray]) -> None:
        self.images = iter(images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        image = next(self.images, None)
        return None if image is None else {"images": image}


def quantise(model: ModelProto, images: Iterable[np.ndarray]) -> ModelProto:
    """The ONNX model in int8. What is in functions of the model stays as it is.

    Args:
        images: (1, C, H, W) float32, by which the ranges of activations are found.
    """
    with tempfile.TemporaryDirectory() as folder:
        weights = {tensor.name for tensor in model.graph.initializer}
        source, target = Path(folder, "float32.onnx"), Path(folder, "int8.onnx")
        helper.set_model_props(model, _PREPARED)
        onnx.save_model(model, source)
        quantize_static(
            source,
            target,
            _Images(images),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            op_types_to_quantize=list(QUANTISED),
            nodes_to_exclude=[
                node.name for node in model.graph.node if node.op_type == "MatMul" and weights.isdisjoint(node.input)
            ],
        )
        made = onnx.load_model(target)
    del made.metadata_props[:]
    return made
