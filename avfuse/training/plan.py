"""The model that the settings of pretraining describe, and what a run with them will cost: `--plan`."""

from contextlib import nullcontext
from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from ..data import sounding_shapes
from ..data.find import DEMOS, by_name
from ..data.manifest import FILE, has_manifest
from ..mae import AVMAE, count_removed
from .costs import CARDS, LAUNCHES, PLAYED, SHARE, count_parameters, launch_seconds, step_flops, step_seconds
from .length import with_enough_steps
from .loop import check_found
from .recipes import TrainConfig, check_cuda_graphs
from .settings import FRESH, learning_rate, schedule_of
from .starts import first_encoder, saved_settings
from .task import Task

ADAMW_BYTES = 16  # per parameter in float32: weight, gradient, two moments
# Sizes of their training sets.
PUBLISHED_CLIPS = {
    "vggsound-ablation": 144_000,
    "vggsound-large": 144_000,
    "audioset": 1_730_000,
    "video": 144_000,
}


def make_model(config: TrainConfig) -> AVMAE:
    """The masked autoencoder that the settings describe; of a checkpoint it has the encoder, and what its
    decoders are, unless others are asked for, and what they predict.
    """
    names = "decoder_dim", "decoder_depth", "decoder_heads", "decode_from"
    decoders = {name: getattr(config, name) for name in names}
    encoder = first_encoder(config)
    if config.checkpoint != FRESH:
        saved = saved_settings(config.checkpoint).get("model", {})
        usual = {name: getattr(TrainConfig, name) for name in decoders}  # which a preset may change
        asked = {name for name, value in decoders.items() if config.is_asked(name) or value != usual[name]}
        decoders |= {name: saved[name] for name in decoders.keys() & saved.keys() if not asked}
        decoders |= {name: saved[name] for name in {"norm_target"} & saved.keys()}  # no setting says another
    names = "image_mask_ratio", "audio_mask_ratio", "tubes", "contrastive"
    return AVMAE(encoder, **decoders, **{name: getattr(config, name) for name in names})


