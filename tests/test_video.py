"""Encoder and autoencoder on clips of several frames, against every frame and clip on its own, by hand."""

import copy
import math

import numpy as np
import pytest
import torch
from by_hand import cross_attended, heads_of, run_block
from models import (
    AUDIO,
    AUDIO_TOKENS,
    IMAGE,
    IMAGE_TOKENS,
    count_flops,
    gradients,
    make_encoder,
    make_vit,
    randomized,
    relative_error,
)
from test_released import ENCODERS, golden

from avfuse import (
    AVMAE,
    AVEncoder,
    DenseFusion,
    InputSettings,
    create_encoder,
    from_deepavfusion,
    pair_attention,
)
from avfuse.fusion import VARIANTS, Stream, TimeBias
from avfuse.mae import MaskSampler
from avfuse.training.plan import activation_bytes

EXACT = 1e-11
FRAMES, SECONDS = 3, 2.0
INPUTS = InputSettings(
    image_size=24,
    mel_bins=16,
    sample_rate=4000,
    hop=200,
    window=400,
    max_frequency=2000,
    audio_seconds=SECONDS,
)  # 40 steps of 1/20 s: 5 columns of audio tokens, 0.4 s each
WAYS = {name: dict(interactions=name) for name in VARIANTS} | {
    "dense, position": dict(interactions="dense", pair_bias="position"),
    "dense, time": dict(interactions="dense", pair_bias="time"),
    "bilinear, time": dict(interactions="bilinear", pair_bias="time"),
}
every_way = pytest.mark.parametrize("way", WAYS)
VITS = {"plain": dict(), "class and register tokens": dict(class_token=True, reg_tokens=2)}


def make_video_encoder(way="dense", frames=FRAMES, vit="plain", **options):
    inputs = InputSettings(**vars(INPUTS) | dict(image_frames=frames))
    return make_encoder(vit=VITS[vit], frames=frames, inputs=inputs, **WAYS[way] | options)


def make_video(batch=3, frames=FRAMES):
    return torch.randn(batch, frames, *IMAGE).double(), torch.randn(batch, *AUDIO).double()


def selections(batch=3, frames=FRAMES):
    """Options of a call, by what they do."""
    image_keep = torch.rand(batch, frames, IMAGE_TOKENS).argsort(-1)[..., :5]
    audio_keep = torch.rand(batch, AUDIO_TOKENS).argsort(1)[:, :4]
    masks = torch.rand(batch, frames, IMAGE_TOKENS) > 0.4, torch.rand(batch, AUDIO_TOKENS) > 0.4
    masks[0][1, 0] = False  # a frame of which nothing is seen
    masks[0][2], masks[1][0] = False, False
    present = torch.arange(batch)
    return {
        "all": {},
        "kept": dict(image_keep=image_keep, audio_keep=audio_keep),
        "masked": dict(image_mask=masks[0], audio_mask=masks[1]),
        "kept and masked": dict(image_keep=image_keep, image_mask=masks[0]),
        "absent": dict(image_present=present != 1, audio_present=present != 0),
    }


# --- by hand ------------------------------------------------------------------------------------------------


def frame_positions(encoder, frames):
    """Learned positions, read off at the times of the frames."""
    table = encoder.frame_embed[0].detach().numpy()
    learned, wanted = ((np.arange(n) + 0.5) / n for n in (len(table), frames))
    return torch.from_numpy(np.stack([np.interp(wanted, learned, column) for column in table.T], 1))


def embedded(vit, pixels, keep, mask):
    """Tokens of one frame or sound, which patches they are, and which of the tokens are seen."""
    prefix, (tokens,) = vit.num_prefix_tokens, vit._pos_embed(vit.patch_embed(pixels[None]))
    patches = torch.arange(len(tokens) - prefix) if keep is None else keep
    mask = torch.ones(len(patches)).bool() if mask is None else mask[patches]
    tokens = torch.cat([tokens[:prefix], tokens[prefix + patches]])
    return tokens, patches, torch.cat([torch.ones(prefix).bool(), mask])


