"""How every command begins: options are read before anything heavy is imported, mistakes need no traceback,
and Ctrl-C ends it at any moment.
"""

import argparse
import atexit
import gc
import inspect
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import NoReturn

import docstring_parser
import tyro
from safetensors import SafetensorError

from . import process
from .files import printable

SAID = tyro.conf.arg(help_behavior_hint="")  # marks an option whose text says what holds by default
EXPLAINED = (ValueError, OSError, SafetensorError)  # faults whose message says what to do


def begin(
    module: str,
    parse: Callable,
    work: str | Callable = "main",
    explained: tuple[type[Exception], ...] = EXPLAINED,
) -> NoReturn:
    """Runs the command of a module, which calls this before its own imports.

    Args:
        module: its name.
        parse: the options, called with `args`, and with `prog` for the help.
        work: called with the options, it returns what to exit with. A function, or the name of one in that
            module, which is imported only then.
        explained: of the faults that end the work, those that need no traceback.
    """
    is_heard = process.end_at_once()
    process.end_with_its_reader(True)  # of the help
    try:
        options = parse(args=sys.argv[1:], prog=process.called or f"python -m {module}")
    except EXPLAINED as error:
        sys.exit(f"error: {printable(error)}")
    process.end_with_its_reader(False)  # work also writes to pipes of its own
    if isinstance(work, str):
        gc.disable()  # to look for garbage among what is imported is over a third of the time to start
        work = getattr(import_module(module), work)
        keep_what_is_imported()
        gc.enable()
    try:
        if is_heard:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # work has things to put in order
        code = work(options)
    except KeyboardInterrupt:
        code = process.INTERRUPTED
    except explained as error:
        code = f"error: {printable(error)}"
    if is_heard:
        process.end_at_once()
    sys.exit(code)


def keep_what_is_imported() -> None:
    """Nobody looks for garbage among it again, not even when the process ends, which would take a second."""
    gc.freeze()
    triton = sys.modules.get("triton._C.libtriton")
    if type(getattr(triton, "get_cache_invalidating_env_vars", None)).__module__ == "nanobind":
        atexit.register(gc.unfreeze)  # newer releases call what is not collected then leaked, line by line


def given(args: Sequence[str], **defaults: str) -> argparse.Namespace:
    """The values of a few options, which decide what the others have for defaults."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", default=value)
    return parser.parse_known_args(args)[0]


def read(kind: Callable, *markers, **settings) -> Callable:
    """The reader of a command line for a class of options, or a function whose arguments they are."""
    docstring_parser.parse_from_object = parse_from_object
    return partial(tyro.cli, kind, config=(tyro.conf.DisallowNone, *markers), **settings)


def parse_from_object(
    obj: object, *, parse: Callable = docstring_parser.parse_from_object
) -> docstring_parser.Docstring:
    """As it is called where tyro looks for the texts of options; without indentation, for which tyro takes
    every line of a text, but the first, for a paragraph (1.0.17).
    """
    found = parse(obj)
    for option in found.params:
        option.description = option.description and inspect.cleandoc(option.description)
    return found
