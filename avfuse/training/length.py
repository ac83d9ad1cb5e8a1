"""How long a run is: enough steps for a small data set, and more epochs for one that came to its end."""

import math
from dataclasses import replace

from ..files import printable
from .checkpoints import list_checkpoints, step_of
from .run_folder import instead, read_run
from .settings import LoopConfig, schedule_of


def with_enough_steps(config: LoopConfig, clips: int) -> LoopConfig:
    """The settings with so many epochs that --min-steps are taken, and warm-up in proportion unless it was
    given; as they are if their epochs were given, or are not the default.
    """
    is_default = not config.is_asked("epochs") and config.epochs == type(config).epochs
    epochs = math.ceil(config.min_steps / schedule_of(config, clips).steps_per_epoch)
    if not is_default or epochs <= config.epochs:
        return config
    warmup = config.warmup_epochs
    if not config.is_asked("warmup_epochs"):
        warmup = round(warmup * epochs / config.epochs)
    return replace(config, epochs=epochs, warmup_epochs=warmup)


def settle_length(config: LoopConfig, clips: int) -> tuple[LoopConfig, int]:
    """The settings with the epochs that the run has; and the step at which it had come to its end when it was
    given more of them, 0 if it never was.

    Raises:
        ValueError: the folder holds a run of more epochs, of another warm-up, or one that has not come to its
            end.
    """
    config = with_enough_steps(config, clips)
    before = {} if config.restart else read_run(config.run)
    if not before or before["data"].get("clips") != clips:  # other data, which are refused
        return config, 0
    folder = f"--run-dir {printable(config.run)}"
    epochs, warmup = (before["settings"].get(name) for name in ("epochs", "warmup_epochs"))
    if type(epochs) is not int or type(warmup) is not int:
        raise ValueError(f"{folder} is damaged: its run has no epochs or warm-up")
    # An extended run keeps the warm-up that it began with; that of the settings has followed their epochs.
    is_extended = config.epochs != epochs or before["extended_at"]
    if config.warmup_epochs != warmup and (config.is_asked("warmup_epochs") or not is_extended):
        wanted = f"--warmup-epochs {warmup} -> {config.warmup_epochs}"
        raise ValueError(f"{folder} holds a run with other settings ({wanted}): {instead(config, before)}")
    config = replace(config, warmup_epochs=warmup)
    if config.epochs == epochs:
        return config, before["extended_at"]
    if config.epochs < epochs:
        raise ValueError(
            f"{folder} holds a run of {epochs} epochs, more than --epochs {config.epochs}: it may get "
            f"more, not fewer; {instead(config, before)}"
        )
    end = epochs * schedule_of(config, clips).steps_per_epoch
    if max(map(step_of, list_checkpoints(config.run)), default=0) < end:
        raise ValueError(
            f"{folder} holds a run that has not come to the end of its {epochs} epochs: only then it can be "
            f"given more; --epochs {epochs} goes on with it"
        )
    return config, end
