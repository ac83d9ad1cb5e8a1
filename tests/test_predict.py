"""What a trained model says of files: `read_clip`, `load`, `model.predict` and `python -m avfuse.predict`."""

import csv
import json
import os
import shutil
import wave
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from models import make_vit, randomized, relative_error
from videos import number_of, write_video

import avfuse
from avfuse import AVMAE, AVEncoder, InputSettings, read_clip
from avfuse.data.clips import Clip, ClipDataset
from avfuse.loading import load_model
from avfuse.model_card import KINDS as KINDS_OF_CARDS
from avfuse.options import FeaturesConfig
from avfuse.predict import PredictConfig, main
from avfuse.tasks.classifier import Classifier
from avfuse.tasks.localize import Localizer
from avfuse.tasks.model import TaskModel
from avfuse.tasks.saved import MODELS
from avfuse.tasks.segment import Segmenter
from avfuse.tasks.separator import Separator
from avfuse.training.features import pool
from avfuse.training.pictures import rgb

INPUTS = InputSettings(image_size=32, mel_bins=32, audio_seconds=1.0, hop=500)
NAMES = ("dog", "harp", "rain")


def make_encoder():
    return AVEncoder(make_vit((3, 32, 32)), make_vit((1, 32, 32)), inputs=INPUTS, fusion_tokens=4)


def make(kind):
    torch.manual_seed(0)
    options = {
        AVMAE: dict(decoder_dim=16, decoder_depth=1, decoder_heads=2),
        Classifier: dict(classes=3, class_names=NAMES),
        Separator: dict(decoder_dim=16),
    }.get(kind, {})
    return (
        make_encoder().eval()
        if kind is AVEncoder
        else randomized(kind(make_encoder(), **options), 0.05).float()
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return dict(
        both=write_video(folder / "both.mp4", 4),
        silent=write_video(folder / "silent.mp4", 4, audio=False),
        dark=write_video(folder / "dark.mp4", 4, video=False),
        broken=(folder / "broken.mp4", (folder / "broken.mp4").write_bytes(b"no video"))[0],
    )


# --- one clip -----------------------------------------------------------------------------------------------


def test_read_clip_reads_what_evaluation_reads(files):
    clip = read_clip(files["both"], INPUTS)
    item = ClipDataset([Clip(files["both"])], INPUTS, train=False)[0]
    assert torch.equal(clip.image[0], item["image"]) and torch.equal(clip.audio[0], item["audio"])
    assert make_encoder()(*clip).image.shape == (1, 16, 32)


def test_a_window_begins_where_it_is_asked_to(files):
    """Ten frames a second: the middle of a second from 2.3 s on is frame 28."""
    for start, frame in ((0, 5), (2.3, 28), (2.6, 31)):
        clip = read_clip(str(files["both"]), INPUTS, start=start)
        assert number_of(255 * rgb(clip.image[0], INPUTS).numpy()) == frame
    later, sooner = (read_clip(files["both"], INPUTS, start=start).audio for start in (2.5, 2.0))
    steps = round(0.5 * INPUTS.sample_rate / INPUTS.hop)
    torch.testing.assert_close(later[..., 2 : 32 - steps], sooner[..., steps + 2 :], atol=0.05, rtol=0)


def test_a_modality_that_is_not_there_is_none(files):
    assert read_clip(files["silent"], INPUTS).audio is None and read_clip(files["dark"], INPUTS).image is None
    assert make_encoder()(*read_clip(files["silent"], INPUTS)).audio is None


@pytest.mark.parametrize("start", [-0.1, 4.1, float("nan"), "1", True])
def test_a_start_outside_of_the_file_is_refused(files, start):
    with pytest.raises(ValueError, match="start must be within the 4.* s of"):
        read_clip(files["both"], INPUTS, start=start)


def test_a_file_that_cannot_be_read_is_named(files, tmp_path):
    with pytest.raises(ValueError, match=r"broken.mp4 cannot be read: "):
        read_clip(files["broken"], INPUTS)
    with pytest.raises(ValueError, match=r"gone.mp4 cannot be read: .*no such file"):
        read_clip(tmp_path / "gone.mp4", INPUTS)
    with pytest.raises(ValueError, match="inputs must be InputSettings, got dict"):
        read_clip(files["both"], {})


# --- models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS.values())
def test_load_gives_what_was_saved(kind, tmp_path):
    model = make(kind)
    model.save_pretrained(tmp_path / "run/model")
    shutil.copytree(tmp_path / "run/model", tmp_path / "copy")
    for path in (tmp_path / "run", tmp_path / "run/model", tmp_path / "copy"):
        loaded, same, encoder = avfuse.load(path), kind.from_pretrained(path), avfuse.load_encoder(path)
        assert type(loaded) is type(same) is kind and not loaded.training and not same.training
        assert type(encoder) is AVEncoder
        if issubclass(kind, TaskModel):
            assert type(load_model(kind, path)) is kind
        assert all(torch.equal(ours, loaded.state_dict()[name]) for name, ours in model.state_dict().items())


KINDS = {
    AVEncoder: ("encoder", "feature-extraction", "feature-extraction"),
    AVMAE: ("masked autoencoder", "feature-extraction", "masked-autoencoder"),
    Classifier: ("classifier", "video-classification", "audio-visual-classification"),
    Localizer: ("localizer", "image-segmentation", "sound-source-localization"),
    Segmenter: ("segmenter", "image-segmentation", "audio-visual-segmentation"),
    Separator: ("separator", "audio-to-audio", "audio-visual-source-separation"),
}


def test_every_model_is_loaded_and_has_a_card():
    assert KINDS.keys() == set(MODELS.values()) and KINDS_OF_CARDS.keys() == MODELS.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_pushed_tells_its_task_and_loads_as_its_card_says(kind, files, tmp_path, monkeypatch, capsys):
    """The hub is played by a folder: what would be uploaded lies there."""

    class Hub:
        def __init__(self, **_):
            pass

        def create_repo(self, repo_id, **_):
            return type("Url", (), dict(repo_id=repo_id))

        def upload_folder(self, folder_path, **_):
            shutil.copytree(folder_path, tmp_path / "hub")

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Hub)
    monkeypatch.setattr("avfuse.pretrained.hf_hub_download", lambda _, name, **__: tmp_path / "hub" / name)
    model = make(kind)
    model.push_to_hub("someone/model")
    card = ModelCard.load(tmp_path / "hub/README.md")
    title, pipeline, tag = KINDS[kind]
    assert f"# Audio-visual {title}\n" in card.text
    assert (card.data.pipeline_tag, card.data.tags) == (pipeline, ["audio-visual", tag])
    named = "## Classes\n\nIn the order of the outputs: dog; harp; rain." in card.text
    assert named == (kind is Classifier)
    code = card.text.split("```python\n")[1].split("```")[0]
    scope = {}
    exec(code.replace("FOLDER_OR_NAME", "someone/model").replace("VIDEO.mp4", str(files["both"])), scope)
    assert capsys.readouterr().out and type(scope["model"]) is kind and type(scope["encoder"]) is AVEncoder
    assert all(torch.equal(ours, scope["model"].state_dict()[n]) for n, ours in model.state_dict().items())


