"""Pictures of predictions with the connectivity maps that they were decoded from."""

import cv2
import numpy as np
from mmseg.structures import SegDataSample
from mmseg.visualization import SegLocalVisualizer
from torch import Tensor

from segmentation.dual_sam.connectivity import MAPS, OFFSETS

_ROWS = 2
_NAMES = 18  # pixels of the strip above a map that names it
_LEAST = 640  # pixels that a picture is wide, so that eight maps and their names can be read


class ConnectivityVisualizer(SegLocalVisualizer):
    """mmsegmentation's picture, and below it the eight maps, white where a pixel is connected to the neighbour that
    is named (dy, dx)."""

    def add_datasample(
        self, name: str, image: np.ndarray, data_sample: SegDataSample | None = None, step: int = 0, **drawing
    ) -> None:
        """Arguments as of mmsegmentation's."""
        super().add_datasample(name, image, data_sample, step=step, **drawing)
        if data_sample is not None and "connectivity" in data_sample:
            times = -(-_LEAST // image.shape[1])
            large = cv2.resize(self.get_image(), None, fx=times, fy=times, interpolation=cv2.INTER_NEAREST)
            picture = np.vstack([large, connectivity_sheet(data_sample.connectivity.data, large.shape[1])])
            self.set_image(picture)
            self.add_image(name, picture, step)


def connectivity_sheet(maps: Tensor, width: int) -> np.ndarray:
    """(8, H, W) probabilities -> (h, width, 3) uint8, four maps beside each other, in two rows, each below its name."""
    columns = MAPS // _ROWS
    size = width // columns, max(round(width / columns * maps.shape[1] / maps.shape[2]), 1)
    cells = []
    for probability, (dy, dx) in zip(maps.cpu().numpy(), OFFSETS, strict=True):
        cell = cv2.resize((probability * 255).astype(np.uint8), size, interpolation=cv2.INTER_AREA)
        strip = np.zeros((_NAMES, size[0]), np.uint8)
        cv2.putText(strip, f"{dy:+d}, {dx:+d}", (3, _NAMES - 5), cv2.FONT_HERSHEY_SIMPLEX, 0.4, 255, 1, cv2.LINE_AA)
        cells.append(np.vstack([strip, cell]))
    sheet = np.vstack([np.hstack(cells[first : first + columns]) for first in range(0, MAPS, columns)])
    return np.repeat(np.pad(sheet, ((0, 0), (0, width - sheet.shape[1])))[..., None], 3, axis=-1)
