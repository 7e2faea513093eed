"""What a training step needs of memory: mostly what the backward pass keeps of the images."""

import itertools

import torch
from yacs.config import CfgNode as CN

from ssm_train.common.precision import autocast
from ssm_train.config.defaults import channels, replaced
from ssm_train.step.model import build_model, freeze, set_train_mode


def kept_bytes(cfg: CN, amp: str) -> int:
    """Bytes that autograd keeps of one image from the forward to the backward pass, weights not counted.

    Counted on the CPU, on two images for the sake of batch norms. The peak of a step is 0.9 to 1.2 of this times the
    batch, and weights, averages and optimizer. Recomputation (TRAIN.USE_CHECKPOINT) is left out: it keeps less.
    """
    network = build_model(replaced(cfg, {"TRAIN.USE_CHECKPOINT": False}))
    freeze(network, cfg)
    set_train_mode(network)
    tensors = itertools.chain(network.parameters(), network.buffers())
    weights = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        # the graph holds it, so that its address is not given away before all are counted
        return tensor.detach()

    images = torch.zeros(2, channels(cfg), cfg.DATA.IMG_SIZE, cfg.DATA.IMG_SIZE)
    # bf16 takes as many bytes as fp16, which CPUs are slow at
    precision = autocast("off" if amp == "off" else "bf16", torch.device("cpu"))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), precision:
        logits = network(images)
    del logits
    passes = 2 if cfg.TRAIN.COSUB else 1
    return passes * sum(kept.values()) // len(images)
