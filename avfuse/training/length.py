"""How long a run is: enough steps for a small data set, and more epochs for one that came to its end."""

from dataclasses import replace

from ..files import printable
from .checkpoints import list_checkpoints, step_of
from .run_folder import instead, read_run
from .settings import LoopConfig, schedule_of


def with_enough_steps(config: LoopConfig, clips: int) -> LoopConfig:
    """The settings with so many epochs that --min-steps are taken, and warm-up in proportion unless it was
    given; as they are if their epochs were given, or are not the default.
    """
    per_epoch = schedule_of(config, clips).steps_per_epoch
    epochs = -(-config.min_steps // per_epoch)
    if config.is_asked("epochs") or config.epochs != type(config).epochs or epochs <= config.epochs:
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
    per_epoch = schedule_of(config, clips).steps_per_epoch
    epochs, warmup = (before["settings"].get(name) for name in ("epochs", "warmup_epochs"))
    folder, is_same = f"--run-dir {printable(config.run)}", config.warmup_epochs == warmup
    keeps = is_same or not config.is_asked("warmup_epochs")  # an extended run has that which it began with
    if config.epochs == epochs and (is_same or keeps and before["extended_at"]):
        return replace(config, warmup_epochs=warmup), before["extended_at"]
    if config.epochs == epochs or not keeps or type(epochs) is not int or type(warmup) is not int:
        wanted = f"--warmup-epochs {printable(warmup)} -> {config.warmup_epochs}"
        raise ValueError(f"{folder} holds a run with other settings ({wanted}): {instead(config, before)}")
    if config.epochs < epochs:
        raise ValueError(
            f"{folder} holds a run of {epochs} epochs, more than --epochs {config.epochs}: it may get "
            f"more, not fewer; {instead(config, before)}"
        )
    if step_of(next(iter(list_checkpoints(config.run)), config.run / "step-0")) < epochs * per_epoch:
        raise ValueError(
            f"{folder} holds a run that has not come to the end of its {epochs} epochs: only then it can be "
            f"given more; --epochs {epochs} goes on with it"
        )
    return replace(config, warmup_epochs=warmup), epochs * per_epoch
