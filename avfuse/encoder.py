"""The three-branch encoder: image and audio transformers, and fusion tokens that tie them at any depth."""

import copy
from collections.abc import Collection, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .branch import (
    Branch,
    Selection,
    absent,
    check_branch,
    check_joint,
    joint_masks,
    layers_of_blocks,
    resampled_frames,
)
from .checks import check_choice, check_count, check_flag, check_positive, check_rate, is_number
from .folding import FoldedBlock, FoldedDense, check_foldable, refuse_hooks, shares_norms
from .fusion import NORM_EPS, STATE, VARIANTS, Stream, Variant
from .graphs import CudaGraphs
from .inputs import InputSettings, middles
from .ops.residual_norm import residual_norm
from .predictor import Predictor
from .pretrained import Pretrained
from .vit import (
    ask_for_inputs,
    audio_times,
    build_vit,
    check_inputs,
    check_rebuilt,
    check_vit,
    default_inputs,
    describe_vit,
    input_shape,
    joint_heads,
    per_clip,
    per_frame,
    run_jointly,
    take_over,
)

FEATURES = ("image", "audio", "fusion")


class EncoderOutput(NamedTuple):
    """Normalised tokens of the last layer; `layers`, on request, those of every layer before the norm."""

    image: Tensor | None  # (B, prefix + n_image, D)
    audio: Tensor | None  # (B, prefix + n_audio, D)
    fusion: Tensor  # (B, F, D)
    layers: "list[EncoderOutput] | None" = None


def pool(tokens: EncoderOutput) -> dict[str, Tensor]:
    """The means of all image, audio and fusion tokens, (B, D) each; what is None is left out."""
    return {name: t.flatten(1, -2).mean(1) for name in FEATURES if (t := getattr(tokens, name)) is not None}


