"""Ops: one file each, of the same name as its kernel. The only code that knows which backend runs."""

from functools import partial

from ..lazy import module_of

__getattr__ = partial(module_of, __name__)
