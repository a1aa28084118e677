"""Makes Triton's interpreter three times as quick, for all that imports this; what it computes is
the same.

Three habits of Triton 3.7: it computes whether an integer overflows, and without TRITON_DEBUG
drops the answer; whenever a kernel calls a function, it looks through all of its language for what
to replace, which was replaced when the kernel was launched; and a table of dtypes is made anew
whenever one is looked up.
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