class AVEncoder(nn.Module, Predictor, Pretrained):
    """Early-fusion audio-visual encoder (paper Sec. 3.1): two timm ViTs joined by fusion tokens.

    In a fused layer, all three branches update from the layer before (Eq. 1-3): the fusion block reads the
    image and audio patch tokens, and both uni-modal blocks attend to the fusion tokens as extra keys and
    values. Layers without fusion run the uni-modal blocks alone.

    Two ways to fuse, "joint" and "cross", have no fusion branch: its tokens stay what they are, as with
    "none". In their fused layers, image and audio tokens read each other's patch tokens; where a clip lacks a
    modality, the other runs alone.

    Args:
        image, audio: timm VisionTransformers with standard blocks; they become part of the encoder, and lose
            their classifier head. Audio is a one-channel image (mel, time). The fusion tokens have the width
            of `image`; where `audio` has another, it reads them through a linear map.
        interactions: "dense" (exact, all pairs; the default), "bilinear", "factorized", "token"; "joint"
            (each block's own queries attend to the keys and values of both blocks), "cross" (a
            cross-attention to the other modality before the block, see `avfuse.fusion.CrossFusion`); "none".
        fusion_layers: "all", "none", or the 0-based layers that fuse.
        fusion_tokens: F; default 16. image_aggregation_tokens, audio_aggregation_tokens: of "factorized";
            default 8.
        num_heads: of the fusion blocks; default the image transformer's.
        attn_ratio, mlp_ratio, drop, drop_path: of the fusion blocks, see `avfuse.fusion.FusionBlock`.
        norm_eps: of the norms of the fusion blocks; default that of the image transformer's blocks, so that
            `fused` can share them.
        pair_bias: a learned bias per head and pair in every fusion block ("dense" and "bilinear"), zero at
            first: "position" (or True) for each pair of an image and an audio position, "time" a function of
            how far frame and sound are apart, see `avfuse.fusion.TimeBias`; False for none.
        time_peak: height in logits of a triangle with which tables of "time" begin, at no time difference; it
            falls to 0 at the next frame, or step of audio tokens if that is longer. Default 0; with 3,
            synchrony is learned sooner.
        frames: T, of a clip; default that of `inputs`, or 1. Of several, the image transformer runs on each
            alone, with a learned position of the frame added (zero at first), and fusion reads their patch
            tokens one frame after the other. Such an encoder also takes more or fewer frames, evenly over the
            same seconds: positions are interpolated.
        block_layers: for transformers of unequal depth, the 0-based layers of the deeper one in which the
            blocks of the other run, one after the other. In the layers between, its tokens wait.
        inputs: the input transforms, kept in config.json and needed only where files are read. Default: the
            paper's at the sizes of the transformers, with the mean and deviation that timm states for
            `image`; None where spectrograms are not of the paper's 192 steps, whose seconds nobody knows.

    A transformer whose parts config.json cannot describe (such as an unknown activation) works, but
    `save_pretrained` refuses it.

    Raises:
        ValueError: naming the argument that is wrong.
    """

    variants: dict[str, Variant] = VARIANTS

    def __init__(
        self,
        image: VisionTransformer,
        audio: VisionTransformer,
        *,
        interactions="dense",
        fusion_layers="all",
        fusion_tokens=16,
        image_aggregation_tokens=8,
        audio_aggregation_tokens=8,
        num_heads=None,
        attn_ratio=0.25,
        mlp_ratio=1.0,
        pair_bias=False,
        time_peak: float = 0.0,
        frames: int | None = None,
        drop=0.0,
        drop_path=0.0,
        norm_eps: float | None = None,
        block_layers: Sequence[int] | None = None,
        inputs: InputSettings | None = None,
    ):
        super().__init__()
        check_vit("image", image, channels=3)
        check_vit("audio", audio, channels=1)
        pair_bias = "position" if pair_bias is True else pair_bias
        self.check_variant(interactions, pair_bias, image.embed_dim, audio.embed_dim)
        num_heads = image.blocks[0].attn.num_heads if num_heads is None else num_heads
        check_count("num_heads", num_heads)
        norm_eps = image.blocks[0].norm1.eps if norm_eps is None else norm_eps
        counts = fusion_tokens, image_aggregation_tokens, audio_aggregation_tokens
        counts = dict(zip(STATE, counts, strict=True))
        for name, count in counts.items():
            check_count(name, count)
        for name, number in ("attn_ratio", attn_ratio), ("mlp_ratio", mlp_ratio), ("norm_eps", norm_eps):
            check_positive(name, number)
        for name, rate in ("drop", drop), ("drop_path", drop_path):
            check_rate(name, rate)
        self.image, self.audio = image, audio
        self.block_layers = layers_of_blocks(len(image.blocks), len(audio.blocks), block_layers)
        self.embed_dim, self.depth = image.embed_dim, max(len(image.blocks), len(audio.blocks))
        self.num_fusion_tokens = fusion_tokens
        self.frames = getattr(inputs, "image_frames", 1) if frames is None else frames
        check_count("frames", self.frames)
        self.given_inputs = default_inputs(image, audio, self.frames) if inputs is None else inputs
        check_inputs(self.given_inputs, image, audio, self.frames)
        self.grad_checkpointing = False
        fusion_layers = layers_of(fusion_layers, self.depth)
        self.fusion_layers = () if interactions == "none" else fusion_layers
        if interactions == "joint":
            check_joint(image, audio, self.fusion_layers, self.block_layers)
        # Everything that rebuilds the fusion branch, as it goes into config.json.
        self.settings = dict(
            interactions=interactions,
            fusion_layers=list(self.fusion_layers) or "none",
            **counts,
            num_heads=num_heads,
            attn_ratio=attn_ratio,
            mlp_ratio=mlp_ratio,
            pair_bias=pair_bias,
            frames=self.frames,
            drop=drop,
            drop_path=drop_path,
            norm_eps=norm_eps,
            block_layers=None if block_layers is None else list(block_layers),
        )
        self.add_fusion(time_peak)
        for vit in image, audio:  # last: what is refused stays as it was
            take_over(vit)

    def check_variant(self, interactions: str, pair_bias: bool | str, image_dim: int, audio_dim: int) -> None:
        """Raises ValueError where this way to fuse is unknown, or cannot do what is asked of it."""
        check_choice("interactions", interactions, tuple(self.variants))
        options = self.variants[interactions].options
        if not (image_dim == audio_dim or interactions == "none" or "audio_dim" in options):
            raise ValueError(
                f"interactions={interactions!r} needs transformers of one width, got {image_dim} for"
                f" image and {audio_dim} for audio"
            )
        check_choice("pair_bias", pair_bias, (False, "position", "time"))
        if pair_bias and "pair_bias" not in options:
            able = [name for name, variant in self.variants.items() if "pair_bias" in variant.options]
            raise ValueError(
                f"pair_bias needs interactions {' or '.join(map(repr, able))}, got {interactions!r}"
            )

    def add_fusion(self, time_peak: float) -> None:
        """Makes what the transformers do not bring: blocks, tokens, their norm and positions."""
        with_block = self.fusion_layers if self.variant.block else ()
        self.fusion_blocks = nn.ModuleDict({str(layer): self.make_block() for layer in with_block})
        self.favour_together(time_peak)
        self.fusion_tokens = nn.Parameter(
            torch.empty(1, self.num_state_tokens, self.embed_dim).normal_(std=0.02)
        )
        self.fusion_norm = nn.LayerNorm(self.embed_dim, eps=NORM_EPS)
        self.frame_embed = (
            nn.Parameter(torch.zeros(1, self.frames, self.embed_dim)) if self.frames > 1 else None
        )
        self.context_to_audio = None
        if self.fusion_layers and self.audio.embed_dim != self.embed_dim and not self.variant.direct:
            self.context_to_audio = nn.Linear(self.embed_dim, self.audio.embed_dim)

    @property
    def inputs(self) -> InputSettings:
        """The input transforms.

        Raises:
            ValueError: they were not given and cannot be told from the transformers.
        """
        if self.given_inputs is None:
            raise ValueError(ask_for_inputs(self.image, self.audio))
        return self.given_inputs

    @property
    def num_state_tokens(self) -> int:
        """Tokens of the fusion branch: the fusion tokens, with "factorized" also the aggregation tokens."""
        return sum(self.settings[name] for name in self.variant.state)

    @property
    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """What one clip must be: "image" (3, height, width), of several frames (T, 3, height, width), and
        "audio" (1, mel, time).
        """
        several = (self.frames,) if self.frames > 1 else ()
        return dict(image=several + input_shape(self.image), audio=input_shape(self.audio))

    @property
    def dims(self) -> dict[str, int]:
        """Widths of the "image", "audio" and "fusion" tokens."""
        return dict(image=self.image.embed_dim, audio=self.audio.embed_dim, fusion=self.embed_dim)

    @property
    def num_prefix_tokens(self) -> tuple[int, int]:
        """Class and register tokens of image and audio."""
        return self.image.num_prefix_tokens, self.audio.num_prefix_tokens

    @property
    def variant(self) -> Variant:
        """The way to fuse."""
        return self.variants[self.settings["interactions"]]

    def make_block(self) -> nn.Module:
        """One fusion block, as the settings say."""
        kind, biases = self.settings["pair_bias"], dict(pair_bias=None, time_bias=None)
        if kind == "position":
            biases["pair_bias"] = self.image.patch_embed.num_patches, self.audio.patch_embed.num_patches
        elif kind == "time":  # a knot for each step of the audio tokens, in either direction
            biases["time_bias"] = self.inputs.audio_seconds, 2 * self.audio.patch_embed.grid_size[1] + 1
        dims = dict(image_dim=self.dims["image"], audio_dim=self.dims["audio"])
        return self.variant.make(self.embed_dim, self.settings | dims | biases)

    def forward(
        self,
        image: Tensor | None,
        audio: Tensor | None,
        *,
        image_keep: Tensor | None = None,
        audio_keep: Tensor | None = None,
        image_mask: Tensor | None = None,
        audio_mask: Tensor | None = None,
        image_present: Tensor | None = None,
        audio_present: Tensor | None = None,
        return_layers: bool = False,
    ) -> EncoderOutput:
        """Encode images (B, 3, height, width) with spectrograms (B, 1, mel, time).

        Of several frames: images (B, T, 3, height, width), image_keep (B, T, n), image_mask (B, T, N), and
        the output's image (B, T, prefix + n, D).

        Args:
            image, audio: either may be None (a missing modality, at inference); its output is then None.
            image_keep, audio_keep: (B, n) long, indices of the patch tokens that are kept (one named twice
                counts twice); prefix tokens always are.
            image_mask, audio_mask: (B, N) bool over all patch tokens, True = attend: tokens nobody attends
                to.
            image_present, audio_present: (B,) bool, the clips that have it; in the others it is masked
                everywhere, and what stands in its place is not looked at.
            return_layers: also return the tokens after every layer.

        Raises:
            ValueError: naming the argument that is wrong.
        """
        image_selection = Selection(image_keep, image_mask, image_present)
        audio_selection = Selection(audio_keep, audio_mask, audio_present)
        image, audio, fusion = self.embed(image, audio, image_selection, audio_selection)
        layers = []
        for layer in range(self.depth):
            image, audio, fusion = self.run_layer(layer, image, audio, fusion)
            if return_layers:
                layers.append(self.tokens_of(image, audio, fusion))
        last = self.tokens_of(image, audio, fusion)
        return EncoderOutput(
            None if last.image is None else self.image.norm(last.image),
            None if last.audio is None else self.audio.norm(last.audio),
            self.fusion_norm(last.fusion),
            layers if return_layers else None,
        )

    def predicted(self, image: Tensor | None, audio: Tensor | None) -> dict[str, Tensor]:
        """{"image", "audio", "fusion"} -> the mean (D,) of these tokens of a batch of one, on the CPU,
        without what the clip lacks.
        """
        return {name: mean[0].float().cpu() for name, mean in pool(self(image, audio)).items()}

    def _slow_forward(self, *_, **__):  # runs in the place of `forward` while PyTorch traces
        raise ValueError(
            "torch.jit.trace and torch.onnx.export(dynamo=False) would keep the batch size they see:"
            " avfuse.export(model, 'model.onnx' or 'model.pt2') does not"
        )

    def tokens_of(self, image: Branch | None, audio: Branch | None, fusion: Tensor) -> EncoderOutput:
        """What stands in the branches after a layer."""
        tokens = (None if branch is None else branch.output for branch in (image, audio))
        return EncoderOutput(*tokens, self.visible_fusion(fusion))

    def embed(self, image, audio, image_selection: "Selection", audio_selection: "Selection"):
        """Both branches (None where a modality is) and the fusion tokens (B, F, D) before the first layer."""
        if image is None and audio is None:
            raise ValueError("image and audio cannot both be None")
        check_branch("image", self.image, image, image_selection, self.frames > 1)
        check_branch("audio", self.audio, audio, audio_selection)
        if image is not None and audio is not None:
            if image.shape[0] != audio.shape[0]:
                raise ValueError(
                    f"audio must have the batch size of image, {image.shape[0]}, got {audio.shape[0]}"
                )
            if image.device != audio.device:
                raise ValueError(f"audio must be on the device of image, {image.device}, got {audio.device}")
        fusion = self.fusion_tokens.repeat((audio if image is None else image).shape[0], 1, 1)
        if image is not None:
            layers = self.block_layers["image"]
            image = Branch.embed(self.image, image, image_selection, layers, self.frame_embed)
        if audio is not None:
            audio = Branch.embed(self.audio, audio, audio_selection, self.block_layers["audio"])
        if self.settings["pair_bias"] == "time":
            image, audio = self.timed(image, audio)
        elif self.settings["pair_bias"]:
            self.check_sizes()
        return image, audio, fusion

    def check_sizes(self) -> None:
        """Raises ValueError where a transformer was given another input size, which its encoder has not."""
        check_inputs(self.given_inputs, self.image, self.audio, self.frames)
        places = tuple(vit.patch_embed.num_patches for vit in (self.image, self.audio))
        tables = (p for name, p in self.fusion_blocks.named_parameters() if name.endswith("pair_bias"))
        table = next(tables, None)  # all are alike
        if table is not None and table.shape[1:] != places:
            raise ValueError(
                f"pair_bias is of {tuple(table.shape[1:])} positions, while image and audio have {places}"
            )

    def timed(self, image: Branch | None, audio: Branch | None):
        """Both branches with their times, in seconds from the start of the window; not in half precision."""
        # A transformer that was given another size reads seconds that nobody has told.
        check_inputs(self.inputs, self.image, self.audio, self.frames)
        options = dict(
            device=self.fusion_tokens.device,
            dtype=torch.promote_types(self.fusion_tokens.dtype, torch.float32),
        )
        if image is not None:
            image = image._replace(times=middles(image.frames or 1, self.inputs.audio_seconds, **options))
        if audio is not None:
            times = audio_times(self.inputs, self.audio.patch_embed, **options)
            audio = audio._replace(times=times if audio.positions is None else times[audio.positions])
        return image, audio

    def run_layer(self, layer, image, audio, fusion):
        """One layer: all branches read the layer before (paper Eq. 1-3)."""
        if layer not in self.fusion_layers:
            return self.run_unimodal(layer, image), self.run_unimodal(layer, audio), fusion
        if self.variant.direct:
            return *self.run_direct(layer, image, audio), fusion
        image_context, audio_context = self.contexts(fusion)
        return (
            self.run_unimodal(layer, image, image_context),
            self.run_unimodal(layer, audio, audio_context),
            self.run_fusion(layer, fusion, image, audio),
        )

    def contexts(self, fusion: Tensor) -> tuple[Tensor, Tensor]:
        """The fusion tokens as the image and as the audio transformer read them."""
        context = self.visible_fusion(fusion)
        return context, context if self.context_to_audio is None else self.context_to_audio(context)

    def run_unimodal(self, layer, branch, context=None):
        """The branch after its own block of this layer, which reads `context`, the fusion tokens, too."""
        if branch is None or layer not in branch.layers:
            return branch
        context = None if context is None else per_frame(context, branch.frames)
        key_mask = branch.key_mask(0 if context is None else context.shape[1])
        block = self.checkpointed(branch.vit.blocks[branch.layers.index(layer)], branch.vit)
        return branch._replace(tokens=block(branch.tokens, context=context, attn_mask=key_mask))

    def run_fusion(self, layer, fusion, image, audio):
        """The fusion tokens after the fusion block of this layer."""
        image, audio = self.streams(image, audio)
        return self.checkpointed(self.block(layer))(
            fusion,
            image.tokens,
            audio.tokens,
            image_mask=image.mask,
            audio_mask=audio.mask,
            image_positions=image.positions,
            audio_positions=audio.positions,
            image_times=image.times,
            audio_times=audio.times,
        )

    def run_direct(self, layer, image, audio):
        """Image and audio tokens read one another; one modality without the other runs alone."""
        if image is not None and audio is not None:
            if self.block(layer) is None:
                return self.run_joint(layer, image, audio)
            image, audio = self.run_cross(layer, image, audio)
        return self.run_unimodal(layer, image), self.run_unimodal(layer, audio)

    def run_joint(self, layer, image, audio):
        """Both branches after a layer in which each attends to the tokens of both."""
        both = image, audio
        blocks = tuple(branch.vit.blocks[branch.layers.index(layer)] for branch in both)
        image_tokens, audio_tokens = self.checkpointed(run_jointly, image.vit, audio.vit)(
            blocks, (image.tokens, audio.tokens), joint_masks(*both), self.num_prefix_tokens, image.frames
        )
        return image._replace(tokens=image_tokens), audio._replace(tokens=audio_tokens)

    def run_cross(self, layer, image, audio):
        """Both branches after each has attended to the patch tokens of the other."""
        image_tokens, audio_tokens = self.checkpointed(self.block(layer))(
            per_clip(image.tokens, image.frames), audio.tokens, image.stream, audio.stream
        )
        image_tokens = image_tokens.reshape(image.tokens.shape)
        return image._replace(tokens=image_tokens), audio._replace(tokens=audio_tokens)

    def streams(self, image: "Branch | None", audio: "Branch | None") -> tuple[Stream, Stream]:
        """What fusion reads of both."""
        if image is None:
            return absent(audio.tokens, self.dims["image"]), audio.stream
        return image.stream, absent(image.output, self.dims["audio"]) if audio is None else audio.stream

    def block(self, layer: int) -> nn.Module | None:
        """The fusion block of a layer that has one."""
        return self.fusion_blocks[str(layer)] if str(layer) in self.fusion_blocks else None

    def visible_fusion(self, state: Tensor) -> Tensor:
        """The F fusion tokens of the fusion branch's state, which the other branches and the user see."""
        return state[:, : self.num_fusion_tokens]

    @property
    def shows_attention(self) -> bool:
        """Whether `fusion_attention` has something to show: not where no fusion tokens attend ("joint",
        "cross", "none"), and not of released blocks or a fused encoder.
        """
        return any(hasattr(block, "weights") for block in self.fusion_blocks.values())

    @torch.no_grad()
    def fusion_attention(
        self,
        image: Tensor | None,
        audio: Tensor | None,
        layer: int | None = None,
        *,
        image_mask: Tensor | None = None,
        audio_mask: Tensor | None = None,
        image_present: Tensor | None = None,
        audio_present: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Where the fusion tokens of a fused layer (default: the last) look and listen.

        Returns:
            Image weights (B, H, F, I) and audio weights (B, H, F, A) over the patch tokens, those of
            several frames one after the other; those of a masked token are 0, and so is the single weight of
            a modality that is None.

        Raises:
            ValueError: no such fused layer, blocks without weights to show (see `shows_attention`), or
                an input that `forward` refuses.
        """
        layer = self.fusion_layers[-1] if layer is None and self.fusion_layers else layer
        if type(layer) is not int or layer not in self.fusion_layers:
            there = list(self.fusion_layers)
            raise ValueError(f"layer must be one of the fused layers {there}, got {layer!r}")
        block = self.block(layer)
        if not self.shows_attention:
            kind = f"interactions={self.settings['interactions']!r}"
            raise ValueError(f"{type(self).__name__} of {kind}: its fusion tokens have no weights to show")
        image_selection = Selection(None, image_mask, image_present)
        audio_selection = Selection(None, audio_mask, audio_present)
        image, audio, fusion = self.embed(image, audio, image_selection, audio_selection)
        for before in range(layer):
            image, audio, fusion = self.run_layer(before, image, audio, fusion)
        return block.weights(fusion, *self.streams(image, audio))

    def fused(self, *, cuda_graphs: bool = False) -> "FusedEncoder":
        """A copy for inference: the same outputs from fewer bytes and launches, see `avfuse.folding`.

        It is called like the encoder, has the weights of now, gives no gradients for them, stays in
        evaluation mode and cannot be saved; the encoder itself stays as it is.

        Args:
            cuda_graphs: on CUDA, record all launches of a call once for each shape of inputs (of the last 8
                the recordings are kept, with the memory of a call each) and play them back as one: the
                host's time goes, which at small batches is most of all. Hooks do not run when it is played.

        Raises:
            ValueError: naming the part whose weights cannot be folded into their neighbours'.
        """
        check_flag("cuda_graphs", cuda_graphs)
        return FusedEncoder.of(self, cuda_graphs)

    def favour_together(self, height: float) -> None:
        """Adds a triangle as high to every table of "time", see `AVEncoder`.

        Raises:
            ValueError: a height that is no number, or not 0 where there are no such tables.
        """
        if not is_number(height):
            raise ValueError(f"time_peak must be a number of logits, got {height!r}")
        if height and self.settings["pair_bias"] != "time":
            raise ValueError(f"time_peak={height} needs pair_bias='time'")
        for block in self.fusion_blocks.values() if height else ():
            block.time_bias.favour_together(height, self.inputs.audio_seconds / self.frames)

    def with_frames(
        self, frames: int, *, pair_bias: bool | str | None = None, time_peak: float = 0.0
    ) -> "AVEncoder":
        """A copy for clips of so many frames, with the same weights.

        What this encoder has no weights for, positions of frames and a pair bias, is zero, but for a
        `time_peak`; the positions it has are interpolated, and left out of a copy for one frame.

        Args:
            frames: T.
            pair_bias: see `AVEncoder`; default that of this encoder, which only gets one if it has none.
            time_peak: see `AVEncoder`; of tables that this encoder does not have.

        Raises:
            ValueError: naming the argument that is wrong.
        """
        own = self.settings["pair_bias"]
        wanted = own if pair_bias is None else "position" if pair_bias is True else pair_bias
        if own and wanted != own:
            raise ValueError(f"pair_bias must be that of this encoder, {own!r}, got {pair_bias!r}")
        if own and time_peak:
            raise ValueError(f"time_peak={time_peak} is for new tables, and this encoder has its own")
        check_count("frames", frames)
        config = self.to_config() | dict(frames=frames, pair_bias=wanted)
        if config["inputs"] is not None:
            config["inputs"] = config["inputs"] | dict(image_frames=frames)
        refuse_hooks(self, "a copy")
        copied, weights = type(self).from_config(config).to(self.fusion_tokens), self.state_dict()
        check_rebuilt(copied, self)
        if self.frame_embed is not None:
            embed = weights.pop("frame_embed")
            weights |= {} if frames == 1 else dict(frame_embed=resampled_frames(embed, frames))
        copied.load_state_dict(copied.state_dict() | weights)
        copied.favour_together(time_peak)
        for part, before in (copied, self), (copied.image, self.image), (copied.audio, self.audio):
            part.grad_checkpointing = before.grad_checkpointing
        parts, own = dict(self.named_modules()), dict(self.named_parameters())
        for name, part in copied.named_modules():
            part.training = parts.get(name, self).training
        for name, parameter in copied.named_parameters():
            parameter.requires_grad_(name not in own or own[name].requires_grad)
        return copied

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block in the backward instead of storing its activations."""
        self.grad_checkpointing = enable

    def checkpointed(self, function, *vits: VisionTransformer):
        """The function, which keeps no activations where `grad_checkpointing`, of the encoder or of these
        transformers (timm's), says so in training.
        """
        asked = any(part.grad_checkpointing for part in (self, *vits))
        if not (asked and self.training and torch.is_grad_enabled()):
            return function
        return lambda *args, **kwargs: checkpoint(function, *args, use_reentrant=False, **kwargs)

    @property
    def origins(self) -> dict[str, dict[str, str]]:
        """By branch, the pretrained weights it began with: {"weights", "family", "licence"}."""
        branches = ("image", self.image), ("audio", self.audio)
        return {name: vit.origin for name, vit in branches if getattr(vit, "origin", None)}

    def to_config(self) -> dict:
        """What config.json holds."""
        self.check_sizes()
        return dict(
            image=describe_vit(self.image),
            audio=describe_vit(self.audio),
            inputs=None if self.given_inputs is None else asdict(self.given_inputs),
            origins=self.origins,
            **self.settings,
        )

    @classmethod
    def from_config(cls, config: dict) -> "AVEncoder":
        """An encoder with fresh weights, as config.json describes it."""
        config, cls = dict(config), cls.kind_of(config)
        config.pop(cls.mark, None)
        image, audio = build_vit(config.pop("image")), build_vit(config.pop("audio"))
        origins, inputs = config.pop("origins", {}), config.pop("inputs")
        config.setdefault("norm_eps", NORM_EPS)  # until 2026-11 all were of that
        image.origin, audio.origin = origins.get("image"), origins.get("audio")
        return cls(image, audio, inputs=None if inputs is None else InputSettings(**inputs), **config)


def layers_of(fusion_layers, depth: int) -> tuple[int, ...]:
    """ "all", "none" or 0-based layers -> sorted layers"""
    if fusion_layers == "all":
        return tuple(range(depth))
    if fusion_layers == "none":
        return ()
    if type(fusion_layers) is int:
        fusion_layers = (fusion_layers,)
    is_list = isinstance(fusion_layers, Collection) and not isinstance(fusion_layers, str)
    if not is_list or not all(type(layer) is int and 0 <= layer < depth for layer in fusion_layers):
        raise ValueError(
            f"fusion_layers must be 'all', 'none' or integers in 0..{depth - 1}, got {fusion_layers!r}"
        )
    return tuple(sorted(set(fusion_layers)))


class Sum(NamedTuple):
    """Fusion tokens (B, F, D), and what is yet to be added to them."""

    tokens: Tensor
    update: Tensor | None = None


class FusedEncoder(AVEncoder):
    """What `AVEncoder.fused` returns. Branches carry `tokens` and the `update` yet to be added to them: the
    next norm, which reads the tokens anyway, does that in the same pass.
    """

    shows_attention = False
    graphs: CudaGraphs | None  # of `forward`
    recording: bool = False  # whether a CUDA graph records this call
    side: torch.cuda.Stream | None = None  # of the recording: fusion blocks run on it, beside the others

    @classmethod
    def of(cls, encoder: AVEncoder, cuda_graphs: bool) -> "FusedEncoder":
        if type(encoder) is not AVEncoder:
            raise ValueError(f"only an AVEncoder can be fused, got a {type(encoder).__name__}")
        if len(encoder.image.blocks) != len(encoder.audio.blocks):
            raise ValueError("only transformers of equal depth can be fused")
        check_foldable(encoder)
        fused = copy.deepcopy(encoder).eval().requires_grad_(False)
        fused.__class__ = cls
        blocks = zip(fused.image.blocks, fused.audio.blocks, strict=True)  # of which both may be one list
        fused.image.blocks, fused.audio.blocks = nn.Sequential(), nn.Sequential()
        for layer, (image, audio) in enumerate(blocks):
            block = fused.block(layer)
            dense = block if shares_norms(block, image, audio) else None
            fused.image.blocks.append(FoldedBlock(image, dense, "image"))
            fused.audio.blocks.append(FoldedBlock(audio, dense, "audio"))
            if dense is not None:
                fused.fusion_blocks[str(layer)] = FoldedDense(dense)
        fused.graphs = CudaGraphs(fused.recorded_forward) if cuda_graphs else None
        return fused

    def forward(self, image, audio, **options) -> EncoderOutput:
        """As `AVEncoder.forward`."""
        on_cuda = any(isinstance(x, Tensor) and x.is_cuda for x in (image, audio))
        are_known = all(isinstance(x, Tensor | bool | None) for x in (image, audio, *options.values()))
        playable = self.graphs is not None and on_cuda and are_known  # others are refused by name
        if not playable or torch.cuda.is_current_stream_capturing():
            return super().forward(image, audio, **options)
        return self.graphs(image=image, audio=audio, **options)

    def recorded_forward(self, **inputs) -> EncoderOutput:
        self.recording = torch.cuda.is_current_stream_capturing()
        try:
            return super().forward(**inputs)
        except BaseException:
            with suppress(RuntimeError):
                self.join()  # else the recording ends with an error of its own
            raise
        finally:
            self.recording, self.side = False, None

    def _apply(self, *args, **options):
        if self.graphs is not None:  # their weights are moving
            self.graphs.recordings.clear()
        return super()._apply(*args, **options)

    def embed(self, *inputs):
        image, audio, fusion = super().embed(*inputs)
        return image, audio, Sum(fusion)

    @contextmanager
    def beside(self):
        """Where a graph is recorded: what follows need not wait for what happens here, until `join`."""
        if not self.recording:
            yield
            return
        self.side = self.side or torch.cuda.Stream()
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            yield

    def join(self) -> None:
        """Waits for what happened beside. All that it read is held until here, so no memory is reused."""
        if self.side is not None:
            torch.cuda.current_stream().wait_stream(self.side)

    def run_layer(self, layer, image, audio, fusion):
        self.join()
        if self.variant.direct and layer in self.fusion_layers:
            return *self.run_direct(layer, image, audio), fusion
        block = self.block(layer)
        contexts = None, None
        if isinstance(block, FoldedDense):
            tokens, norm = residual_norm(*fusion, eps=block.eps)
            contexts = self.contexts(tokens)
        elif block is not None:
            tokens = total(fusion)
            contexts = self.contexts(tokens)
        image, image_projected = self.project(layer, image, contexts[0])
        audio, audio_projected = self.project(layer, audio, contexts[1])
        if isinstance(block, FoldedDense):
            streams = self.streams(image, audio)
            paired = block.paired((image_projected, audio_projected), streams)
            with self.beside():
                fusion = Sum(*block(tokens, norm, paired, *streams))
        elif block is not None:
            with self.beside():
                fusion = Sum(self.run_fusion(layer, tokens, image, audio))
        return self.update(layer, image, image_projected), self.update(layer, audio, audio_projected), fusion

    def run_joint(self, layer, image, audio):
        image, image_projected = self.project(layer, image, None)
        audio, audio_projected = self.project(layer, audio, None)
        heads = joint_heads(
            self.heads(layer, image, image_projected),
            self.heads(layer, audio, audio_projected),
            self.num_prefix_tokens,
            image.frames,
        )
        masks = joint_masks(image, audio)
        return self.attend(layer, image, heads[0], masks[0]), self.attend(layer, audio, heads[1], masks[1])

    def run_cross(self, layer, *branches):
        return super().run_cross(layer, *(x._replace(tokens=total(x), update=None) for x in branches))

    def run_unimodal(self, layer, branch, context=None):
        return self.update(layer, *self.project(layer, branch, context))

    def project(self, layer, branch, context):
        if branch is None:
            return None, None
        block = branch.vit.blocks[layer]
        context = None if context is None else per_frame(context, branch.frames)
        tokens, projected = block.project(branch.tokens, branch.update, context)
        return branch._replace(tokens=tokens, update=None), projected

    def heads(self, layer, branch, projected):
        return branch.vit.blocks[layer].heads(projected, branch.tokens.shape[1])

    def update(self, layer, branch, projected):
        if branch is None:
            return None
        key_mask = branch.key_mask(projected.shape[1] - branch.tokens.shape[1])
        return self.attend(layer, branch, self.heads(layer, branch, projected), key_mask)

    def attend(self, layer, branch, heads, key_mask):
        tokens, update = branch.vit.blocks[layer].update(branch.tokens, heads, key_mask)
        return branch._replace(tokens=tokens, update=update)

    def tokens_of(self, image, audio, fusion):
        self.join()
        image, audio = (x if x is None else x._replace(tokens=total(x)) for x in (image, audio))
        return super().tokens_of(image, audio, total(fusion))

    def train(self, mode: bool = True):
        return super().train(False)  # it stays as it is, in whatever is trained around it

    def to_config(self):
        raise ValueError("a fused encoder cannot be saved: save the encoder that it was made from")

    def fusion_attention(self, *inputs, **options):
        raise ValueError("a fused encoder has no attention maps: the encoder that it was made from has")


def total(x: Branch | Sum) -> Tensor:
    return x.tokens if x.update is None else x.tokens + x.update
