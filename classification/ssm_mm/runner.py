"""mmengine's Runner, which takes nothing but data from a checkpoint, and its log, which one process writes."""

from collections.abc import Sequence
from typing import Any

from mmengine.dist import master_only
from mmengine.hooks import LoggerHook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

from ssm_mm.checkpoints import fit, read, read_to_resume
from ssm_mm.resuming import own_records, resume_fault
from ssm_train.common.errors import UserError


@HOOKS.register_module(name="LoggerHook", force=True)
class LogOfOneProcess(LoggerHook):
    """In mmengine's own, every process of a test writes its metrics into one file, at the same time: torn JSON."""

    after_test_epoch = master_only(LoggerHook.after_test_epoch)


class DataRunner(Runner):
    """mmengine's own way from a file to the model would execute the config in it, and load what happens to fit."""

    def load_checkpoint(
        self,
        filename: str,
        map_location: Any = "cpu",
        strict: bool = True,
        revise_keys: Sequence[tuple[str, str]] = (),
    ) -> dict[str, Any]:
        """Load the model strictly; returns the content of the file, as plain data on the CPU, for `resume`, where each
        part moves its tensors itself. UserError as `checkpoints.read` and `fit` say."""
        content = (read_to_resume if self._resume else read)(filename)
        if self._resume:
            fault = resume_fault(content, self.optim_wrapper, self.param_schedulers)
            if fault:
                raise UserError(
                    f"checkpoint {filename} does not fit this training: {fault}; to start from its weights, use "
                    f"--cfg-options load_from={filename}"
                )
            own_records(content, self.work_dir)
        self.call_hook("after_load_checkpoint", checkpoint=content)
        model = unwrapped(self.model)
        model.load_state_dict(fit(model, content, filename))
        self._has_loaded = True
        self.logger.info(f"Load checkpoint from {filename}")
        return content


def unwrapped(model: nn.Module) -> nn.Module:
    """The detector or segmentor inside the wrappers of several processes and of test-time augmentation."""
    while hasattr(model, "module"):
        model = model.module
    return model
