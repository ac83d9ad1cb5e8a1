"""The model that the settings of pretraining describe, and what a run with them will cost: `--plan`."""

import os

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from ..data import sounding_shapes
from ..data.listing import SUFFIXES
from ..mae import AVMAE, count_removed
from ..presets import create_encoder
from ..vit import input_shape
from .recipes import TrainConfig
from .settings import learning_rate, schedule_of

ADAMW_BYTES = 16  # per parameter in float32: weight, gradient, two moments
# Sizes of their training sets.
PUBLISHED_CLIPS = {"vggsound-ablation": 144_000, "vggsound-large": 144_000, "audioset": 1_730_000}


def make_model(config: TrainConfig) -> AVMAE:
    """The masked autoencoder that the settings describe."""
    encoder = create_encoder(
        config.model,
        config.interactions,
        fusion_layers=config.fusion_layers or "all",
        fusion_tokens=config.fusion_tokens,
        image_aggregation_tokens=config.image_aggregation_tokens,
        audio_aggregation_tokens=config.audio_aggregation_tokens,
        attn_ratio=config.attn_ratio,
        mlp_ratio=config.mlp_ratio,
    )
    encoder.set_grad_checkpointing(config.grad_checkpointing)
    return AVMAE(
        encoder,
        decoder_dim=config.decoder_dim,
        decoder_depth=config.decoder_depth,
        decoder_heads=config.decoder_heads,
        image_mask_ratio=config.image_mask_ratio,
        audio_mask_ratio=config.audio_mask_ratio,
    )


def plan(config: TrainConfig, processes: int = 1) -> str:
    """What a run with these settings amounts to, for people. Opens no clip and allocates no weights."""
    with torch.device("meta"):
        mae = make_model(config)
    clips, counted = count_clips(config)
    schedule = schedule_of(config, clips, processes=processes)
    accumulated = len(schedule.micro_batches(range(clips), 0))
    lr, of_all = learning_rate(config, schedule.batch_size), count_parameters(mae)
    kept = {
        name: (patches := getattr(mae.encoder, name).patch_embed.num_patches)
        and f"{patches} tokens, {patches - count_removed('ratio', patches, ratio)} seen"
        for name, ratio in (("image", config.image_mask_ratio), ("audio", config.audio_mask_ratio))
    }
    two, three = activation_bytes(mae, config.precision, 2), activation_bytes(mae, config.precision, 3)
    kept_bytes = ADAMW_BYTES + (4 if config.ema else 0)
    activations = two + (schedule.micro_batch - 2) * (three - two)  # weights cast to bf16 do not grow
    rows = {
        "run": f"{config.preset}: {config.model} model, {config.interactions} interactions, in {config.run}",
        "batch": f"{schedule.batch_size} clips = {processes} process{'es' * (processes != 1)} "
        f"x {accumulated} accumulated x {schedule.micro_batch}",
        "learning rate": f"{lr:.3g} = {config.base_lr:.3g} x {schedule.batch_size} / 256, "
        f"{config.warmup_epochs} epochs of warm-up, then cosine",
        "steps": f"{schedule.steps:,} = {config.epochs} epochs x {schedule.steps_per_epoch}, "
        f"at {clips:,} clips ({counted})",
        "parameters": f"{count_parameters(mae.encoder) / 1e6:.1f} M in the encoder, "
        f"{of_all / 1e6:.1f} M with decoders",
        "tokens": f"image {kept['image']}; audio {kept['audio']}; {mae.encoder.num_state_tokens} fusion",
        "memory": f"about {(of_all * kept_bytes + activations) / 2**30:.1f} GiB for each process: "
        f"{of_all * kept_bytes / 2**30:.1f} weights, gradients and AdamW, {activations / 2**30:.1f} "
        f"activations of {schedule.micro_batch} clips (computed; buffers of libraries come on top)",
    }
    return "\n".join(f"{name:>14}  {row}" for name, row in rows.items())


def count_clips(config: TrainConfig) -> tuple[int, str]:
    """How many clips there are to train on, and how that is known."""
    if config.data is None and config.preset in PUBLISHED_CLIPS:
        return PUBLISHED_CLIPS[config.preset], "as published"
    if config.data is None:
        return sounding_shapes.Settings().train, "the demo's"
    if not config.data.is_dir():
        raise ValueError(f"--data {config.data} is not a folder")
    root = config.data / "train" if (config.data / "train").is_dir() else config.data
    files = (name for _, _, names in os.walk(root) for name in names)
    return sum(name.lower().endswith(SUFFIXES) for name in files), "files that may be videos"


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
        inputs = [torch.empty(clips, *input_shape(getattr(mae.encoder, name))) for name in ("image", "audio")]
        dtype = dict(no=None, fp16=torch.float16, bf16=torch.bfloat16)[precision]
        with (
            torch.autocast("cpu", dtype, enabled=dtype is not None),
            saved_tensors_hooks(count, lambda tensor: tensor),
        ):
            output = torch.func.functional_call(mae, state, tuple(inputs))
        del output  # alive until here, so that no storage's address was used twice
    return sum(kept.values())


def count_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
