"""What a model begins with: the weights of another one, and which of its parts are new."""

import json
import os
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn

from ..encoder import AVEncoder, layers_of
from ..files import printable
from ..loading import load_encoder
from ..presets import SIZES, create_encoder
from ..pretrained import WEIGHTS, file_at, load_strictly, read_config
from ..rules import option
from ..weight_files import read_safetensors
from .settings import FRESH, LoopConfig

OF_BLOCKS = "fusion_tokens image_aggregation_tokens audio_aggregation_tokens attn_ratio mlp_ratio".split()
OF_ENCODER = ("model", "interactions", "fusion_layers", *OF_BLOCKS, "audio_seconds")  # a checkpoint decides
OF_HEADS = ("modalities", "features", "batch_norm", "dim")  # settings of what a task puts on an encoder
TIME_PEAK = 3.0  # logits, with which a new bias of time begins


def saved_settings(checkpoint: str) -> dict:
    """What the config.json of a saved model holds: "class" and "model"; {} of other weights, or of none."""
    return {} if checkpoint == FRESH or os.path.isfile(checkpoint) else read_config(checkpoint)


def new_bias(config: LoopConfig) -> dict:
    """Options of an encoder whose pair bias, if settings ask for one, is new. One that is frozen, as in a
    probe, stays what it was.
    """
    has_peak = config.pair_bias == "time" and not getattr(config, "probe", False)
    return dict(pair_bias=config.pair_bias or False, time_peak=TIME_PEAK * has_peak)


def for_clips(encoder: AVEncoder, config: LoopConfig) -> AVEncoder:
    """The encoder of a checkpoint, for clips of as many frames as settings ask for, with their pair bias."""
    frames, own = config.frames or encoder.frames, encoder.settings["pair_bias"]
    options = dict(pair_bias=config.pair_bias or own) if own else new_bias(config)
    is_same = (frames, options["pair_bias"]) == (encoder.frames, own)
    return encoder if is_same else encoder.with_frames(frames, **options)


def fresh_encoder(config: LoopConfig) -> AVEncoder:
    """The encoder that settings describe, of which a task leaves most at their defaults."""
    inputs = replace(SIZES[config.model][-1], image_frames=config.frames or 1)
    if seconds := getattr(config, "audio_seconds", 0.0):
        inputs = replace(inputs, audio_seconds=seconds)
    options = {name: getattr(config, name) for name in OF_BLOCKS if hasattr(config, name)}
    options |= dict(fusion_layers=getattr(config, "fusion_layers", ()) or "all", norm_eps=config.norm_eps)
    return create_encoder(config.model, config.interactions, inputs=inputs, **options, **new_bias(config))


def first_encoder(config: LoopConfig, drop_path: float = 0.0) -> AVEncoder:
    """The encoder that a run begins with: a fresh one, or that of its checkpoint, which drops blocks at this
    rate and not at that of the checkpoint.

    Raises:
        ValueError: the checkpoint holds none, or another than settings ask for.
    """
    if config.checkpoint == FRESH:
        encoder = fresh_encoder(config)
    else:
        encoder = load_encoder(config.checkpoint)
        check_asked(config, encoder)
        encoder = for_clips(encoder, config)
    encoder = with_drop_path(encoder, drop_path)
    encoder.set_grad_checkpointing(config.grad_checkpointing)
    return encoder


def check_asked(config: LoopConfig, encoder: AVEncoder) -> None:
    """Raises ValueError if somebody asks for another encoder than that of the checkpoint."""
    given = [name for name in OF_ENCODER if hasattr(config, name) and config.is_asked(name)]
    asked = [name for name in given if getattr(config, name) != 0]  # which is to leave it open
    wanted = {name: getattr(config, name) for name in asked}
    (dim, depth, *_), inputs = SIZES[config.model], encoder.given_inputs
    is_as_large = (dim, depth) == (encoder.dims["image"], encoder.depth)
    found = encoder.settings | dict(model=config.model if is_as_large else None)
    found |= dict(audio_seconds=inputs and inputs.audio_seconds)
    if "fusion_layers" in asked:
        wanted["fusion_layers"] = list(layers_of(config.fusion_layers or "all", encoder.depth)) or "none"
    if wrong := [name for name in asked if wanted[name] != found.get(name)]:
        said = ", ".join(f"{option(type(config), name)} {getattr(config, name)}" for name in wrong)
        source = printable(config.checkpoint)
        raise ValueError(f"--checkpoint {source} has another encoder than {said}: leave these out")


