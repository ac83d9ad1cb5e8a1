"""What the pictures show must be what the model saw and said."""

import warnings

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from avfuse import AVMAE, InputSettings, create_encoder
from avfuse.mae import patchify
from avfuse.training.pictures import (
    draw_attention,
    draw_reconstructions,
    heat_maps,
    restored,
    rgb,
    save,
    title_of_sound,
)
from avfuse.vit import plain_vit


@pytest.fixture(scope="module")
def mae():
    torch.manual_seed(0)
    return AVMAE(create_encoder("tiny"), decoder_dim=32, decoder_depth=1, decoder_heads=2).eval()


@pytest.fixture
def batch(mae):
    image, audio = torch.randn(2, 3, 96, 96), torch.randn(2, 1, 64, 128)
    masks = [mae.mask_sampler()(torch.Generator().manual_seed(n)) for n in range(2)]
    masks = {name: torch.stack([mask[name] for mask in masks]) for name in masks[0]}
    present = {f"{name}_present": torch.ones(2, dtype=torch.bool) for name in ("image", "audio")}
    return dict(image=image, audio=audio, **masks, **present)


def test_a_picture_of_sound_says_how_long_and_how_high_it_is():
    assert title_of_sound(InputSettings()) == "spectrogram (3 s, to 8 kHz)"


def test_restored_keeps_visible_patches_and_inverts_the_target(mae, batch):
    with torch.no_grad():
        output = mae(**batch)
    perfect = output._replace(image_pred=mae.target("image", batch["image"]))
    original, seen, rebuilt = restored(mae, "image", batch["image"], perfect)
    torch.testing.assert_close(original, batch["image"])
    torch.testing.assert_close(rebuilt, batch["image"], atol=1e-4, rtol=1e-4)  # a perfect prediction
    removed = batch["image_removed"]
    assert torch.equal(patchify(seen, (16, 16))[~removed], patchify(batch["image"], (16, 16))[~removed])
    assert not patchify(seen, (16, 16))[removed].any()
    _, _, rebuilt = restored(mae, "image", batch["image"], output)
    assert torch.equal(patchify(rebuilt, (16, 16))[~removed], patchify(batch["image"], (16, 16))[~removed])
    assert not torch.allclose(rebuilt, batch["image"], atol=0.1)


def test_heat_maps_peak_where_the_weight_is():
    vit, weights = plain_vit(3, (32, 48), patch_size=16, embed_dim=8, num_heads=1), torch.zeros(1, 6)
    weights[0, 4] = 1.0  # row 1, column 1 of 2 x 3
    peak = heat_maps(vit, weights, torch.zeros(1, 3, 32, 48))[0].argmax().item()
    assert 16 <= peak // 48 < 32 and 16 <= peak % 48 < 32
    of_frames = heat_maps(vit, torch.cat([weights.roll(1), weights], 1), torch.zeros(1, 2, 3, 32, 48))
    assert of_frames.shape == (1, 2, 32, 48) and of_frames[0, 1].argmax() == peak


def test_several_frames_stand_in_a_row():
    settings, frames = InputSettings(image_mean=(0, 0, 0), image_std=(1, 1, 1)), torch.rand(3, 3, 4, 5)
    assert torch.equal(rgb(frames, settings), torch.cat(list(frames.permute(0, 2, 3, 1)), 1))
    many = rgb(torch.arange(15.0).view(15, 1, 1, 1).expand(-1, 3, 4, 5) / 15, settings)
    assert (many[0, ::5, 0] * 15).round().tolist() == [0, 2, 4, 6, 8, 10, 12, 14]


def test_clips_of_several_frames_are_drawn(tmp_path):
    encoder = create_encoder("tiny", frames=4, pair_bias="time")
    mae = AVMAE(encoder, decoder_dim=32, decoder_depth=1, decoder_heads=2).eval()
    inputs = dict(image=torch.rand(2, 4, 3, 96, 96), audio=torch.rand(2, 1, 64, 128))
    output = mae(**inputs)
    original, masked, rebuilt = restored(mae, "image", inputs["image"], output)
    assert torch.equal(original, inputs["image"])
    for t in range(4):
        hidden = (
            output.image_removed[:, t].view(2, 6, 1, 6, 1).expand(-1, -1, 16, -1, 16).reshape(2, 1, 96, 96)
        )
        hidden = hidden.expand(-1, 3, -1, -1)
        assert (masked[:, t][hidden] == 0).all() and torch.equal(
            masked[:, t][~hidden], original[:, t][~hidden]
        )
        assert torch.equal(rebuilt[:, t][~hidden], original[:, t][~hidden])
    draw_reconstructions(mae, inputs, tmp_path / "reconstructions.png")
    draw_attention(encoder, inputs, tmp_path / "attention.png")
    widths = [Image.open(tmp_path / f"{name}.png").width for name in ("reconstructions", "attention")]
    assert min(widths) > 1000


def test_rgb_undoes_the_normalisation():
    settings = InputSettings()
    pixels = torch.rand(4, 5, 3)
    mean, std = torch.tensor(settings.image_mean), torch.tensor(settings.image_std)
    torch.testing.assert_close(rgb(((pixels - mean) / std).permute(2, 0, 1), settings), pixels)


def test_names_are_no_formulas(tmp_path):
    figure = Figure()
    axis = figure.subplots()
    axis.plot([0, 1], label="$\\frac{$")
    axis.set(title="a$b\\frac{$", xticks=[0, 1], xticklabels=["$x^$", "cat"])
    figure.legend()
    figure.suptitle("$_{$")
    save(figure, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").exists()


def test_letters_that_the_font_lacks_bring_no_warning(tmp_path):
    figure = Figure(figsize=(1, 1))
    figure.subplots().set_title("\u4e2d\u6587")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").exists()


def test_files_are_written(mae, batch, tmp_path):
    draw_reconstructions(mae, batch, tmp_path / "pictures" / "reconstructions.png")
    draw_attention(mae.encoder, batch, tmp_path / "pictures" / "attention.png")
    for path in (tmp_path / "pictures").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
    assert len(list((tmp_path / "pictures").iterdir())) == 2
