"""Spectrograms against a hand-made computation, images against known pixels, and what decides at random."""

import math

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from avfuse.data import transforms
from avfuse.data.transforms import (
    Spectrogram,
    evaluation_image,
    random_crop,
    random_gain,
    random_view,
    training_images,
)
from avfuse.inputs import InputSettings
from avfuse.presets import SIZES

PLAIN = {"image_mean": (0.0, 0.0, 0.0), "image_std": (1.0, 1.0, 1.0)}  # images stay in 0..1


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def training_image(frame, settings, generator) -> torch.Tensor:
    return training_images([frame], settings, generator)[0]


# ----------------------------------------------------------------------------------------------- spectrogram


def log_mel(waveform: np.ndarray, settings: InputSettings) -> np.ndarray:
    """(samples,) -> (mel_bins, frames), by the definition, in float64."""
    window, hop, rate = settings.window, settings.hop, settings.sample_rate
    padded = np.pad(waveform.astype(np.float64), window // 2, mode="reflect")
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    starts = range(0, len(padded) - window + 1, hop)
    power = np.stack([np.abs(np.fft.rfft(hann * padded[s : s + window])) ** 2 for s in starts], axis=1)
    corners = np.linspace(0, 2595 * math.log10(1 + settings.max_frequency / 700), settings.mel_bins + 2)
    corners = 700 * (10 ** (corners / 2595) - 1)  # Hz
    pitch = np.arange(window // 2 + 1) * rate / window
    mel = np.empty((settings.mel_bins, len(starts)))
    for n, (low, middle, high) in enumerate(zip(corners, corners[1:], corners[2:], strict=False)):
        triangle = np.minimum((pitch - low) / (middle - low), (high - pitch) / (high - middle))
        mel[n] = np.maximum(triangle, 0) @ power
    return np.log10(mel + 1e-7)[:, :-1]


@pytest.mark.parametrize(
    "settings",
    [InputSettings(), InputSettings(sample_rate=22_050, audio_seconds=1.0, window=512, hop=225, mel_bins=40)],
)
def test_spectrogram(settings):
    noise = np.random.default_rng(0)
    times = np.arange(settings.samples) / settings.sample_rate
    waveform = 0.3 * np.sin(2 * np.pi * (100 * times + 900 * times**2))
    waveform += 0.001 * noise.standard_normal(len(times))
    ours = Spectrogram(settings)(torch.from_numpy(waveform.astype(np.float32)))
    assert ours.shape == (1, settings.mel_bins, settings.frames)
    assert np.abs(ours[0].numpy() - log_mel(waveform, settings)).max() < 2e-3  # of float32 at the quietest


def kaldi_banks(waveform: np.ndarray, settings: InputSettings) -> np.ndarray:
    """(samples,) -> (mel_bins, windows): Kaldi's filter banks, by the definition, in float64."""
    window, hop, rate = settings.window, settings.hop, settings.sample_rate
    size = 2 ** math.ceil(math.log2(window))
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / (window - 1))
    rows = []
    for start in range(0, len(waveform) - window + 1, hop):
        frame = waveform[start : start + window].astype(np.float64)
        frame -= frame.mean()
        frame -= 0.97 * np.concatenate([frame[:1], frame[:-1]])
        rows.append(np.abs(np.fft.rfft(hann * frame, size)) ** 2)
    lowest, highest = (1127 * math.log(1 + f / 700) for f in (20, settings.max_frequency))
    corners = np.linspace(lowest, highest, settings.mel_bins + 2)
    mels = 1127 * np.log(1 + np.arange(size // 2 + 1) * rate / size / 700)
    banks = np.empty((settings.mel_bins, len(rows)))
    for n, (low, middle, high) in enumerate(zip(corners, corners[1:], corners[2:], strict=False)):
        triangle = np.minimum((mels - low) / (middle - low), (high - mels) / (high - middle))
        banks[n] = np.stack(rows) @ np.maximum(triangle, 0)
    return np.log(np.maximum(banks, 2.0**-23))


def sounds(settings: InputSettings) -> dict[str, torch.Tensor]:
    """Noise, silence, a chirp from 100 Hz to half the sample rate, and a click."""
    samples, rate = settings.samples, settings.sample_rate
    times = torch.arange(samples, dtype=torch.float64) / rate
    rise = (rate / 2 - 100) / settings.audio_seconds / 2
    click = torch.zeros(samples)
    click[samples // 3] = 1.0
    return {
        "noise": torch.rand(samples, generator=generator()) * 2 - 1,
        "silence": torch.zeros(samples),
        "chirp": (0.5 * torch.sin(2 * math.pi * (100 * times + rise * times**2))).float(),
        "click": click,
    }


AUDIOMAE = InputSettings.audiomae()
OF_PRESETS = list({inputs: None for *_, inputs in SIZES.values()})


def test_audiomae_inputs():
    """10 s are 998 windows of 25 ms, padded with zeros to 1,024 before they are normalised."""
    assert (AUDIOMAE.mel_bins, AUDIOMAE.frames, AUDIOMAE.samples) == (128, 1024, 160_000)
    sound = sounds(AUDIOMAE)["chirp"] + 0.01 * sounds(AUDIOMAE)["noise"] + 0.25
    ours = Spectrogram(AUDIOMAE)(sound)
    assert ours.shape == (1, 128, 1024)
    banks = np.pad(kaldi_banks(sound.numpy(), AUDIOMAE), ((0, 0), (0, 26)))
    expected = (banks + 4.2677393) / (2 * 4.5689974)
    assert np.abs(ours[0].numpy() - expected).max() < 2e-3  # of float32 at the quietest
    short = InputSettings.audiomae(audio_seconds=3.2, padded_frames=None)
    assert Spectrogram(short)(sound[: short.samples]).shape == (1, 128, 320)


@pytest.fixture
def torchaudio():
    try:
        import torchaudio
    except Exception as error:  # the last one, 2.11, raises beside a torch for another CUDA
        pytest.skip(f"torchaudio does not import: {error}")
    return torchaudio


ODD_RATE = InputSettings(sample_rate=16_005, audio_seconds=1.0, hop=165)


@pytest.mark.parametrize("settings", [*OF_PRESETS, ODD_RATE])
def test_log_mel_is_that_of_torchaudio(torchaudio, settings):
    mel = torchaudio.transforms.MelSpectrogram(
        sample_rate=settings.sample_rate,
        n_fft=settings.window,
        hop_length=settings.hop,
        n_mels=settings.mel_bins,
        f_max=settings.max_frequency,
    )
    for name, sound in sounds(settings).items():
        theirs = torch.log10(mel(sound)[..., :-1] + 1e-7)
        torch.testing.assert_close(Spectrogram(settings)(sound)[0], theirs, rtol=1e-5, atol=0, msg=name)


WINDOW_OF_512 = InputSettings.audiomae(window=512, audio_seconds=1.0, padded_frames=None)


@pytest.mark.parametrize(
    "settings", [AUDIOMAE, InputSettings.audiomae(mel_bins=40, padded_frames=None), WINDOW_OF_512]
)
def test_kaldi_filter_banks_are_those_of_torchaudio(torchaudio, settings):
    """The call, the padding and the numbers are those of AudioMAE's dataset.py."""
    for name, sound in sounds(settings).items():
        banks = torchaudio.compliance.kaldi.fbank(
            (sound - sound.mean())[None],
            htk_compat=True,
            sample_frequency=16_000,
            use_energy=False,
            window_type="hanning",
            num_mel_bins=settings.mel_bins,
            dither=0.0,
            frame_length=settings.window / 16,
            frame_shift=10,
        )
        banks = torch.nn.ZeroPad2d((0, 0, 0, settings.frames - len(banks)))(banks)
        theirs = (banks - -4.2677393) / (4.5689974 * 2)
        torch.testing.assert_close(Spectrogram(settings)(sound)[0].T, theirs, rtol=1e-5, atol=0, msg=name)


@pytest.mark.parametrize("settings", [*OF_PRESETS, AUDIOMAE])
def test_spectrogram_exports(settings):
    spectrogram, batch = Spectrogram(settings), torch.stack(list(sounds(settings).values()))
    exported = torch.export.export(spectrogram, (batch[:2],), dynamic_shapes=({0: torch.export.Dim("B")},))
    torch.testing.assert_close(exported.module()(batch), spectrogram(batch))
    assert not spectrogram.state_dict()


def test_spectrogram_of_a_batch_and_of_silence():
    settings = InputSettings(audio_seconds=1.0)
    spectrogram = Spectrogram(settings)
    waveforms = torch.rand(2, 3, settings.samples, generator=generator()) - 0.5
    batch = spectrogram(waveforms)
    assert batch.shape == (2, 3, 1, 128, 64)
    torch.testing.assert_close(batch[1, 2], spectrogram(waveforms[1, 2]))
    assert spectrogram(torch.zeros(settings.samples)).unique().tolist() == [-7.0]
    quiet = waveforms[0, 0, :1000] * 1e-2
    kaldi = Spectrogram(AUDIOMAE)
    assert torch.equal(kaldi(torch.stack([quiet, torch.ones(1000)]))[0], kaldi(quiet))


def test_spectrogram_of_too_little():
    with pytest.raises(ValueError, match="waveform .* 800 samples, got 400"):
        Spectrogram(InputSettings())(torch.zeros(400))
    with pytest.raises(ValueError, match="waveform .* 400 samples or more, got 399"):
        Spectrogram(AUDIOMAE)(torch.zeros(399))
    with pytest.raises(ValueError, match="waveform .* 2000 samples or more, got 1999"):
        Spectrogram(InputSettings(hop=2000))(torch.zeros(1999))


# ---------------------------------------------------------------------------------------------------- images


def ramps(height: int, width: int) -> torch.Tensor:
    """(3, height, width) uint8: red rises from left to right, green from top to bottom, blue is 100."""
    across = torch.linspace(0, 255, width).expand(height, width)
    down = torch.linspace(0, 255, height)[:, None].expand(height, width)
    return torch.stack([across, down, torch.full((height, width), 100.0)]).round().to(torch.uint8)


@pytest.mark.parametrize(("height", "width"), [(256, 512), (512, 256), (90, 120), (120, 90)])
def test_evaluation_keeps_the_centre(height, width):
    settings = InputSettings(image_size=112, **PLAIN)
    image = evaluation_image(ramps(height, width), settings)
    resized = tv.resize(ramps(height, width), [128], InterpolationMode.BICUBIC, antialias=True)
    torch.testing.assert_close(image, tv.center_crop(resized, [112]) / 255)
    assert image.shape == (3, 112, 112) and image.dtype == torch.float32
    short = min(height, width)
    kept = short * 112 / 128  # pixels of the frame, around its centre
    for channel, length in ((0, width), (1, height)):
        line = image[0, 56] if channel == 0 else image[1, :, 56]
        edges = 0.5 - kept / 2 / length, 0.5 + kept / 2 / length
        centres = edges[0] + (torch.arange(112) + 0.5) / 112 * (edges[1] - edges[0])
        torch.testing.assert_close(line, centres, atol=0.012, rtol=0)


@pytest.mark.parametrize("shape", [(48, 64), (77, 333), (500, 3), (37, 2011), (224, 224), (360, 640)])
def test_a_crop_taken_first_has_the_pixels_of_the_resized_frame(shape, monkeypatch):
    frame = torch.randint(0, 256, (3, *shape), dtype=torch.uint8, generator=generator())
    settings = InputSettings(image_size=[112, 160], **PLAIN)
    monkeypatch.setattr(transforms, "WASTE", math.inf)
    truth = evaluation_image(frame, settings)
    monkeypatch.setattr(transforms, "WASTE", 0)
    levels = 255 * (evaluation_image(frame, settings) - truth).abs()
    assert levels.max() < 2.01 and levels.mean() < 0.01  # torchvision rounds its weights too


@pytest.mark.parametrize("shape", [(1, 2**22), (2**22, 1), (3, 200)])
def test_no_frame_is_resized_for_what_is_cut_away(shape, monkeypatch):
    sizes = []
    real = transforms._product
    monkeypatch.setattr(transforms, "_product", lambda *a: sizes.append(real(*a).numel()) or real(*a))
    image = evaluation_image(torch.full((3, *shape), 100, dtype=torch.uint8), InputSettings(**PLAIN))
    assert torch.allclose(image, torch.tensor(100 / 255)) and max(sizes) == 3 * 224 * 224


@pytest.mark.parametrize(("height", "width"), [(256, 512), (512, 256), (90, 120), (60, 100)])
def test_images_may_be_wider_than_high(height, width):
    """As much of the centre as has their shape; in training a crop that is about as wide."""
    settings = InputSettings(image_size=[56, 112], **PLAIN)
    assert settings.image_shape == settings.image_size == (56, 112)
    image = evaluation_image(ramps(height, width), settings)
    assert image.shape == (3, 56, 112)
    scale = min(height / 64, width / 128)  # pixels of the frame for each of the resized one
    for line, length, pixels in ((image[0, 28], width, 112), (image[1, :, 56], height, 56)):
        centres = 0.5 + ((torch.arange(pixels) + 0.5) - pixels / 2) * scale / length
        torch.testing.assert_close(line, centres, atol=0.015, rtol=0)

    chance, ratios = generator(), []
    for _ in range(500):
        (top, left, h, w), _ = random_view(height, width, settings, chance)
        assert 0 <= top <= height - h and 0 <= left <= width - w
        ratios.append(w / h / 2)
    assert 0.7 < min(ratios) and max(ratios) < 1.4
    assert training_image(ramps(height, width), settings, chance).shape == (3, 56, 112)


def test_images_are_normalised():
    settings = InputSettings(image_size=32)
    frame = ramps(40, 40)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for ours, plain in (
        (evaluation_image(frame, settings), evaluation_image(frame, InputSettings(image_size=32, **PLAIN))),
        (
            training_image(frame, settings, generator()),
            training_image(frame, InputSettings(image_size=32, **PLAIN), generator()),
        ),
    ):
        torch.testing.assert_close(ours * std + mean, plain)
        assert abs(float(plain[2].mean()) - 100 / 255) < 1e-6


def test_downsizing_does_not_alias():
    stripes = torch.zeros(3, 600, 600, dtype=torch.uint8)
    stripes[:, :, ::2] = 255
    settings = InputSettings(image_size=64, **PLAIN)
    for image in (evaluation_image(stripes, settings), training_image(stripes, settings, generator())):
        assert image.std() < 0.02 and abs(float(image.mean()) - 0.5) < 0.02


@pytest.mark.parametrize(("height", "width"), [(360, 640), (480, 360), (128, 128)])
def test_training_crops(height, width):
    chance = generator()
    crops = torch.tensor([random_crop(height, width, chance) for _ in range(4000)])
    top, left, h, w = crops.double().T
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= height).all() and (left + w <= width).all()
    area, ratio = h * w / (height * width), w / h
    # Frames wider than 4:3 can hold no crop of that shape and large area: such draws are made again.
    assert (area > 0.495).all() and (area <= 1).all()
    assert (ratio > 0.74).all() and (ratio < 1.35).all()
    assert area.min() < 0.51 and ratio.min() < 1 and ratio.max() > 1.1
    for offset, room in ((top, height - h), (left, width - w)):
        share = offset[room > 9] / room[room > 9]
        assert abs(share.mean() - 0.5) < 0.03 and share.min() == 0 and share.max() == 1
    often = crops.unique(dim=0, return_counts=True)[1].max()
    assert often < 800  # the central crop that follows ten draws
    if height == width:
        assert (w == width).any() and (h == height).any()
        assert area.max() > 0.97
        assert abs(ratio.log().mean()) < 0.02


def test_training_crops_of_extreme_frames():
    assert random_crop(100, 1000, generator()) == (0, 433, 100, 133)
    assert random_crop(1000, 100, generator()) == (433, 0, 133, 100)
    assert random_crop(1, 1, generator()) == (0, 0, 1, 1)
    for seed in range(9):
        for aspect in 0.2, 5.0:  # no side is drawn that has no pixel
            assert random_crop(1, 1, generator(seed), aspect=aspect) == (0, 0, 1, 1)


def test_training_image_is_the_crop_and_half_are_mirrored():
    settings = InputSettings(image_size=64, **PLAIN)
    frame, mirrored = ramps(200, 300), 0
    for seed in range(200):
        image = training_image(frame, settings, generator(seed))
        top, left, height, width = random_crop(200, 300, generator(seed))
        flipped = bool(image[0, 32, 0] > image[0, 32, -1])
        mirrored += flipped
        row = image[0, 32].flip(0) if flipped else image[0, 32]
        assert abs(float(row[0]) - (left + width / 128) / 300) < 0.015
        assert abs(float(row[-1]) - (left + width - width / 128) / 300) < 0.015
        assert abs(float(image[1, 0, 32]) - (top + height / 128) / 200) < 0.015
        assert abs(float(image[1, -1, 32]) - (top + height - height / 128) / 200) < 0.015
    assert 70 < mirrored < 130


# ------------------------------------------------------------------------------------------------ randomness


def test_gain():
    waveform = torch.tensor([0.1, -0.2, 0.9, -0.9])
    chance = generator()
    gains = torch.stack([random_gain(waveform, chance)[0] / 0.1 for _ in range(2000)])
    decibel = 20 * gains.log10()
    assert -6 <= decibel.min() < -5.9 and 5.9 < decibel.max() <= 6.001
    assert abs(decibel.mean()) < 0.3 and abs(decibel.std() - 12 / math.sqrt(12)) < 0.2
    chance = generator()
    for _ in range(100):
        louder = random_gain(waveform, chance)
        torch.testing.assert_close(louder, (waveform * louder[0] / 0.1).clamp(-1, 1))


def test_only_the_generator_decides():
    settings, frame, waveform = InputSettings(image_size=32), ramps(50, 70), torch.linspace(-1, 1, 100)
    state = torch.get_rng_state()
    first = training_image(frame, settings, generator(3)), random_gain(waveform, generator(3))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    again = training_image(frame, settings, generator(3)), random_gain(waveform, generator(3))
    other = training_image(frame, settings, generator(4)), random_gain(waveform, generator(4))
    for one, two, three in zip(first, again, other, strict=True):
        assert torch.equal(one, two) and not torch.equal(one, three)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(image_size=96.0), "image_size must be a positive integer, got 96.0"),
        (dict(image_size=True), "image_size must be a positive integer, got True"),
        (dict(image_size=(96,)), r"image_size must be \(height, width\), got \(96,\)"),
        (dict(image_size=(96, 0)), "image_size must be a positive integer, got 0"),
        (dict(hop=12.5), "hop must be a positive integer, got 12.5"),
        (dict(mel_bins=0), "mel_bins must be a positive integer, got 0"),
        (dict(audio_seconds=float("inf")), "audio_seconds must be a positive number, got inf"),
        (dict(audio_seconds=2.99), "audio_seconds=2.99 is not a whole number of hops"),
        (dict(audio_seconds=1 / 64), "audio_seconds=0.015625 is less than half a window"),
        (dict(max_frequency=8001), "max_frequency=8001 is above half the sample_rate of 16000"),
        (dict(front_end="mfcc"), "front_end must be one of 'log-mel', 'kaldi', got 'mfcc'"),
        (dict(audio_mean=float("nan")), "audio_mean must be a number, got nan"),
        (dict(audio_std=0.0), "audio_std must be a positive number, got 0.0"),
        (dict(front_end="kaldi", audio_seconds=1 / 32), "audio_seconds=0.03125 is less than a window"),
        (dict(front_end="kaldi", max_frequency=20.0), "max_frequency=20.0 is not above 20.0 Hz"),
        (dict(padded_frames=256), "padded_frames=256 pads Kaldi filter banks"),
        (dict(front_end="kaldi", padded_frames=191), "more frames than the 192 hops of audio_seconds=3.0"),
        (dict(front_end="kaldi", padded_frames=200.5), "padded_frames must be a positive integer, got 200.5"),
        (dict(image_mean="abc"), "image_mean needs three numbers .* got 'abc'"),
        (dict(image_std=(1.0, 1.0)), "image_std needs three numbers"),
        (dict(image_std=(1.0, 0.0, 1.0)), "image_std must be positive"),
    ],
)
def test_settings_that_make_no_sense_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        InputSettings(**wrong)


def test_the_shortest_windows():
    """One sample more than half a window, and of Kaldi's filter banks one window."""
    with pytest.raises(ValueError, match="half a window"):
        InputSettings(audio_seconds=0.025, hop=400)
    shortest = InputSettings(audio_seconds=401 / 16_000, hop=401)
    assert Spectrogram(shortest)(torch.zeros(401)).shape == (1, 128, 1)
    one = InputSettings(front_end="kaldi", audio_seconds=0.05, hop=400, padded_frames=2)
    assert one.frames == 2 and Spectrogram(one)(torch.zeros(800)).shape == (1, 128, 2)