def with_drop_path(encoder: AVEncoder, rate: float) -> AVEncoder:
    """The same encoder, in whose training blocks are dropped: up to `rate` of the time in the uni-modal
    branches, rising with depth as in timm, and `rate` in the fusion blocks (released ones drop nothing).
    """
    config = encoder.to_config()
    dropping = config | dict(drop_path=rate)
    for branch in "image", "audio":
        dropping[branch] = config[branch] | dict(drop_path_rate=rate)
    if dropping == config:
        return encoder
    return load_strictly(AVEncoder.from_config(dropping), encoder.state_dict())


def begin_from(
    model: nn.Module, checkpoint: str, say: Callable[[str], object], *, is_trained: bool = True
) -> None:
    """Gives a model, whose encoder is that of a checkpoint, all other parts that fit: of a model of the same
    class, with weights of the same names and shapes, and with the same classes if they have names. Which are
    taken, which are new and which are left is told.

    Raises:
        ValueError: no training follows, and the model is another than that of the checkpoint.
    """
    own, theirs = model.state_dict(), model.fitted(other_weights(model, checkpoint))
    parts = parts_of(own)
    taken = {part: of for part in parts if shapes(of := part_of(theirs, part)) == shapes(part_of(own, part))}
    load_strictly(model, own | {name: weight for of in taken.values() for name, weight in of.items()})
    saved, encoder = saved_settings(checkpoint).get("model", {}), model.encoder
    before, bias = saved.get("encoder", saved), encoder.settings["pair_bias"]
    had_frames = before.get("frames", 1) not in (None, 1)
    new = ["positions of frames"] * (encoder.frames > 1 and not had_frames)
    new += [f"a bias of {bias}"] * bool(bias and not before.get("pair_bias"))
    new += [part for part in parts if part not in taken]
    if not is_trained:
        settings = json.loads(json.dumps(model.settings))  # lists where saved ones have lists
        heads = [name for name in OF_HEADS if name in settings]
        new += [name for name in heads if saved.get(name, settings[name]) != settings[name]]
    if new and not is_trained:
        raise ValueError(
            f"--epochs 0 judges the model of --checkpoint {printable(checkpoint)} as it is, and that has no "
            f"such {', '.join(new)}: leave --epochs 0 out to train them, or ask for what it has"
        )
    said = f"weights of {printable(checkpoint)}: {', '.join(['encoder', *taken])}"
    left = ["positions of frames"] * (encoder.frames == 1 and had_frames)
    left += [name for name in parts_of(theirs) if name not in parts]
    said += f"; new: {', '.join(new)}" * bool(new) + f"; not taken: {', '.join(left)}" * bool(left)
    say(said if new or left else f"{said}, which is all there is")


def other_weights(model: nn.Module, checkpoint: str) -> dict[str, Tensor]:
    """The weights by name of a saved model, if it is of the same class and of the same classes of clips."""
    saved, own = saved_settings(checkpoint), model.settings.get("class_names")
    theirs = saved.get("model", {}).get("class_names", own)  # a segmenter did not tell them once
    if saved.get("class") != type(model).__name__ or list(own or ()) != list(theirs or ()):
        return {}
    return model.current(read_safetensors(file_at(checkpoint, WEIGHTS)))


def parts_of(weights: dict[str, Tensor]) -> list[str]:
    return [name for name in dict.fromkeys(name.partition(".")[0] for name in weights) if name != "encoder"]


def part_of(weights: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name: weight for name, weight in weights.items() if name.partition(".")[0] == part}


def shapes(weights: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in weights.items()}
