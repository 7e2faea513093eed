"""The second view of Dual-SAM: the image, with the gamma that brings its mean grey to the middle."""

import math

import cv2
import numpy as np


def gamma_copy(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 BGR -> the same, corrected: v -> round(255 (v / 255)^g), g = log 0.5 / log(mean grey / 255).

    Dark images become brighter and bright ones darker, every channel by the same table. An image that is black or
    white altogether has no such gamma (the logarithm of its mean is infinite or zero) and is its own copy.
    """
    mean = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY).mean()
    if mean in (0, 255):
        return image.copy()
    exponent = math.log(0.5) / math.log(mean / 255)
    table = np.round(255 * (np.arange(256) / 255) ** exponent).astype(np.uint8)
    return cv2.LUT(image, table)