def run_clip(encoder, video, sound, keeps, masks):
    """Frames, sound and fusion tokens after the last layer, before the norm."""
    kind, F = encoder.settings["interactions"], encoder.num_fusion_tokens
    prefix = encoder.image.num_prefix_tokens, encoder.audio.num_prefix_tokens
    positions = frame_positions(encoder, len(video))
    frames = [
        embedded(
            encoder.image,
            x,
            None if keeps[0] is None else keeps[0][t],
            None if masks[0] is None else masks[0][t],
        )
        for t, x in enumerate(video)
    ]
    seen = [frame[2] for frame in frames]
    images = [frame[0] + positions[t] for t, frame in enumerate(frames)]
    audio, audio_patches, heard = embedded(encoder.audio, sound, keeps[1], masks[1])
    state = encoder.fusion_tokens[0]
    fusion = state[None]
    for layer in range(encoder.depth):
        image_block, audio_block = encoder.image.blocks[layer], encoder.audio.blocks[layer]
        image_patches = [x[prefix[0] :][s[prefix[0] :]] for x, s in zip(images, seen, strict=True)]
        sound_patches = audio[prefix[1] :][heard[prefix[1] :]]
        for_frames, for_sound, before = [[]] * len(images), [], (images, audio)
        if kind == "joint":
            for_frames = [[heads_of(audio_block.attn, audio_block.norm1(sound_patches))]] * len(images)
            for_sound = [heads_of(image_block.attn, image_block.norm1(torch.cat(image_patches)))]
        elif kind == "cross":
            cross = encoder.fusion_blocks[str(layer)]
            images = [cross_attended(cross.image, x, sound_patches) for x in images]
            audio = cross_attended(cross.audio, audio, torch.cat(image_patches))
        elif kind != "none":
            context = fusion[0, :F]
            for_frames = [[heads_of(image_block.attn, image_block.norm1(context))]] * len(images)
            for_sound = [heads_of(audio_block.attn, audio_block.norm1(context))]
            fusion = run_fusion(encoder, layer, fusion, before, frames, (audio_patches, heard))
        images = [
            run_block(image_block, x, s, others)
            for x, s, others in zip(images, seen, for_frames, strict=True)
        ]
        audio = run_block(audio_block, audio, heard, for_sound)
    return torch.stack(images), audio, fusion[0, :F]


def run_fusion(encoder, layer, fusion, tokens, frames, sound):
    """The fusion block on all patch tokens; a bias stands in full, an entry for each pair."""
    block = encoder.fusion_blocks[str(layer)]
    prefix = encoder.image.num_prefix_tokens, encoder.audio.num_prefix_tokens
    image = torch.cat([x[prefix[0] :] for x in tokens[0]])
    seen = torch.cat([frame[2][prefix[0] :] for frame in frames])
    patches, (audio_patches, heard) = torch.cat([frame[1] for frame in frames]), sound
    options = {}
    if encoder.settings["pair_bias"]:
        block = copy.deepcopy(block)
        if encoder.settings["pair_bias"] == "position":
            table = block.pair_bias[:, patches][:, :, audio_patches]
        else:
            image_times = torch.repeat_interleave(
                (torch.arange(len(frames)).double() + 0.5) * SECONDS / len(frames),
                len(patches) // len(frames),
            )
            audio_times = (audio_patches.double() % 5 + 0.5) * 0.4
            apart = (image_times[:, None] - audio_times[None]).numpy()
            knots = np.linspace(-SECONDS, SECONDS, 11)
            rows = [np.interp(apart, knots, row) for row in block.time_bias.table.detach().numpy()]
            table = torch.from_numpy(np.stack(rows))
        block.time_bias, block.pair_bias = None, torch.nn.Parameter(table.detach())
    masks = dict(image_mask=seen[None], audio_mask=heard[prefix[1] :][None])
    return block(fusion, image[None], tokens[1][None, prefix[1] :], **masks, **options)


def run_by_hand(encoder, video, sound, **options):
    clips = []
    for index in range(len(video)):
        pick = {name: None if x is None else x[index] for name, x in options.items()}
        keeps, masks = (
            [pick.get("image_keep"), pick.get("audio_keep")],
            [pick.get("image_mask"), pick.get("audio_mask")],
        )
        if not pick.get("image_present", True):
            masks[0] = torch.zeros(len(video[index]), IMAGE_TOKENS).bool()
        if not pick.get("audio_present", True):
            masks[1] = torch.zeros(AUDIO_TOKENS).bool()
        there = [pick.get(f"{name}_present", torch.tensor(True)) for name in ("image", "audio")]
        clips.append(run_clip(encoder, video[index] * there[0], sound[index] * there[1], keeps, masks))
    image, audio, fusion = (torch.stack(parts) for parts in zip(*clips, strict=True))
    return encoder.image.norm(image), encoder.audio.norm(audio), encoder.fusion_norm(fusion)