def test_load_names_what_there_is(tmp_path):
    with pytest.raises(ValueError, match="checkpoint .* must hold an AVEncoder or AVMAE, but holds"):
        avfuse.load(tmp_path)


def test_a_classifier_answers_by_image_by_sound_and_by_both(files):
    model = make(Classifier).train()
    image, audio = read_clip(files["both"], INPUTS, start=1.0)
    answer = model.predict(files["both"], start=1.0)
    assert model.training
    model.eval()
    for what, inputs in (("image", (image, None)), ("audio", (None, audio)), ("both", (image, audio))):
        odds = model(*inputs).logits[0].softmax(0).tolist()
        assert answer[what] == pytest.approx(dict(zip(NAMES, odds, strict=True)))
        assert list(answer[what].values()) == sorted(odds, reverse=True)
    assert model.predict(files["silent"]).keys() == {"image"} and model.predict(files["dark"]).keys() == {
        "audio"
    }


@pytest.mark.parametrize("modalities, other", [("audio", "silent"), ("image", "dark")])
def test_a_classifier_answers_only_by_what_has_taught_it(modalities, other, files, tmp_path):
    """The heads of the rest are as they were drawn."""
    Classifier(make_encoder(), 3, modalities=modalities).save_pretrained(tmp_path)
    model = avfuse.load(tmp_path)
    assert model.predict(files["both"]).keys() == {modalities}
    with pytest.raises(
        ValueError, match=f"{other}.mp4: it has no .*, by which alone this classifier answers"
    ):
        model.predict(files[other])
    with pytest.raises(ValueError, match=" must be one of 'both', 'image', 'audio', got 'video'"):
        Classifier(make_encoder(), 3, modalities="video")


