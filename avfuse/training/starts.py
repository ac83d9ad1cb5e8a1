"""What a model begins with: the weights of another one, and which of its parts are new."""

import os
from collections.abc import Callable

from torch import Tensor, nn

from ..files import printable, read_safetensors
from ..loading import saved_at
from ..pretrained import WEIGHTS, file_at, load_strictly, read_config

FRESH = "none"  # instead of a checkpoint


def saved_settings(checkpoint: str) -> dict:
    """What the config.json of a saved model holds: "class" and "model"; {} of other weights."""
    return {} if os.path.isfile(checkpoint) else read_config(saved_at(checkpoint)[0])


def begin_from(model: nn.Module, checkpoint: str, say: Callable[[str], object]) -> None:
    """Gives a model, whose encoder is that of a checkpoint, all other parts that fit: of a model of the same
    class, with weights of the same names and shapes, and with the same classes if they have names. Which are
    taken and which are new is told.
    """
    own, theirs = model.state_dict(), other_weights(model, checkpoint)
    parts = [name for name in dict.fromkeys(name.partition(".")[0] for name in own) if name != "encoder"]
    taken = {part: of for part in parts if shapes(of := part_of(theirs, part)) == shapes(part_of(own, part))}
    load_strictly(model, own | {name: weight for of in taken.values() for name, weight in of.items()})
    new = [part for part in parts if part not in taken]
    said = f"weights of {printable(checkpoint)}: {', '.join(['encoder', *taken])}"
    say(said + (f"; new: {', '.join(new)}" if new else ", which is all there is"))


def other_weights(model: nn.Module, checkpoint: str) -> dict[str, Tensor]:
    """The weights by name of a saved model, if it is of the same class and of the same classes of clips."""
    saved = saved_settings(checkpoint)
    names = [list(settings.get("class_names") or ()) for settings in (model.settings, saved.get("model", {}))]
    if saved.get("class") != type(model).__name__ or names[0] != names[1]:
        return {}
    return model.current(read_safetensors(file_at(saved_at(checkpoint)[0], WEIGHTS)))


def part_of(weights: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name: weight for name, weight in weights.items() if name.partition(".")[0] == part}


def shapes(weights: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in weights.items()}
