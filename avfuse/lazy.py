"""Modules that are imported when first asked for: `import avfuse` brings every name, and costs little."""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType


def module_of(package: str, name: str) -> ModuleType:
    """The module of a package that is asked for as its attribute; AttributeError if there is none."""
    if name.startswith("_") or not find_spec(f".{name}", package):
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return import_module(f".{name}", package)
