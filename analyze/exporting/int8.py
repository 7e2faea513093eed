"""Static quantisation of an exported file by onnxruntime's own tools: QDQ, int8 weights per channel, int8 activations.

Matrix products and convolutions are quantised; scans and norms stay in float32.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

QUANTISED = ("Conv", "MatMul", "Gemm")


class _Images(CalibrationDataReader):
    """Images (1, C, H, W), one after another."""

    def __init__(self, images: Iterator[np.ndarray]) -> None:
        self.images = images

    def get_next(self) -> dict[str, np.ndarray] | None:
        image = next(self.images, None)
        return None if image is None else {"images": image}


def quantise(model: ModelProto, images: Iterator[np.ndarray]) -> ModelProto:
    """The ONNX model in int8. What is in functions of the model stays as it is.

    Args:
        images: (1, C, H, W) float32, by which the ranges of activations are found.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "float32.onnx"), Path(folder, "int8.onnx")
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
        )
        return onnx.load_model(target)