# --- the encoder --------------------------------------------------------------------------------------------


@every_way
@pytest.mark.parametrize("vit", VITS)
@pytest.mark.parametrize("what", selections())
def test_every_frame_on_its_own_and_fusion_over_all(way, vit, what):
    encoder, inputs, options = make_video_encoder(way, vit=vit), make_video(), selections()[what]
    output, truth = encoder(*inputs, **options), run_by_hand(encoder, *inputs, **options)
    for name, part, true_part in zip(("image", "audio", "fusion"), output, truth, strict=False):
        assert relative_error(part, true_part) < EXACT, name


@every_way
@pytest.mark.parametrize("frames", [1, 2, 5])
def test_more_and_fewer_frames_than_it_was_made_for(way, frames):
    encoder, inputs = make_video_encoder(way), make_video(frames=frames)
    output, truth = encoder(*inputs), run_by_hand(encoder, *inputs)
    assert output.image.shape == (3, frames, IMAGE_TOKENS, 32)
    for part, true_part in zip(output, truth, strict=False):
        assert relative_error(part, true_part) < EXACT


@pytest.mark.parametrize("way", [*VARIANTS, "dense, position", "dense, time"])
@pytest.mark.parametrize("vit", VITS)
def test_weights_of_one_frame_give_what_they_gave(way, vit):
    settings = dict(WAYS[way]) if way == "dense, position" else dict(interactions=WAYS[way]["interactions"])
    single = make_encoder(vit=VITS[vit], inputs=INPUTS, **settings)
    several = single.with_frames(8, pair_bias=WAYS[way].get("pair_bias"))
    assert several.frames == several.inputs.image_frames == 8 and not several.frame_embed.any()
    video, sound = make_video(frames=1)
    options = {name: x for name, x in selections(frames=1)["kept"].items()}
    output = several(video, sound, **options)
    truth = single(
        video[:, 0], sound, image_keep=options["image_keep"][:, 0], audio_keep=options["audio_keep"]
    )
    assert relative_error(output.image[:, 0], truth.image) < EXACT
    assert relative_error(output.audio, truth.audio) < EXACT
    assert relative_error(output.fusion, truth.fusion) < EXACT
    if way not in ("token", "joint"):  # in which copies of a frame weigh more than one against the sound
        output = several(video.expand(-1, 8, -1, -1, -1), sound)
        truth = single(video[:, 0], sound)
        for frame in output.image.unbind(1):
            assert relative_error(frame, truth.image) < EXACT
        assert relative_error(output.fusion, truth.fusion) < EXACT


@pytest.mark.parametrize("name", ENCODERS)
def test_released_weights_of_one_frame_give_what_they_gave(name):
    config, weights, *_ = golden(name)
    single = from_deepavfusion(weights, config=config).double()
    several = single.with_frames(3)
    assert type(several) is type(single) and several.frames == 3
    image, audio = (torch.randn(2, *shape).double() for shape in single.input_shapes.values())
    truth, output = single(image, audio), several(image[:, None].expand(-1, 3, -1, -1, -1), audio)
    one = several(image[:, None], audio)
    assert relative_error(one.image[:, 0], truth.image) < EXACT
    assert relative_error(one.fusion, truth.fusion) < EXACT
    if name != "encoder_token":  # in which copies of a frame weigh more than one against the sound
        assert relative_error(output.fusion, truth.fusion) < EXACT


@every_way
def test_every_weight_gets_a_gradient(way):
    encoder, inputs = make_video_encoder(way), make_video()
    output = encoder(*inputs)
    grads = gradients(encoder, sum((x * torch.randn_like(x)).sum() for x in output[:3]))
    unused = set() if encoder.fusion_blocks and not encoder.variant.direct else {"fusion_tokens"}
    for name, grad in grads.items():
        assert grad.any() or name in unused, name