def plan(config: TrainConfig, processes: int = 1) -> str:
    """What a run with these settings amounts to, for people. Opens no clip and allocates no weights."""
    check_cuda_graphs(config, processes)
    with torch.device("meta") if config.checkpoint == FRESH else nullcontext():
        mae = make_model(config)
    clips, counted = count_clips(config)
    config = with_enough_steps(config, clips)
    schedule = schedule_of(config, clips, processes=processes)
    accumulated = len(schedule.micro_batches(range(clips), 0))
    lr, of_all = learning_rate(config, schedule.batch_size), count_parameters(mae)
    interactions = mae.encoder.settings["interactions"]
    size = config.model if config.checkpoint == FRESH else "the checkpoint's"
    usual = type(config).batch_size
    is_root = config.lr_scaling == "root" and schedule.batch_size < usual
    scaled = f"sqrt({schedule.batch_size} x {usual})" if is_root else schedule.batch_size
    kept = {
        name: (patches := getattr(mae.encoder, name).patch_embed.num_patches)
        and f"{patches} tokens, {patches - count_removed('ratio', patches, ratio)} seen"
        for name, ratio in (("image", config.image_mask_ratio), ("audio", config.audio_mask_ratio))
    }
    frames = f"{mae.encoder.frames} frames of " if mae.encoder.frames > 1 else ""
    two, three = activation_bytes(mae, config.precision, 2), activation_bytes(mae, config.precision, 3)
    kept_bytes = ADAMW_BYTES + 4 * (bool(config.ema) + config.cuda_graphs)
    activations = two + (schedule.micro_batch - 2) * (three - two)  # weights cast to bf16 do not grow
    rows = {
        "run": f"{config.preset}: {size} model, {interactions} interactions, in {config.run}",
        "batch": f"{schedule.batch_size} clips = {processes} process{'es' * (processes != 1)} "
        f"x {accumulated} accumulated x {schedule.micro_batch}",
        "learning rate": f"{lr:.3g} = {config.base_lr:.3g} x {scaled} / 256, "
        f"{config.warmup_epochs} epochs of warm-up, then cosine",
        "steps": f"{schedule.steps:,} = {config.epochs} epochs x {schedule.steps_per_epoch}, "
        f"at {clips:,} clips ({counted})",
        "parameters": f"{count_parameters(mae.encoder) / 1e6:.1f} M in the encoder, "
        f"{of_all / 1e6:.1f} M with decoders",
        "tokens": f"image {frames}{kept['image']}; audio {kept['audio']}; "
        f"{mae.encoder.num_state_tokens} fusion",
        "memory": f"about {(of_all * kept_bytes + activations) / 2**30:.1f} GiB for each process: "
        f"{of_all * kept_bytes / 2**30:.1f} weights, gradients and AdamW, {activations / 2**30:.1f} "
        f"activations of {schedule.micro_batch} clips (computed; buffers of libraries come on top)",
    }
    flops, share = step_flops(mae), -(-schedule.batch_size // processes)
    parts = accumulated, not config.cuda_graphs
    checkpoint = of_all * (ADAMW_BYTES - 4 + (4 if config.ema else 0))
    rows |= {
        "arithmetic": f"{flops / 1e9:.1f} GFLOP for each clip, forward and backward; "
        f"{schedule.steps * schedule.batch_size * flops:.3g} FLOP for the run",
        "disk": f"{(checkpoint * (config.keep_checkpoints + 1) + 4 * of_all) / 1e9:.1f} GB: "
        f"{config.keep_checkpoints} checkpoints of {checkpoint / 1e9:.2f}, one being written, the model",
    }
    for card in CARDS:
        seconds = step_seconds(mae, flops, card, config.precision, share, *parts)
        hours, speed = schedule.steps * seconds / 3600, schedule.batch_size / seconds
        rows[card] = f"{hours * processes:,.2f} GPU hours ({hours:,.2f} h); to read: {speed:,.0f} clips/s"
        if seconds == launch_seconds(mae, *parts):
            rows[card] += "; as long as its launches take, the same on every card"
    launches = "" if config.cuda_graphs else f"{1e3 * LAUNCHES:g} ms a block to launch, or "
    rows["by"] = (
        f"a simple model, without judging: a micro-batch takes {launches}{1e3 * PLAYED:g} ms a block and its "
        f"arithmetic at {SHARE[config.precision]:.0%} of the card's peak, as measured on an H200"
    )
    return "\n".join(f"{name:>14}  {row}" for name, row in rows.items())


def count_clips(config: TrainConfig) -> tuple[int, str]:
    """How many clips there are to train on, and how that is known."""
    if config.data is None and config.preset in PUBLISHED_CLIPS:
        return PUBLISHED_CLIPS[config.preset], "as published"
    if config.data is None:
        return sounding_shapes.Settings(**DEMOS[config.demo][1]).train, "the demo's"
    found = Task.find(replace(config, workers=0), lambda line: None, by_name)
    check_found(found)
    is_checked = config.data_set == "auto" and has_manifest(config.data)
    kind = f"clips of {FILE}" if is_checked else "files that may be clips"
    if found.held_out:
        kind = f"{config.test_share:g} of {len(found.train) + len(found.test):,} {kind} are held out"
    return len(found.train), kind


def activation_bytes(mae: AVMAE, precision: str, clips: int) -> int:
    """Bytes that a forward of so many clips keeps for its backward, counted on fake tensors."""
    shapes = {name: tensor.shape for name, tensor in mae.state_dict().items()}
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with FakeTensorMode():
        state = {name: torch.empty(shape).requires_grad_() for name, shape in shapes.items()}
        weights = {weight.untyped_storage()._cdata for weight in state.values()}
        inputs = [torch.empty(clips, *shape) for shape in mae.encoder.input_shapes.values()]
        dtype = dict(no=None, fp16=torch.float16, bf16=torch.bfloat16)[precision]
        with (
            torch.autocast("cpu", dtype, enabled=dtype is not None),
            saved_tensors_hooks(count, lambda tensor: tensor),
        ):
            output = torch.func.functional_call(mae, state, tuple(inputs))
        del output  # alive until here, so that no storage's address was used twice
    return sum(kept.values())
