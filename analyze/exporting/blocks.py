"""Blocks that a model repeats, traced once for all of them.

To trace a block and to convert the trace takes about a second, and deep models are a few kinds of blocks many times
over. So the model is traced with a single node for each repeated block, and beside it one block of each kind, with its
weights as inputs; `put_together` then makes a graph of both.

Shapes: B batch, C channels, H W image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import NamedTuple

import torch
from onnx import ModelProto, NodeProto, helper, numpy_helper
from onnx.inliner import inline_local_functions
from timm.layers import DropPath
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.func import functional_call

from ssm_models.vim import VimBlock
from ssm_models.vssd import VSSDBlock
from ssm_models.vssm import VSSBlock

from . import graph
from .onnx_operators import BLOCK, DOMAIN

REPEATED = (VimBlock, VSSBlock, VSSDBlock)
_PLAIN = (bool, int, float, str, type(None))


class Kind(NamedTuple):
    """Blocks that differ in their weights alone."""

    paths: list[str]
    """Of the blocks in the model."""
    tensors: int
    """That a block is called with."""
    weights: list[str]
    """Their names in a block."""
    results: int


class Outline(NamedTuple):
    """A model, traced."""

    program: ExportedProgram
    """From the images, and for every kind the tensors and weights of a block, to the logits, and for every kind the
    results of that block. In the way to the logits `block_node` stands for all blocks of `kinds`."""
    kinds: list[Kind]
    weights: dict[str, Tensor]
    """Of the model, by name."""


def trace(model: nn.Module, size: tuple[int, int], channels: int = 3) -> Outline:
    """The graph of `model`, in evaluation mode and of `graph.with_operators`, for images (B, channels, H, W) with any
    B, H and W; `size` is the usual one."""
    images, free = graph.example(size, channels), (0, 2, 3)
    blocks = {path: module for path, module in model.named_modules() if isinstance(module, REPEATED)}
    calls = _calls(model, blocks, images)
    of_kind: dict[object, list[str]] = {}
    for path, block in blocks.items():
        of_kind.setdefault(_kind(block, calls[path]), []).append(path)
    shared = [paths for paths in of_kind.values() if len(paths) > 1]
    # on a part of the images, too: the sizes of a block's inputs that differ then are free
    part = _calls(model, blocks, images[tuple(slice(n // 2 if d in free else n) for d, n in enumerate(images.shape))])

    kinds, run, given, sizes = [], [], [], []
    for paths in shared:
        block, call = blocks[paths[0]], calls[paths[0]]
        weights = block.state_dict()
        kinds.append(Kind(paths, len(call.tensors), list(weights), 1 if call.single else len(call.results)))
        run.append(_with_weights(deepcopy(block), call, list(weights)))
        given.append((call.tensors, list(weights.values())))
        pairs = zip(call.tensors, part[paths[0]].tensors, strict=True)
        sizes.append(([_differing(*pair) for pair in pairs], [None] * len(weights)))
    nodes = {path: (blocks[path], calls[path]) for paths in shared for path in paths}
    with _as_nodes(nodes), _together(model, run):
        program = graph.export(model, (images, given), (dict.fromkeys(free, Dim.DYNAMIC), sizes), any_size=True)
    return Outline(program, kinds, model.state_dict())


def _differing(tensor: Tensor, other: Tensor) -> dict:
    return {d: Dim.DYNAMIC for d, (n, m) in enumerate(zip(tensor.shape, other.shape, strict=True)) if n != m}


@contextmanager
def _together(model: nn.Module, functions: Sequence[Callable]) -> Iterator[None]:
    """Inside, the model also computes `functions` of tensors and weights, which it is given beside the images."""
    alone = model.forward

    def forward(images: Tensor, given: list[tuple[list[Tensor], list[Tensor]]]) -> list:
        return [alone(images), *(run(*each) for run, each in zip(functions, given, strict=True))]

    model.forward = forward
    try:
        yield
    finally:
        del model.forward


def _with_weights(block: nn.Module, call: _Call, names: list[str]) -> Callable:
    """A block as a function of the tensors that it is called with, and of its weights."""

    def run(tensors: list[Tensor], weights: list[Tensor]):
        rest = iter(tensors)
        arguments = tuple(None if x is None else next(rest) for x in call.given)
        return functional_call(block, dict(zip(names, weights, strict=True)), arguments)

    return run


class _Call(NamedTuple):
    """What a block was called with, and what it gave."""

    given: Sequence[Tensor | None]
    results: Tensor | Sequence[Tensor]

    @property
    def tensors(self) -> list[Tensor]:
        return [x for x in self.given if x is not None]

    @property
    def single(self) -> bool:
        return isinstance(self.results, Tensor)


@torch.no_grad()
def _calls(model: nn.Module, blocks: dict[str, nn.Module], images: Tensor) -> dict[str, _Call]:
    """Of every block, by path, when the model sees `images`."""
    found = {}
    paths = {block: path for path, block in blocks.items()}

    def remember(block, given, results):
        found[paths[block]] = _Call(given, results)

    hooks = [block.register_forward_hook(remember) for block in paths]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _kind(block: nn.Module, call: _Call) -> object:
    """Equal for blocks that compute the same, but for their weights: classes and plain attributes of all parts, shapes
    of weights and inputs. What this does not see, the comparison of the file with the model does."""
    parts = [
        (name, type(part), tuple((key, value) for key, value in vars(part).items() if isinstance(value, _PLAIN)))
        for name, part in block.named_modules()
        if not isinstance(part, (DropPath, nn.Dropout))  # of different rates, which do nothing in evaluation
    ]
    shapes = [(name, weight.shape) for name, weight in block.state_dict().items()]
    given = [None if x is None else (x.shape, x.stride()) for x in call.given]
    return tuple(parts), tuple(shapes), tuple(given)


@torch.library.custom_op(
    "analyze::block", mutates_args=(), schema="(Tensor[] tensors, str path, int results) -> Tensor[]"
)
def block_node(tensors: list[Tensor], path: str, results: int) -> list[Tensor]:
    """The block at `path`, for graphs; it is not computed."""
    raise NotImplementedError("analyze::block stands for a block while its model is traced")


@block_node.register_fake
def _(tensors, path, results):
    return [torch.empty_like(tensors[0]) for _ in range(results)]


@contextmanager
def _as_nodes(blocks: dict[str, tuple[nn.Module, _Call]]) -> Iterator[None]:
    """Inside, the blocks with these paths are `block_node`, and their weights none of the model's."""

    def node(path: str, call: _Call):
        def forward(*given):
            tensors = [x for x in given if x is not None]
            if call.single:
                return block_node(tensors, path, 1)[0]
            return tuple(block_node(tensors, path, len(call.results)))

        return forward

    parts = {path: block._modules for path, (block, _) in blocks.items()}
    for path, (block, call) in blocks.items():
        block.forward = node(path, call)
        block._modules = {}
        vars(block).update(parts[path])  # models ask for the dtype of a block's norm
    try:
        yield
    finally:
        for path, (block, _) in blocks.items():
            block._modules = parts[path]
            for name in ("forward", *parts[path]):
                del vars(block)[name]


