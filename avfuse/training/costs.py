"""What a run will cost: arithmetic, counted on tensors without numbers, and time on named cards."""

from copy import deepcopy

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..mae import AVMAE

CARDS = {  # dense peak of matrix products in TFLOP/s, by their makers: in 16 bits, in float32
    "H100 or H200": (989, 67),
    "A100": (312, 19.5),
    "RTX 4090": (165, 82.6),
    "L4": (121, 30.3),
}
# What launching the kernels of a block takes a host in a step, whatever its width and the clips: 3.3 to 3.9
# ms in models of four sizes beside an H200 (torch 2.11, 2026-11-26; two days later 2 to 5.7). What a block
# takes the GPU whatever the clips, and the share of the peak at which products run: in 16 bits as they fit
# ViT-B's steps as CUDA graphs at 64 and 128 clips, 34.1 and 59.1 ms without fusion, 40.7 and 67.2 dense (an
# H200, 2026-11-28), in float32 as measured there of launched steps.
LAUNCHES, PLAYED = 3.8e-3, 0.27e-3
SHARE = {"bf16": 0.23, "fp16": 0.23, "no": 0.56}


def step_flops(mae: AVMAE) -> float:
    """Floating-point operations of one clip, forward and backward. A multiply-add is 2; attention counts as
    matrix products, whatever kernel runs it.
    """
    mae = deepcopy(mae).to("meta").train()
    inputs = mae.encoder.input_shapes.values()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        mae(*(torch.empty(2, *shape, device="meta") for shape in inputs)).loss.backward()
    return counter.get_total_flops() / 2


def step_seconds(
    mae: AVMAE, flops: float, card: str, precision: str, clips: int, micro_batches: int, launched: bool
) -> float:
    """Time of a step of one process on a card: that of its launches, or of the GPU if it takes longer.

    Args:
        flops: of a clip, see `step_flops`.
        clips: of the process, in so many micro-batches.
        launched: and not played back as CUDA graphs.
    """
    half, single = CARDS[card]
    peak = 1e12 * (single if precision == "no" else half)
    on_gpu = PLAYED * count_blocks(mae) * micro_batches + clips * flops / (SHARE[precision] * peak)
    return max(launch_seconds(mae, micro_batches, launched), on_gpu)


def launch_seconds(mae: AVMAE, micro_batches: int, launched: bool) -> float:
    """The least that a step takes beside any card: that of its launches."""
    return LAUNCHES * count_blocks(mae) * micro_batches * launched


def count_blocks(mae: AVMAE) -> int:
    """Blocks of both transformers, of the fusion branch and of both decoders."""
    encoder = mae.encoder
    parts = encoder.image, encoder.audio, mae.image_decoder, mae.audio_decoder
    return sum(len(part.blocks) for part in parts) + len(encoder.fusion_blocks)


def count_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
