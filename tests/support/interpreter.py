"""Makes Triton's interpreter four times as quick, for all that imports this; what it computes is
the same.

Habits of Triton 3.7: it computes whether an integer overflows, and without TRITON_DEBUG
drops the answer; whenever a kernel calls a function, it looks through all of its language for what
to replace, which was replaced when the kernel was launched; a table of dtypes is made anew whenever
one is looked up; and every block of numbers gets a type and a shape of its own, with a name.
"""

import dataclasses
import functools
import inspect

import triton.language as tl
from triton.runtime import interpreter

_replaced = set()
"""Modules whose operations are replaced in this launch."""


@functools.cache
def _languages(function):
    """Of the modules that a kernel's file names, those of Triton's language."""
    modules = filter(inspect.ismodule, function.__globals__.values())
    return frozenset(module.__name__ for module in modules if module in (tl, tl.core))


def _launch(self, *args, **kwargs):
    _replaced.clear()
    _replaced.add(_languages(self.fn))
    return _original_launch(self, *args, **kwargs)


def _call(self, *args, **kwargs):
    languages = _languages(self.fn)
    if languages not in _replaced:
        interpreter._patch_lang(self.fn)
        _replaced.add(languages)
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as e:
        raise interpreter.InterpreterError(repr(e)) from e


@functools.cache
def _numpy_dtype(dtype):
    return _original_dtype(dtype)


def _dtype(triton_type):
    element = triton_type.scalar
    return _original_dtype(element) if element.is_ptr() else _numpy_dtype(element)


_block_types = {}
"""By element and shape: the attributes of a type, and of its tensors."""


def _init_block_type(self, element_ty, shape):
    key = element_ty
    if element_ty.is_ptr():  # which has no hash
        key = element_ty.element_ty, element_ty.address_space, element_ty.const
    sizes = tuple([n.value if isinstance(n, tl.constexpr) else n for n in shape])
    if (key, sizes) not in _block_types:
        _original_block_type(self, element_ty, shape)
        self.shape_of_tensors = tl.tuple([tl.constexpr(n) for n in sizes])
        self.numel_of_tensors = tl.constexpr(self.numel)
        _block_types[key, sizes] = vars(self).copy()
    else:
        vars(self).update(_block_types[key, sizes])


_no_shape, _one = tl.tuple([]), tl.constexpr(1)


def _init_tensor(self, handle, type):
    is_block = type.is_block()
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape = type.shape_of_tensors if is_block else _no_shape
    self.numel = type.numel_of_tensors if is_block else _one


_original_block_type = tl.block_type.__init__
tl.block_type.__init__ = _init_block_type
tl.tensor.__init__ = _init_tensor
_original_launch = interpreter.GridExecutor.__call__
_original_dtype = interpreter._get_np_dtype
interpreter.GridExecutor.__call__ = _launch
interpreter.InterpretedFunction.__call__ = _call
interpreter._get_np_dtype = _dtype
_options = interpreter.interpreter_builder.options
if not _options.debug:
    interpreter.interpreter_builder.options = dataclasses.replace(_options, sanitize_overflow=False)


def few_programs():
    """For engines whose requests are short: no more programs beside each other than have keys."""
    from vllm.v1.attention.backends import triton_attn

    from vllm_pasta.kernels.gpu import launch

    launch.MAX_PARTS = triton_attn.NUM_PAR_SOFTMAX_SEGMENTS = 2  # instead of 16