# ---- in ONNX --------------------------------------------------------------------------------------------------------


def put_together(model: ModelProto, outline: Outline) -> ModelProto:
    """The converted `outline.program` -> the model, from images to logits, with its weights and all of its blocks."""
    inputs, outputs = iter(list(model.graph.input)), iter(list(model.graph.output))
    images, logits = next(inputs), next(outputs)
    constants = {tensor.name for tensor in model.graph.initializer}
    call_of = {}
    for number, kind in enumerate(outline.kinds):
        given = [next(inputs).name for _ in range(kind.tensors + len(kind.weights))]
        results = [next(outputs).name for _ in range(kind.results)]
        name, nodes = f"{BLOCK}_{number}", _needed(model, results)
        shared = sorted(constants.intersection(name for node in nodes for name in node.input))
        model.functions.append(helper.make_function(DOMAIN, name, given + shared, results, nodes, model.opset_import))
        call_of |= dict.fromkeys(kind.paths, (name, kind.weights, shared))
    nodes = _needed(model, [logits.name])
    for node in nodes:
        if (node.domain, node.op_type) == (DOMAIN, BLOCK):
            path = node.attribute[0].s.decode()
            node.op_type, names, shared = call_of[path]
            del node.attribute[:]
            for name in (f"{path}.{name}" for name in names):
                node.input.append(name)
                model.graph.initializer.append(numpy_helper.from_array(outline.weights[name].numpy(), name))
            node.input.extend(shared)
    for kept, field in ((nodes, model.graph.node), ([images], model.graph.input), ([logits], model.graph.output)):
        del field[:]
        field.extend(kept)
    return inline_local_functions(model)


def _needed(model: ModelProto, results: list[str]) -> list[NodeProto]:
    """Copies of the nodes that make `results`, in their order."""
    wanted, found = set(results), []
    for node in reversed(model.graph.node):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            found.append(NodeProto())
            found[-1].CopyFrom(node)
    return found[::-1]