def test_probabilities_of_several_classes_are_each_their_own(files):
    model = Classifier(make_encoder(), 3, several=True).eval()
    answer = model.predict(files["both"])["both"]
    logits = model(*read_clip(files["both"], INPUTS)).logits[0]
    assert answer == pytest.approx({n: p for n, p in enumerate(logits.sigmoid().tolist())})


@pytest.mark.parametrize("kind", [Localizer, Segmenter, partial(Segmenter, outputs=3)])
def test_a_map_tells_what_sounds(kind, files):
    model = make(kind)
    sounding = model.predict(files["both"])["map"]
    logits = model(*read_clip(files["both"], INPUTS)).float()
    assert sounding.shape == (32, 32) and 0 <= sounding.min() and sounding.max() <= 1
    if kind is not Localizer:  # of classes, the first is the background
        truth = logits[0, 0].sigmoid() if kind is Segmenter else logits[0].softmax(0)[1:].sum(0)
        assert relative_error(sounding, truth) < 1e-6
    with pytest.raises(ValueError, match=r"silent.mp4: it has no sound, and both are needed"):
        model.predict(files["silent"])
    model.settings["modalities"] = "image"
    sound = torch.randn(1, *model.encoder.input_shapes["audio"])  # which the control does not hear
    with torch.no_grad():
        truth = model.predicted(read_clip(files["silent"], INPUTS).image, sound)["map"]
    assert torch.equal(model.predict(files["silent"])["map"], truth)


def test_old_weights_of_a_segmenter_are_read_by_their_old_names(tmp_path):
    model = make(Segmenter)
    old = {name.replace("last.", "predict."): weight for name, weight in model.state_dict().items()}
    fresh = Segmenter(make_encoder())
    fresh.load_state_dict(old)
    assert torch.equal(fresh.last.weight, model.last.weight)
    assert Segmenter.current(old).keys() == model.state_dict().keys()


def test_a_separator_gives_the_sound_of_what_is_seen(files):
    model = make(Separator)
    answer = model.predict(files["both"], start=1.5)
    assert answer["sound"].shape == (16_000,) and answer["sample_rate"] == 16_000
    image, audio = read_clip(files["both"], INPUTS, start=1.5)
    with Clip(files["both"]).open() as reader:
        mixture = torch.from_numpy(reader.audio(1.5, 1.0, 16_000))
    assert torch.equal(answer["sound"], model.separate(image[None], audio, mixture[None])[0][0, 0])
    end = model.predict(files["both"], start=3.75)["sound"]  # of four seconds: nothing is made up after them
    with Clip(files["both"]).open() as reader:
        assert (
            len(end) == len(reader.audio(3.75, 1.0, 16_000, extended=False)) == pytest.approx(4000, abs=1024)
        )


# --- the program --------------------------------------------------------------------------------------------


@pytest.fixture
def classifier(tmp_path):
    make(Classifier).save_pretrained(tmp_path / "run/model")
    return str(tmp_path / "run")


def test_what_parquet_needs_is_said_before_the_work(classifier, files, tmp_path, monkeypatch):
    monkeypatch.setattr("avfuse.options.find_spec", lambda name: None)
    message = r"--out .parquet needs pyarrow: pip install 'avfuse\[parquet\]', or write .csv"
    with pytest.raises(ValueError, match=message):
        PredictConfig(classifier, (files["both"],), out=tmp_path / "answers.parquet")
    with pytest.raises(ValueError, match=message):
        FeaturesConfig(folder=tmp_path, checkpoint=classifier, out=tmp_path / "features.parquet")


