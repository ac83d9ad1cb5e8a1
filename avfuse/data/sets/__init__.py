"""The public data sets, one file each, in the layouts of their own releases."""

from functools import partial

from ...lazy import module_of

__getattr__ = partial(module_of, __name__)
