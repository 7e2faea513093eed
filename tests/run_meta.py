"""What meta.json of a checkpoint after one epoch must hold beside its position."""

_RECORD = {"epoch": 1, "top1": 50.0, "top5": 90.0, "loss": 1.5, "images": 15}
META = {
    "results": {"best": _RECORD, "last": _RECORD},
    "weights": "model",
    "progress": {"train_images": 21, "train_seconds": 1.5, "seconds": 2.5},
    "guard": {"skipped": 0, "in_a_row": 0, "rollbacks": 0},
    "bad_images": {},
    "updates": 5,
    "processes": 1,
    "asked_batch": [4, 1],
    "images_per_update": 4,
    "data": None,
    "config": "",
    "command": "",
    "pretrained": None,
    "versions": {},
}