@every_way
@pytest.mark.parametrize("missing", ["image", "audio"])
def test_a_missing_modality_is_one_that_is_masked(way, missing):
    encoder, (video, sound) = make_video_encoder(way), make_video()
    inputs = dict(image=video, audio=sound)
    masked = encoder(**inputs, **{f"{missing}_present": torch.zeros(3).bool()})
    absent = encoder(**inputs | {missing: None})
    other = "audio" if missing == "image" else "image"
    assert getattr(absent, missing) is None
    assert relative_error(getattr(absent, other), getattr(masked, other)) < EXACT
    assert relative_error(absent.fusion, masked.fusion) < EXACT


@every_way
@pytest.mark.parametrize("what", selections())
def test_a_fused_encoder_gives_the_same(way, what):
    encoder, inputs, options = (
        make_video_encoder(way, vit="class and register tokens"),
        make_video(),
        selections()[what],
    )
    with torch.inference_mode():
        output, truth = encoder.fused()(*inputs, **options), encoder(*inputs, **options)
    for part, true_part in zip(output, truth, strict=False):
        assert part is None or relative_error(part, true_part) < EXACT


@pytest.mark.parametrize("way", ["dense, time", "token", "joint"])
def test_layers_and_attention_are_told_by_frame(way):
    encoder, inputs = make_video_encoder(way, vit="class and register tokens"), make_video()
    layers = encoder(*inputs, return_layers=True).layers
    assert [x.image.shape for x in layers] == [(3, FRAMES, 3 + IMAGE_TOKENS, 32)] * 3
    if encoder.shows_attention:
        image, audio = encoder.fusion_attention(*inputs)
        assert image.shape == (3, 2, 4, FRAMES * IMAGE_TOKENS) and audio.shape == (3, 2, 4, AUDIO_TOKENS)


def test_gradient_checkpointing_changes_nothing():
    encoder, inputs = make_video_encoder("dense, time").train(), make_video()
    options = selections()["kept"]
    before = gradients(encoder, encoder(*inputs, **options).fusion.square().sum())
    encoder.set_grad_checkpointing()
    after = gradients(encoder, encoder(*inputs, **options).fusion.square().sum())
    for name, grad in before.items():
        assert torch.equal(grad, after[name]), name


@pytest.mark.parametrize("way", ["dense, time", "dense, position", "factorized"])
def test_saved_and_loaded(way, tmp_path):
    encoder, inputs = make_video_encoder(way).float(), [x.float() for x in make_video()]
    encoder.save_pretrained(tmp_path)
    loaded = AVEncoder.from_pretrained(tmp_path).eval()
    assert loaded.frames == FRAMES and loaded.settings == encoder.settings
    assert torch.equal(loaded(*inputs).fusion, encoder(*inputs).fusion)


def test_other_numbers_of_frames_and_windows_of_the_same_weights():
    encoder = make_video_encoder("dense, time")
    longer = encoder.with_frames(6)
    assert longer.settings == encoder.settings | dict(frames=6)
    assert relative_error(longer.frame_embed[0], frame_positions(encoder, 6)) < EXACT
    single = longer.with_frames(1)
    assert single.frame_embed is None and single.settings["pair_bias"] == "time"


def test_optimizer_groups():
    encoder = make_video_encoder("dense, time")
    layers = {
        id(p): (group["layer"], group["weight_decay"])
        for group in encoder.parameter_groups()
        for p in group["params"]
    }
    assert layers[id(encoder.frame_embed)] == layers[id(encoder.image.pos_embed)]
    for layer, block in encoder.fusion_blocks.items():
        assert layers[id(block.time_bias.table)] == (int(layer) + 1, 0.0)


@pytest.mark.parametrize(
    "way, stated",
    [("none", 633.1), ("dense", 669.0), ("dense, time", 669.0), ("token", 669.1), ("joint", 725.6)],
)
def test_arithmetic_stays_within_its_budget(way, stated):
    """GFLOP of a clip of 16 frames and 10 s, ViT-B, as docs/video.md states them; dense with a bias of time
    within 1.10 of no fusion.
    """
    inputs = InputSettings(audio_seconds=10.0, hop=200, image_frames=16)  # 16 x 196 + 400 tokens
    with torch.device("meta"):
        encoder = create_encoder("base", inputs=inputs, **WAYS[way])
    assert encoder.audio.patch_embed.num_patches == 400
    flops = count_flops(encoder)
    assert round(flops / 1e9, 1) == stated
    assert way != "dense, time" or flops <= 1.10 * 633.1e9


