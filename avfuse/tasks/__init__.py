"""Downstream tasks (paper Sec. 4), each a head, a loss, a metric and a program; the loop is shared."""

from functools import partial

from ..lazy import module_of

__getattr__ = partial(module_of, __name__)
