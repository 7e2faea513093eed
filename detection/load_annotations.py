"""mmdet's reading of annotations, for those without a mask."""

from mmdet.datasets import transforms


class LoadAnnotations(transforms.LoadAnnotations):
    """An annotation without a mask, or with an empty one, is ignored by the training; mmdet's would fail on it."""

    def _process_masks(self, results: dict) -> list:
        for instance in results.get("instances", []):
            instance.setdefault("mask", [])
        return super()._process_masks(results)