# --- the bias of time ---------------------------------------------------------------------------------------


def test_a_time_bias_is_linear_between_its_knots_and_constant_beyond():
    bias = randomized(TimeBias(2, 1.5, 7))
    image_times, audio_times = torch.tensor([0.1, 2.0, 4.0]), torch.linspace(-0.3, 3.0, 11)
    apart = (image_times[:, None] - audio_times).numpy()
    truth = np.stack(
        [np.interp(apart, np.linspace(-1.5, 1.5, 7), row) for row in bias.table.detach().numpy()]
    )
    assert relative_error(bias(image_times.double(), audio_times.double())[0], torch.from_numpy(truth)) < 1e-6
    by_clip = bias(torch.stack([image_times, image_times + 1]), torch.stack([audio_times, audio_times + 1]))
    assert by_clip.shape == (2, 2, 3, 11) and relative_error(by_clip[1], by_clip[0]) < 1e-5


def test_a_time_that_is_no_number_gives_no_number_rather_than_a_place_outside_the_table():
    bias = randomized(TimeBias(2, 1.5, 7))(torch.tensor([0.0, math.nan]), torch.zeros(1))
    assert bias[..., 0, :].isfinite().all() and bias[..., 1, :].isnan().all()


def test_a_bias_of_time_can_begin_with_a_peak():
    """Two frames of 2 s are 1 s apart, the knots of 5 moments of sound 0.4 s."""
    inputs = InputSettings(**vars(INPUTS) | dict(image_frames=2))
    expected = torch.tensor([[0, 0, 0, 0.6, 1.8, 3.0, 1.8, 0.6, 0, 0, 0]] * 2)
    fresh = AVEncoder(make_vit(IMAGE), make_vit(AUDIO), pair_bias="time", time_peak=3.0, inputs=inputs)
    copied = AVEncoder(make_vit(IMAGE), make_vit(AUDIO), inputs=INPUTS).with_frames(
        2, pair_bias="time", time_peak=3.0
    )
    for encoder in fresh, copied:
        for block in encoder.fusion_blocks.values():
            assert torch.allclose(block.time_bias.table, expected, atol=1e-6)
    bias = TimeBias(1, 3.0, 16)  # of which no knot lies at 0
    bias.favour_together(2.0, 0.1)
    assert bias.table[0, 7:9].tolist() == pytest.approx(
        [1.0, 1.0]
    ) and bias.table.sum().item() == pytest.approx(2)
    for wrong in (3.0, 0.0), (3.0, -1.0), (float("nan"), 1.0), ("high", 1.0):
        with pytest.raises(ValueError, match="width must be|height must be"):
            bias.favour_together(*wrong)


def test_a_block_of_its_own_reads_times():
    block = randomized(DenseFusion(16, 2, time_bias=(2.0, 9)))
    fusion, image, audio = torch.randn(2, 3, 16), torch.randn(2, 12, 16), torch.randn(2, 5, 16)
    fusion, image, audio = fusion.double(), image.double(), audio.double()
    times = dict(image_times=torch.tensor([0.0, 0.7, 1.4]), audio_times=torch.rand(2, 5))
    table = block.time_bias(*times.values()).repeat_interleave(4, 2)  # 4 tokens a frame
    query, (image_side, audio_side) = block.queries(fusion), block.projected(Stream(image), Stream(audio))
    keys = block.keys_and_values(image_side), block.keys_and_values(audio_side)
    attended = pair_attention(query, *keys[0], *keys[1], pair_bias=table, backend="reference")
    truth = block.update(fusion, block.merge_heads(attended) + block.value_bias)
    assert relative_error(block(fusion, image, audio, **times), truth) < EXACT


# --- the autoencoder ----------------------------------------------------------------------------------------


def make_video_mae(way="dense, time", frames=FRAMES, **options):
    settings = dict(decoder_dim=16, decoder_depth=2, decoder_heads=2, audio_mask_ratio=0.7) | options
    return randomized(AVMAE(make_video_encoder(way, frames), **settings))


