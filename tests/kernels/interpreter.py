"""A pytest plugin, ``-p tests.kernels.interpreter``: mends Triton 3.6's interpreter where it is unlike a GPU, or slow.

* It holds a scalar as an array of one number and makes a loop bound of it by ``int(array)``, which numpy refuses since
  2.4 unless the array has no dimensions.
* It cuts float32 off to bfloat16, where a GPU rounds to nearest.
* It calls the function of a ``tl.associative_scan`` once for every two elements; here it gets whole slices.
* It puts its own functions into ``triton.language`` again for every helper that a kernel calls, 40% of its time.
"""

import functools

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_patch_lang = interpreter._patch_lang
_patch_lang_tensor = interpreter._patch_lang_tensor
_convert_float = interpreter._convert_float


@functools.cache
def _languages(fn):
    return [lang for lang in (tl, tl.core) if any(value is lang for value in fn.__globals__.values())]


def _patch_lang_once(fn):
    fresh = any(tl.core.is_builtin(lang.load) for lang in _languages(fn))
    return _patch_lang(fn) if fresh else interpreter._LangPatchScope()


def _patch_lang_tensor_and_index(tensor, scope):
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _convert_float_to_nearest(data, source, target, rounding_mode):
    if (source, target) == (tl.float32, tl.bfloat16):
        return torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.uint16).numpy()
    return _convert_float(data, source, target, rounding_mode)


def _scan_slices(self, inputs):
    slices = [[self.to_tensor(row, x.dtype) for row in np.moveaxis(x.handle.data, self.axis, 0)] for x in inputs]
    totals = [tuple(column[0] for column in slices)]
    for following in zip(*(column[1:] for column in slices), strict=True):
        totals.append(self.combine_fn.fn(*totals[-1], *following))
    stacked = ([total[i].handle.data for total in totals] for i in range(len(inputs)))
    return [self.to_tensor(np.stack(rows, self.axis), x.dtype) for rows, x in zip(stacked, inputs, strict=True)]


interpreter._patch_lang = _patch_lang_once
interpreter._patch_lang_tensor = _patch_lang_tensor_and_index
interpreter._convert_float = _convert_float_to_nearest
interpreter.ScanOps.generic_scan = _scan_slices
