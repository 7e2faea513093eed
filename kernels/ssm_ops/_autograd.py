"""How the operators are differentiated: once by their kernels, further by plain PyTorch.

An operator is a registered forward, a registered backward, and a meaning: the forward of its reference, in plain
PyTorch. The derivative of the forward is the backward. The derivative of the backward, which only ``create_graph=True``
leads to, is that of the meaning, computed again from the inputs: right in any order, and as slow as the reference.
Function transforms (`torch.func`) and forward-mode derivatives cannot see into a kernel; under them the meaning is
computed instead of it.

All this is registered with the dispatcher, so that it also holds where the operators are nodes of a graph, compiled or
exported. Eager calls enter it directly, which saves a round through the dispatcher.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ._library import LAUNCHERS, is_transformed, no_autocast, register_autograd, runs_eagerly


def differentiate(overload, apply: Callable, meaning: Callable) -> Callable:
    """Let a registered operator be differentiated by `apply`, of an autograd function, and under transforms by its
    `meaning`; both take its arguments. Returns what is to be called in its place."""

    def run(*args):
        if is_transformed():
            return meaning(*args)
        if torch.is_grad_enabled():
            return apply(*args)
        return below_autograd(overload, *args)

    def call(*args):
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # the graph shall show the operator
            return overload(*args)
        return run(*args)

    register_autograd(overload, run)
    return call


def past_dispatcher(overload, call: Callable) -> Callable:
    """`call`, without the way through the dispatcher where nobody is there for whom it would have to be asked."""
    launch = LAUNCHERS[overload]

    def run(*args):
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.autograd._profiler_enabled():
            return call(*args)
        return launch(*args) if runs_eagerly(*(a for a in args if isinstance(a, Tensor))) else call(*args)

    return run


def below_autograd(overload, *args):
    """The operator, for a caller that sees to its derivative."""
    with torch._C._AutoDispatchBelowAutograd():
        return overload(*args)


class Differentiable:
    """An operator's `forward` and `backward`, to be called with the arguments of their schemas, and its `meaning`.

    The schemas tell what is what. The forward takes inputs, flags and `impl`. The backward takes the gradients of the
    first results (no others have one), the inputs, the last result if it needs it, and the flags, without `out_dtype`,
    which is that of the gradient. It returns the gradient of every input, without elements for an absent one.

    A forward with the flag `keep_states` has its last result without elements where that is False. Callers pass False;
    it becomes True here, where a gradient may be asked for.

    Args:
        forward, backward: the registered operators.
        reference: the forward in plain PyTorch, without `impl`.
    """

    def __init__(self, forward, backward, reference: Callable):
        names = [a.name for a in forward._schema.arguments]
        names_of_backward = [a.name for a in backward._schema.arguments]
        self.n_gradients = names_of_backward.index(names[0])
        self.n_inputs = len(backward._schema.returns)
        self.n_saved = int(forward._schema.returns[-1].name in names_of_backward)
        self.takes_dtype = "out_dtype" in names
        self.shared = [i for i, name in enumerate(names) if i >= self.n_inputs and name in names_of_backward]
        self.keep = names.index("keep_states") if "keep_states" in names else None
        self.reference = reference
        self.overloads = forward, backward

        name = forward._schema.name.split("::")[1]  # in what autograd and the profiler show
        apply, apply_backward = (
            functools.partial(type(name + suffix, (function,), {}).apply, self)
            for suffix, function in (("", _Forward), ("_backward", _Backward))
        )
        self.forward = past_dispatcher(forward, differentiate(forward, apply, self.meaning))
        self.backward = differentiate(backward, apply_backward, self.meaning_of_backward)

    def meaning(self, *args) -> Tensor | tuple[Tensor, ...]:
        """As `forward`, in plain PyTorch."""
        with no_autocast(args[0].device.type):
            results = self.reference(*args[:-1])
        if isinstance(results, Tensor):
            return results
        return *results[: self.n_gradients], *(r.detach() for r in results[self.n_gradients :])

    def meaning_of_backward(self, *args) -> tuple[Tensor, ...]:
        """As `backward`, in plain PyTorch."""
        gradients, args = args[: self.n_gradients], args[self.n_gradients :]
        inputs, (*flags, impl) = args[: self.n_inputs], args[self.n_inputs + self.n_saved :]
        if self.takes_dtype:
            flags.append(gradients[0].dtype)
        if self.keep is not None:
            flags.append(False)

        def results(*inputs: Tensor | None) -> tuple[Tensor, ...]:
            made = self.meaning(*inputs, *flags, impl)
            return (made,) if isinstance(made, Tensor) else made[: self.n_gradients]

        found = _vjp(results, inputs, gradients)
        return tuple(gradients[0].new_empty(0) if g is None else g for g in found)


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op: Differentiable, *args):
        if op.keep is not None:
            args = *args[: op.keep], args[op.keep] or any(ctx.needs_input_grad), *args[op.keep + 1 :]
        results = below_autograd(op.overloads[0], *args)
        made = (results,) if isinstance(results, Tensor) else results
        ctx.save_for_backward(*args[: op.n_inputs], *made[len(made) - op.n_saved :])
        ctx.op, ctx.flags, ctx.n_flags = op, [args[i] for i in op.shared], len(args) - op.n_inputs
        ctx.results = [(r.shape, r.dtype) for r in made[: op.n_gradients]]
        ctx.mark_non_differentiable(*made[op.n_gradients :])
        ctx.set_materialize_grads(False)  # of results that have none, too
        return results

    @staticmethod
    def backward(ctx, *gradients):
        op, tensors = ctx.op, ctx.saved_tensors
        gradients = (
            tensors[0].new_zeros(shape, dtype=dtype) if g is None else g
            for g, (shape, dtype) in zip(gradients, ctx.results, strict=False)
        )
        found = op.backward(*gradients, *tensors, *ctx.flags)
        found = (None if x is None else g for x, g in zip(tensors, found, strict=False))
        return None, *found, *(None for _ in range(ctx.n_flags))


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op: Differentiable, *args):
        n_tensors = op.n_gradients + op.n_inputs
        ctx.save_for_backward(*args[:n_tensors])
        ctx.op, ctx.flags = op, args[n_tensors + op.n_saved :]
        ctx.set_materialize_grads(False)
        return below_autograd(op.overloads[1], *args)

    @staticmethod
    def backward(ctx, *gradients):
        op, tensors = ctx.op, ctx.saved_tensors
        wanted = [i for i, g in enumerate(gradients) if g is not None]
        rest = (*(None for _ in range(op.n_saved)), *ctx.flags)
        if not wanted:
            return None, *(None for _ in (*tensors, *rest))

        def results(*tensors: Tensor | None) -> tuple[Tensor, ...]:
            made = op.meaning_of_backward(*tensors, *rest)
            return tuple(made[i] for i in wanted)

        return None, *_vjp(results, tensors, tuple(gradients[i] for i in wanted)), *(None for _ in rest)


def _vjp(function: Callable, tensors: Sequence[Tensor | None], gradients: tuple[Tensor, ...]) -> list[Tensor | None]:
    """The gradients of `tensors`, by autograd, from those of ``function(*tensors)``; None stays None."""

    def of_present(*present: Tensor):
        given = iter(present)
        return function(*(None if t is None else next(given) for t in tensors))

    with no_autocast(gradients[0].device.type):
        found = iter(torch.func.vjp(of_present, *(t for t in tensors if t is not None))[1](gradients))
    return [None if t is None else next(found) for t in tensors]