@every_way
def test_frames_are_rebuilt_one_by_one(way):
    mae, (video, sound) = make_video_mae(way), make_video()
    removed = mae.mask_sampler()
    drawn = [removed(torch.Generator().manual_seed(n)) for n in range(3)]
    masks = {name: torch.stack([clip[name] for clip in drawn]) for name in drawn[0]}
    output = mae(video, sound, **masks)
    assert output.image_pred.shape == (3, FRAMES, IMAGE_TOKENS, 192)
    keep = torch.stack(
        [
            torch.stack([row.logical_not().nonzero().flatten() for row in clip])
            for clip in masks["image_removed"]
        ]
    )
    audio_keep = torch.stack([row.logical_not().nonzero().flatten() for row in masks["audio_removed"]])
    latent = mae.encoder(video, sound, image_keep=keep, audio_keep=audio_keep)
    for t in range(FRAMES):
        pred = mae.image_decoder(latent.fusion, latent.image[:, t], keep[:, t])
        assert relative_error(output.image_pred[:, t], pred) < EXACT
    targets = torch.stack([mae.target("image", frame) for frame in video.unbind(1)], 1)
    errors = (output.image_pred.float() - targets).square().mean(-1)
    assert relative_error(output.image_loss, errors[masks["image_removed"]].mean()) < 1e-6


def test_hidden_patches_reach_no_prediction():
    mae, (video, sound) = make_video_mae(), make_video()
    first = mae(video, sound)
    masks = dict(image_removed=first.image_removed, audio_removed=first.audio_removed)
    hidden = masks["image_removed"][1, 2].nonzero()[0].item()
    row, column = divmod(hidden, 3)
    before = mae(video, sound, **masks)
    video[1, 2, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] *= torch.rand(8, 8)
    after = mae(video, sound, **masks)
    assert torch.equal(after.image_pred, before.image_pred) and torch.equal(
        after.audio_pred, before.audio_pred
    )
    assert after.image_loss != before.image_loss


@pytest.mark.parametrize("tubes", [False, True])
def test_masks_hide_as_many_in_every_frame(tubes):
    mae = make_video_mae(tubes=tubes)
    output = mae(*make_video(batch=8))
    assert (output.image_removed.sum(-1) == 7).all() and (output.audio_removed.sum(-1) == 7).all()
    same = (output.image_removed == output.image_removed[:, :1]).all()
    drawn = mae.mask_sampler()(torch.Generator().manual_seed(3))["image_removed"]
    assert drawn.shape == (FRAMES, IMAGE_TOKENS) and (drawn.sum(-1) == 7).all()
    assert same == tubes == (drawn == drawn[:1]).all()


@pytest.mark.parametrize("absent", ["image", "audio"])
def test_an_absent_modality_leaves_its_loss(absent):
    mae, (video, sound) = make_video_mae(), make_video()
    present = torch.tensor([True, False, True])
    masks = {name: getattr(mae(video, sound), name) for name in ("image_removed", "audio_removed")}
    whole = mae(video, sound, **masks, **{f"{absent}_present": present})
    (video if absent == "image" else sound)[1] = float("nan")
    output = mae(video, sound, **masks, **{f"{absent}_present": present})
    assert output.loss.isfinite() and output.loss == whole.loss
    picked = {name: mask[present] for name, mask in masks.items()}
    alone = mae(video[present], sound[present], **picked)
    assert relative_error(getattr(output, f"{absent}_loss"), getattr(alone, f"{absent}_loss")) < 1e-6


def test_memory_grows_with_the_frames():
    """What a step keeps for its backward, beside what one frame keeps: as much for each frame more."""
    kept = [activation_bytes(make_video_mae(frames=T).float(), "no", 2) for T in (2, 4, 8)]
    assert (kept[2] - kept[1]) / (kept[1] - kept[0]) == pytest.approx(2, rel=0.01)


