"""Pictures of predictions with the connectivity maps that they were decoded from."""

import cv2
import numpy as np
from mmseg.structures import SegDataSample
from mmseg.visualization import SegLocalVisualizer
from torch import Tensor

from segmentation.dual_sam.connectivity import MAPS, OFFSETS

_ROWS = 2
_INK = (255, 255, 255)


class ConnectivityVisualizer(SegLocalVisualizer):
    """mmsegmentation's picture, and below it the eight maps, white where a pixel is connected to the neighbour that
    is named (dy, dx)."""

    def add_datasample(
        self, name: str, image: np.ndarray, data_sample: SegDataSample | None = None, step: int = 0, **drawing
    ) -> None:
        """Arguments as of mmsegmentation's."""
        super().add_datasample(name, image, data_sample, step=step, **drawing)
        if data_sample is not None and "connectivity" in data_sample:
            picture = np.vstack([self.get_image(), connectivity_sheet(data_sample.connectivity.data, image.shape[1])])
            self.set_image(picture)
            self.add_image(name, picture, step)


def connectivity_sheet(maps: Tensor, width: int) -> np.ndarray:
    """(8, H, W) probabilities -> (h, width, 3) uint8, four maps beside each other, in two rows."""
    columns = MAPS // _ROWS
    size = width // columns, max(round(width / columns * maps.shape[1] / maps.shape[2]), 1)
    cells = []
    for probability, (dy, dx) in zip(maps.cpu().numpy(), OFFSETS, strict=True):
        cell = cv2.resize((probability * 255).astype(np.uint8), size, interpolation=cv2.INTER_AREA)
        cell = np.repeat(cell[..., None], 3, axis=-1)
        # the name in a corner, readable on black and on white
        cv2.putText(cell, f"{dy:+d},{dx:+d}", (2, 10), cv2.FONT_HERSHEY_PLAIN, 0.7, (0, 0, 0), 3)
        cells.append(cv2.putText(cell, f"{dy:+d},{dx:+d}", (2, 10), cv2.FONT_HERSHEY_PLAIN, 0.7, _INK, 1))
    rows = [np.hstack(cells[first : first + columns]) for first in range(0, MAPS, columns)]
    sheet = np.vstack(rows)
    return np.pad(sheet, ((0, 0), (0, width - sheet.shape[1]), (0, 0)))