@pytest.mark.parametrize("kind", [Classifier, AVEncoder])
def test_a_parquet_file_has_the_rows_of_a_csv_file(kind, files, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    make(kind).save_pretrained(tmp_path / "model")
    videos = files["dark"], files["both"]  # the first has fewer columns
    for name in "answers.csv", "answers.parquet":
        assert main(PredictConfig(str(tmp_path / "model"), videos, out=tmp_path / name)) == 0
    rows = parquet.read_table(tmp_path / "answers.parquet").to_pylist()
    with open(tmp_path / "answers.csv") as file:
        told = [{k: "" if v is None else str(v) for k, v in row.items()} for row in rows]
        assert told == list(csv.DictReader(file))


def test_names_that_are_no_unicode_are_escaped_in_a_table(classifier, files, tmp_path):
    odd = Path(os.fsdecode(bytes(tmp_path) + b"/\xff.mp4"))
    shutil.copy(files["both"], odd)
    assert main(PredictConfig(classifier, (odd,), out=tmp_path / "answers.csv")) == 0
    rows = list(csv.DictReader((tmp_path / "answers.csv").open()))
    assert {row["video"] for row in rows} == {f"{tmp_path}/\\xff.mp4"}


def test_a_table_has_the_peak_of_a_map(files, tmp_path):
    make(Localizer).save_pretrained(tmp_path / "model")
    out, pictures = tmp_path / "a.csv", tmp_path / "looks"
    main(PredictConfig(str(tmp_path / "model"), (files["both"],), out=out, pictures=pictures))
    (row,) = csv.DictReader(out.open())
    assert list(row) == ["video", "start", "map_peak", "map_y", "map_x", "missing", "file"]
    sounding = make(Localizer).predict(files["both"])["map"]
    assert float(row["map_peak"]) == pytest.approx(sounding[int(row["map_y"]), int(row["map_x"])].item())
    assert float(row["map_peak"]) == pytest.approx(sounding.max().item()) and Path(row["file"]).is_file()


def test_a_table_names_the_files_of_sounds(files, tmp_path, monkeypatch):
    make(Separator).save_pretrained(tmp_path / "model")
    options = dict(out=tmp_path / "a.csv", pictures=tmp_path / "sounds")
    main(PredictConfig(str(tmp_path / "model"), (files["both"],), **options))
    (row,) = csv.DictReader((tmp_path / "a.csv").open())
    assert row["file"] == str(tmp_path / "sounds/both-1.5s.wav") and Path(row["file"]).is_file()
    assert list(row) == ["video", "start", "sound_peak", "sample_rate", "missing", "file"]
    monkeypatch.setattr(Separator, "predict", lambda *_: pytest.fail("the work began"))
    with pytest.raises(ValueError, match="a.csv names the files of sounds, which --pictures FOLDER writes"):
        main(PredictConfig(str(tmp_path / "model"), (files["both"],), out=tmp_path / "a.csv"))


def test_where_nothing_can_be_written_nothing_is_said(classifier, files, tmp_path, monkeypatch):
    monkeypatch.setattr("avfuse.predict.load", lambda path: pytest.fail("the work began"))
    (tmp_path / "a.csv").mkdir()
    (tmp_path / "file").touch()
    for option, path in ("out", "a.csv"), ("out", "file/a.json"), ("pictures", "file"):
        with pytest.raises(ValueError, match=f"--{option} .*{path}.* cannot be written: "):
            main(PredictConfig(classifier, (files["both"],), **{option: tmp_path / path}))


@pytest.mark.parametrize("suffix", ["json", "csv"])
def test_windows_of_several_videos_in_one_file(classifier, files, tmp_path, suffix, capsys):
    videos, out = (files["both"], files["broken"], files["silent"]), tmp_path / f"new/answers.{suffix}"
    assert main(PredictConfig(classifier, videos, every=1.5, top=2, out=out)) == 1
    said = capsys.readouterr()
    assert "both.mp4 at 1.5 s\n  by image" in said.out and "broken.mp4 cannot be read" in said.err
    assert "silent.mp4 at 1.5 s, without sound\n  by image" in said.out
    model = make(Classifier)
    truth = [
        (video, start, model.predict(video, start=start)) for video in videos[::2] for start in (0, 1.5, 3.0)
    ]
    if suffix == "json":
        rows = json.loads(out.read_text())
        assert [(row["video"], row["start"]) for row in rows] == [(str(v), s) for v, s, _ in truth]
        assert [{k: row[k] for k in answer} for row, (*_, answer) in zip(rows, truth, strict=True)] == [
            {k: pytest.approx(v) for k, v in answer.items()} for *_, answer in truth
        ]
    else:
        rows = list(csv.DictReader(out.open()))
        flat = [
            (str(v), s, by, name, p)
            for v, s, a in truth
            for by, odds in a.items()
            for name, p in odds.items()
        ]
        assert [tuple(row.values())[:4] for row in rows] == [
            (v, str(float(s)), by, n) for v, s, by, n, _ in flat
        ]
        assert [float(row["probability"]) for row in rows] == pytest.approx([p for *_, p in flat])
    assert {(Path(row["video"]).stem, row["missing"]) for row in rows} == {("both", ""), ("silent", "sound")}


@pytest.mark.parametrize("kind", [AVEncoder, Classifier, Localizer, Separator])
def test_pictures_and_sounds(kind, files, tmp_path):
    make(kind).save_pretrained(tmp_path / "model")
    config = PredictConfig(str(tmp_path / "model"), (files["both"],), pictures=tmp_path / "pictures")
    assert main(config) == 0
    (file,) = (tmp_path / "pictures").iterdir()
    if kind is not Separator:
        assert file.name == "both-1.5s.png" and file.read_bytes()[:4] == b"\x89PNG"
        return
    with wave.open(str(file)) as sound:
        samples = np.frombuffer(sound.readframes(16_000), "<i2")
    expected = make(kind).predict(files["both"], start=1.5)["sound"]
    np.testing.assert_allclose(samples / 32767, expected.clamp(-1, 1), atol=1e-4)


def test_pictures_of_videos_of_one_name_are_kept_apart(files, tmp_path):
    (tmp_path / "other").mkdir()
    others = [shutil.copy(files["both"], tmp_path / "other" / name) for name in ("both.mp4", "1-both.mp4")]
    make(Localizer).save_pretrained(tmp_path / "model")
    videos = (files["both"], *map(Path, others), files["silent"])
    main(PredictConfig(str(tmp_path / "model"), videos, pictures=tmp_path / "looks"))
    names = sorted(path.name for path in (tmp_path / "looks").iterdir())
    assert names == ["1-both-1.5s.png", "2-both-1.5s.png", "3-1-both-1.5s.png"]


def test_where_the_picture_is_and_that_there_is_none_is_said(files, tmp_path, capsys):
    make(Classifier).save_pretrained(tmp_path / "model")
    videos = files["both"], files["silent"]
    assert main(PredictConfig(str(tmp_path / "model"), videos, pictures=tmp_path / "looks", quiet=True)) == 0
    said = [line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines() if "  file " in line]
    assert said == [str(tmp_path / "looks" / "both-1.5s.png"), "none: there is nothing to draw"]


def test_what_is_given_in_the_wrong_order_or_as_a_folder_is_told(files, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"RUN comes before VIDEO..., and .*both.mp4 is called like a video"):
        main(PredictConfig(str(files["both"]), (tmp_path,)))
    make(Classifier).save_pretrained(tmp_path / "model")
    assert main(PredictConfig(str(tmp_path / "model"), (tmp_path,))) == 1
    assert "cannot be opened: it is a folder" in capsys.readouterr().err


@pytest.mark.parametrize("pretrained", [False, True])
def test_features_of_an_encoder(files, tmp_path, pretrained):
    encoder = make(AVEncoder)
    saved = AVMAE(encoder, decoder_dim=16, decoder_depth=1, decoder_heads=2) if pretrained else encoder
    saved.save_pretrained(tmp_path / "model")
    answer = avfuse.load(tmp_path / "model").predict(files["both"], start=1.5)
    assert main(PredictConfig(str(tmp_path / "model"), (files["both"],), out=tmp_path / "f.csv")) == 0
    (row,) = csv.DictReader((tmp_path / "f.csv").open())
    truth = pool(encoder(*read_clip(files["both"], INPUTS)))
    for name in "image", "audio", "fusion":
        assert [float(row[f"{name}_{n}"]) for n in range(32)] == pytest.approx(
            truth[name][0].tolist(), rel=1e-4, abs=1e-5
        )
        assert answer[name].tolist() == [float(row[f"{name}_{n}"]) for n in range(32)]
    silent = saved.train().predict(files["silent"])
    assert silent.keys() == {"image", "fusion"} and saved.training


def test_features_of_what_has_no_pictures_or_no_sound(files, tmp_path, capsys):
    make(AVEncoder).save_pretrained(tmp_path / "model")
    videos = files["dark"], files["silent"], files["both"]
    assert main(PredictConfig(str(tmp_path / "model"), videos, out=tmp_path / "f.csv")) == 0
    rows = list(csv.DictReader((tmp_path / "f.csv").open()))
    assert [row["missing"] for row in rows] == ["pictures", "sound", ""]
    assert [(bool(row["image_0"]), bool(row["audio_0"])) for row in rows] == [(0, 1), (1, 0), (1, 1)]
    said = capsys.readouterr().out
    assert "dark.mp4 at 1.5 s, without pictures\n" in said and "silent.mp4 at 1.5 s, without sound\n" in said


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(videos=()), "VIDEO... must name at least one file"),
        (dict(every=0.0), "--every must be a positive number"),
        (dict(top=0), "--top must be positive, got 0"),
        (dict(out="answers.txt"), "--out must end in .json, .csv, .parquet"),
    ],
)
def test_bad_settings_are_named(options, message, tmp_path):
    options = dict(model="run", videos=(tmp_path,)) | options
    if "out" in options:
        options["out"] = tmp_path / options["out"]
    with pytest.raises(ValueError, match=message):
        PredictConfig(**options)
