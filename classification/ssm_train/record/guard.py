"""Losses and gradients that are not finite: what is counted, written down and given up."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ssm_train.common.errors import UserError
from ssm_train.common.fileio import write_atomic

_ADVICE = "lower TRAIN.BASE_LR or TRAIN.CLIP_GRAD, or use --amp off"


@dataclass
class Guard:
    """Counts of a run; part of its checkpoints. All ranks count alike."""

    max_in_a_row: int
    max_rollbacks: int
    skipped: int = 0
    in_a_row: int = 0
    rollbacks: int = 0

    def state(self) -> dict[str, int]:
        """The counts."""
        counts = asdict(self)
        return {name: counts[name] for name in ("skipped", "in_a_row", "rollbacks")}

    def load(self, state: dict[str, int]) -> None:
        """Restore what `state` gave."""
        self.skipped, self.in_a_row, self.rollbacks = (state[name] for name in ("skipped", "in_a_row", "rollbacks"))

    def made(self) -> None:
        """An update was made."""
        self.in_a_row = 0

    def skip(self) -> bool:
        """An update was skipped; returns whether the run has to roll back. UserError when it has done so too often."""
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row <= self.max_in_a_row:
            return False
        if self.rollbacks == self.max_rollbacks:
            raise UserError(
                f"{self.in_a_row} updates in a row were not finite, after {self.rollbacks} roll-back(s) "
                f"(TRAIN.MAX_NONFINITE {self.max_in_a_row}, TRAIN.MAX_ROLLBACKS {self.max_rollbacks}); the last "
                f"checkpoint is intact: {_ADVICE}, and continue with --resume auto; nonfinite/ holds the batches"
            )
        self.rollbacks += 1
        self.in_a_row = 0
        return True


@dataclass(frozen=True)
class MicroStep:
    """What is needed to repeat a micro-step: `seed` is that of seeding.seed_step, (SEED, step, rank)."""

    seed: tuple[int, int, int]
    loss: float
    images: list[str]
    keys: list[tuple[int, int, int]]


def write_dump(folder: Path, name: str, values: dict[str, Any], steps: list[MicroStep]) -> Path:
    """Write nonfinite/<name>.json: the batches of this rank, their randomness, and what came out (as text: JSON has
    no infinity)."""
    target = folder / "nonfinite"
    target.mkdir(parents=True, exist_ok=True)
    path = target / f"{name}.json"
    content = {key: str(value) if isinstance(value, float) else value for key, value in values.items()}
    content["micro_steps"] = [asdict(step) | {"loss": str(step.loss)} for step in steps]
    write_atomic(path, json.dumps(content, indent=1) + "\n")
    return path
