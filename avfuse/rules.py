"""What is declared beside an option: which values it may have. Nothing here brings torch."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import get_annotations


@dataclass(frozen=True)
class Rule:
    """Which values a setting may have, and how a message says so."""

    wish: str
    holds: Callable[[float], bool]


COUNT = Rule("must be positive", lambda value: value >= 1)
NOT_NEGATIVE = Rule("must not be negative", lambda value: 0 <= value < math.inf)
RATE = Rule("must be in [0, 1)", lambda value: 0 <= value < 1)
SECONDS = Rule("must be a positive number of seconds", lambda value: 0 < value < math.inf)
INTERVAL = Rule(
    "must be a positive number of seconds, 0.001 at least", lambda value: 1e-3 <= value < math.inf
)


def marks(kind: type) -> Iterator[tuple[str, object]]:
    """Each setting of a class with each of its marks, those of the classes it builds on first: a class that
    declares a setting anew, for another default, keeps the marks.
    """
    for base in reversed(kind.__mro__):
        for name, hint in get_annotations(base).items():
            for mark in getattr(hint, "__metadata__", ()):
                yield name, mark


def check_rules(config: object) -> None:
    """Raises ValueError naming the option whose value is none that it may have; None is always one."""
    rules = {name: mark for name, mark in marks(type(config)) if isinstance(mark, Rule)}
    for name, rule in rules.items():
        value = getattr(config, name)
        if value is not None and not rule.holds(value):
            raise ValueError(f"{option(type(config), name)} {rule.wish}, got {value}")


def option(kind: type, name: str) -> str:
    """What a setting of a class is called on the command line, where `tyro.conf.arg` may name it."""
    called = [mark.name for of, mark in marks(kind) if of == name and getattr(mark, "name", None)]
    return "--" + [name, *called][-1].replace("_", "-")