def test_an_autoencoder_of_frames_is_saved(tmp_path):
    mae = make_video_mae(tubes=True).float()
    mae.save_pretrained(tmp_path)
    loaded = AVMAE.from_pretrained(tmp_path)
    assert loaded.tubes and loaded.encoder.frames == FRAMES


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(image=torch.zeros(3, *IMAGE).double()), r"image must be \(B, frames, 3, 24, 24\)"),
        (dict(image=torch.zeros(3, 0, *IMAGE).double()), r"image must be \(B, frames, 3, 24, 24\)"),
        (dict(image_mask=torch.ones(3, IMAGE_TOKENS).bool()), r"image_mask must have shape \(3, 3, 9\)"),
        (dict(image_keep=torch.zeros(3, 2).long()), r"image_keep must be \(3, 3, n\)"),
        (dict(image_keep=torch.full((3, 3, 2), 9)), r"image_keep must hold indices in 0..8"),
        (dict(image_present=torch.ones(3, 3).bool()), r"image_present must have shape \(3,\)"),
    ],
)
def test_bad_inputs_are_named(change, message):
    video, sound = make_video()
    with pytest.raises(ValueError, match=message):
        make_video_encoder()(**dict(image=video, audio=sound) | change)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(frames=0), "frames must be a positive integer"),
        (dict(frames=2.0), "frames must be a positive integer"),
        (dict(frames=4, inputs=INPUTS), "frames=4, while inputs has image_frames=1"),
        (dict(pair_bias="space"), "pair_bias must be one of"),
        (dict(pair_bias="time", interactions="token"), "pair_bias needs interactions"),
        (dict(pair_bias="time"), "made without inputs"),
        (dict(time_peak=3.0), "time_peak=3.0 needs pair_bias='time'"),
        (dict(time_peak="high"), "time_peak must be a number of logits, got 'high'"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        AVEncoder(make_vit(IMAGE), make_vit(AUDIO), **options)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(image_times=None), "image_times is needed"),
        (
            dict(audio_times=torch.zeros(2, 4)),
            r"audio_times must be \(S,\) or \(2, S\), where S divides the 5",
        ),
        (dict(image_times=torch.zeros(3, 3)), "image_times must be"),
        (dict(image_times=torch.zeros(3).long()), "image_times must be a floating point tensor"),
    ],
)
def test_bad_times_are_named(change, message):
    block, tokens = DenseFusion(16, 2, time_bias=(2.0, 9)), torch.randn(2, 12, 16)
    times = dict(image_times=torch.zeros(3), audio_times=torch.zeros(5)) | change
    with pytest.raises(ValueError, match=message):
        block(tokens[:, :3], tokens, tokens[:, :5], **times)


def test_what_a_copy_cannot_change_is_refused():
    with pytest.raises(ValueError, match="pair_bias must be that of this encoder, 'time'"):
        make_video_encoder("dense, time").with_frames(4, pair_bias="position")
    with pytest.raises(ValueError, match="time_peak=3.0 is for new tables"):
        make_video_encoder("dense, time").with_frames(4, time_peak=3.0)
    with pytest.raises(ValueError, match="tubes hide the same places in several frames"):
        AVMAE(make_encoder(), tubes=True)
    with pytest.raises(ValueError, match="exclude one another"):
        DenseFusion(16, 2, pair_bias=(3, 4), time_bias=(1.0, 3))
    for knots in 1, 2.0:
        with pytest.raises(ValueError, match=f"knots must be an integer of 2 or more, got {knots}"):
            DenseFusion(16, 2, time_bias=(1.0, knots))
    with pytest.raises(ValueError, match="time_bias must be None or"):
        DenseFusion(16, 2, time_bias=3.0)


def test_a_table_of_positions_is_for_frames_of_images_alone():
    block, tokens = DenseFusion(16, 2, pair_bias=(4, 5)), torch.randn(2, 12, 16)
    block(tokens[:, :3], tokens, tokens[:, :5])
    for image, audio, named in (tokens[:, :10], tokens[:, :5], "image"), (tokens, tokens[:, :10], "audio"):
        with pytest.raises(ValueError, match=f"{named}_positions is needed"):
            block(tokens[:, :3], image, audio)


def test_masks_of_one_frame_are_drawn_as_before():
    one = MaskSampler(9, 10, 0.75, 0.7)(torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    order = torch.randperm(9, generator=generator)[:7]
    assert sorted(order.tolist()) == one["image_removed"].nonzero().flatten().tolist()
