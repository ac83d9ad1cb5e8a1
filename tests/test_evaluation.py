"""Embeddings for MTEB: those of the same files read by avfuse, and what the package itself makes of them."""

import socket
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import make_encoder
from PIL import Image
from scipy.io import wavfile
from sklearn.base import clone
from torch.nn.functional import normalize
from torch.utils.data import DataLoader
from videos import chirp, write_video

from avfuse import InputSettings, read_clip
from avfuse.data.transforms import evaluation_image
from avfuse.evaluation import Embedder, mteb_model
from avfuse.features import FEATURES
from avfuse.training.features import pool

INPUTS = InputSettings(image_size=24, mel_bins=16, audio_seconds=1.0, hop=400)


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return make_encoder(inputs=INPUTS).float().eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Clips of other lengths, rates of frames and sound, and channels; one shorter than a window."""
    folder = tmp_path_factory.mktemp("clips")
    sounds = [(0.6, 16_000, 1), (2.0, 44_100, 2), (3.1, 48_000, 6), (1.0, 22_050, 1)]
    return [
        write_video(
            folder / f"{n}.mp4",
            seconds,
            fps=5 + 4 * n,
            size=(64 - 16 * n + 16, 48),
            sample_rate=rate,
            audio=np.stack(
                [chirp(np.arange(round(seconds * rate)) / rate) * 0.7**c for c in range(channels)]
            ),
        )
        for n, (seconds, rate, channels) in enumerate(sounds)
    ]


def embed(encoder, rows, features=FEATURES, batch_size=3):
    task = SimpleNamespace(name="Clips")
    options = dict(task_metadata=task, hf_split="test", hf_subset="default", show_progress_bar=False)
    return Embedder(encoder, features, None).encode(DataLoader(rows, batch_size), **options)


@torch.no_grad()
def expected(encoder, image, audio):
    """One embedding by hand: (3 D,)"""
    pooled = pool(encoder(image, audio))
    parts = [pooled.get(name, torch.zeros(1, encoder.fusion_tokens.shape[-1])) for name in FEATURES]
    return torch.cat([normalize(part, dim=-1) for part in parts], dim=-1)[0].numpy()


def rows_of(files, kind):
    """As a data set hands them over: as paths, bytes, or undecoded or to be decoded by `datasets`."""
    rows = [{"video": str(path), "audio": str(path)} for path in files]
    if kind == "path":
        return rows
    rows = [{name: open(path, "rb").read() for name, path in row.items()} for row in rows]
    if kind == "bytes":
        return rows
    datasets = pytest.importorskip("datasets", reason="needs avfuse[eval]")
    rows = datasets.Dataset.from_list(rows)
    decode = kind == "decoded"
    rows = rows.cast_column("video", datasets.Video(decode=decode))
    return rows.cast_column("audio", datasets.Audio(decode=decode, sampling_rate=8_000))


@pytest.mark.parametrize("kind", ["path", "bytes", "undecoded", "decoded"])
def test_an_embedding_is_that_of_the_same_file(encoder, files, kind):
    embeddings = embed(encoder, rows_of(files, kind))
    assert embeddings.dtype == np.float32
    for path, embedding in zip(files, embeddings, strict=True):
        assert embedding == pytest.approx(expected(encoder, *read_clip(path, INPUTS)), abs=1e-5)
    assert np.abs(embeddings[:, None] - embeddings[None]).max(-1)[~np.eye(4, dtype=bool)].min() > 1e-3


def test_a_modality_that_is_not_there_has_zeros(encoder, files):
    rows = [{"video": None, "audio": str(files[1])}, {"video": str(files[2]), "audio": None}]
    rows += [{"audio": str(files[1])}, {"video": str(files[2])}, {"video": files[0], "audio": files[0]}]
    embeddings = embed(encoder, rows)
    sound, pictures = read_clip(files[1], INPUTS).audio, read_clip(files[2], INPUTS).image
    assert embeddings[0] == pytest.approx(expected(encoder, None, sound), abs=1e-5)
    assert embeddings[1] == pytest.approx(expected(encoder, pictures, None), abs=1e-5)
    assert (embeddings[0] == embeddings[2]).all() and (embeddings[1] == embeddings[3]).all()
    width = embeddings.shape[1] // 3
    assert not embeddings[0, :width].any() and not embeddings[1, width:-width].any()
    of_fusion = embed(encoder, rows, features=("fusion",))
    assert of_fusion == pytest.approx(embeddings[:, -width:], abs=1e-6)
    with pytest.raises(ValueError, match="Clips: some rows have no image"):
        embed(encoder, rows, features=("image",))


def test_the_pictures_are_those_of_the_window_of_the_sound(encoder, files, tmp_path):
    """Also where the file that sounds ends before, or after, the one that shows."""
    muted = write_video(tmp_path / "muted.mp4", 3.0, audio=False)
    for seconds in 1.4, 5.0:
        alone = write_video(
            tmp_path / f"{seconds}.wav", seconds, video=False, codecs=("libx264", "pcm_s16le")
        )
        (embedding,) = embed(encoder, [{"video": str(muted), "audio": str(alone)}])
        start = (seconds - 1) / 2
        image, audio = read_clip(muted, INPUTS, start=start).image, read_clip(alone, INPUTS).audio
        assert embedding == pytest.approx(expected(encoder, image, audio), abs=1e-5)


def test_arrays_are_read_as_files_of_them(encoder, tmp_path):
    rows, paths = [], []
    for n, (rate, channels) in enumerate([(16_000, 1), (44_100, 2), (8_000, 1), (48_000, 6)]):
        sound = np.float32([chirp(np.arange(2 * rate) / rate) * 0.8**c for c in range(channels)])
        sound = sound[0] if channels == 1 else sound
        paths.append(tmp_path / f"{n}.wav")
        wavfile.write(paths[-1], rate, sound.T)
        array = (sound, sound.astype(float), sound.tolist(), torch.from_numpy(sound))[n]
        rows.append({"audio": {"array": array, "sampling_rate": rate, "path": None}})
    for path, embedding in zip(paths, embed(encoder, rows), strict=True):
        sound = read_clip(path, INPUTS).audio
        assert embedding == pytest.approx(expected(encoder, None, sound), abs=1e-5)


def test_pictures_may_have_sound(encoder, files):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)
    picture, sound = Image.fromarray(pixels), str(files[1])
    rows = [{"image": picture}, {"image": picture.convert("RGBA")}, {"image": picture, "audio": sound}]
    image = evaluation_image(torch.from_numpy(pixels).permute(2, 0, 1), INPUTS)[None]
    sounds = None, None, read_clip(sound, INPUTS).audio
    for audio, embedding in zip(sounds, embed(encoder, rows), strict=True):
        assert embedding == pytest.approx(expected(encoder, image, audio), abs=1e-5)


def test_several_frames(files):
    encoder = make_encoder(frames=3, inputs=replace(INPUTS, image_frames=3)).float().eval()
    still = np.full((40, 50, 3), 99, np.uint8)
    rows = [{"video": str(files[0])}, {"video": str(files[1]), "audio": str(files[1])}]
    embeddings = embed(encoder, [*rows, {"image": Image.fromarray(still)}])
    for row, embedding in zip(rows, embeddings[:2], strict=True):
        image, audio = read_clip(row["video"], encoder.inputs)
        audio = audio if "audio" in row else None
        assert embedding == pytest.approx(expected(encoder, image, audio), abs=1e-5)
    image = evaluation_image(torch.from_numpy(still).permute(2, 0, 1), encoder.inputs)
    image = image.expand(1, 3, -1, -1, -1)
    assert embeddings[2] == pytest.approx(expected(encoder, image, None), abs=1e-5)


@pytest.mark.parametrize(
    "row, problem",
    [
        ({"text": "a dog"}, "avfuse embeds no text, and .* got text"),
        ({"text": "a dog", "video": "x"}, "avfuse embeds no text, and .* got text, video"),
        ({"video": None, "label": 1}, "avfuse embeds no text, and .* got label"),
        ({"image": Image.new("L", (8, 8)), "video": "x"}, "one of image and video .* got image, video"),
        ({"image": Image.new("F", (8, 8))}, "row 0 .* 8 bits a channel, got mode F"),
        ({"image": Image.new("I;16", (8, 8))}, "row 0 .* 8 bits a channel, got mode I;16"),
        ({"video": "no\nwhere.mp4"}, "row 0 cannot be read: cannot be opened: there is no such file"),
        ({"audio": b"nonsense"}, "row 0 cannot be read: cannot be opened: it is text"),
        ({"audio": {"array": np.full(16_000, np.nan), "sampling_rate": 16_000}}, "its sound is not finite"),
        ({"audio": {"array": np.zeros(0), "sampling_rate": 16_000}}, "row 0 cannot be read: "),
        (
            {"audio": {"array": np.zeros((9, 2), "i2"), "sampling_rate": 9}},
            r"row 0 .* 9 Hz and shape \(9, 2\)",
        ),
        ({"audio": {"array": np.zeros(9, "f4"), "sampling_rate": 0}}, r"row 0 .* 0 Hz and shape \(9,\)"),
        ({"video": torch.zeros(4, 3, 8, 8)}, "row 0 .* video must be a file or .* got Tensor"),
        ({"image": np.zeros((8, 8, 3))}, "row 0 .* image must be a picture of PIL, got ndarray"),
        ({"audio": {"sampling_rate": 9}}, r"row 0 .* audio must be a file or .* got \['sampling_rate'\]"),
        ({"audio": {"bytes": None, "path": None}}, "row 0 .* audio must be a file or .* got dict"),
        ({"audio": {"array": np.zeros(9)}}, r"row 0 .* audio must be a file or .* got \['array'\]"),
    ],
)
def test_rows_that_cannot_be_embedded_are_named(encoder, row, problem):
    with pytest.raises(ValueError, match=f"Clips: .*{problem}"):
        embed(encoder, [row])


def test_a_file_without_what_it_is_for_is_named(encoder, tmp_path):
    muted = write_video(tmp_path / "muted.mp4", 1.0, audio=False)
    sound = write_video(tmp_path / "sound.mp4", 1.0, video=False)
    for row, problem in (({"audio": muted}, "has no sound"), ({"video": sound}, "its video has no pic")):
        with pytest.raises(ValueError, match=f"row 0 cannot be read: {problem}"):
            embed(encoder, [row])


def test_similarities_are_cosines(encoder):
    one, other = torch.randn(2, 3, 4, dtype=torch.float64).numpy()
    lengths = np.linalg.norm(one, axis=1)[:, None] * np.linalg.norm(other, axis=1)
    cosines, model = one @ other.T / lengths, Embedder(encoder, FEATURES, None)
    assert model.similarity(one, other).numpy() == pytest.approx(cosines, abs=1e-6)
    pairwise = model.similarity_pairwise(one, other).numpy()
    assert pairwise == pytest.approx(cosines.diagonal(), abs=1e-6)


def test_without_the_package_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(ValueError, match=r'mteb_model needs mteb, pip install "avfuse\[mteb\]"'):
        mteb_model("runs/demo")


# --- the package --------------------------------------------------------------------------------------------


@pytest.fixture
def mteb(monkeypatch):
    """The package itself, cut off from the network."""
    package = pytest.importorskip("mteb", reason="needs avfuse[mteb]")

    def refuse(*_):
        raise AssertionError("a test asks the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return package


@pytest.fixture
def model(mteb, encoder, tmp_path):
    encoder.save_pretrained(tmp_path / "ours")
    return mteb_model(tmp_path / "ours")


def metadata(mteb, name, kind, category, modalities, score):
    return mteb.TaskMetadata(
        name=name,
        description="Generated clips.",
        dataset=dict(path="none", revision="none"),
        type=kind,
        category=category,
        modalities=modalities,
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score=score,
    )


def evaluate(mteb, model, task):
    options = dict(batch_size=3, show_progress_bar=False)
    (result,) = mteb.evaluate(model, task, cache=None, encode_kwargs=options).task_results
    return result.scores["test"][0]


@pytest.mark.parametrize("columns", [("video",), ("audio",), ("video", "audio")])
def test_it_classifies(mteb, model, encoder, files, columns):
    """Clips that its classifier has seen, as that classifier does with embeddings by hand."""
    from datasets import DatasetDict

    labels = [0, 1, 1, 0]

    class Clips(mteb.abstasks.AbsTaskClassification):
        metadata = metadata(mteb, "Clips", "VideoClassification", "v2c", [*columns], "accuracy")
        input_column_name = columns if len(columns) > 1 else columns[0]
        n_experiments, samples_per_label = 1, 4

        def load_data(self, **_):
            rows = rows_of(files, "decoded").add_column("label", labels)
            self.dataset = DatasetDict(train=rows, test=rows)
            self.data_loaded = True

    clips = [read_clip(path, INPUTS) for path in files]
    given = [
        (c.image if "video" in columns else None, c.audio if "audio" in columns else None) for c in clips
    ]
    ours = np.stack([expected(encoder, *clip) for clip in given])
    accuracy = clone(Clips.evaluator_model).fit(ours, labels).score(ours, labels)
    assert evaluate(mteb, model, Clips())["accuracy"] == accuracy > 0.5


def test_it_retrieves_sounds_by_pictures(mteb, model, encoder, files):
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData

    class Sounds(AbsTaskRetrieval):
        metadata = metadata(mteb, "Sounds", "Any2AnyRetrieval", "v2a", ["video", "audio"], "recall_at_1")

        def load_data(self, **_):
            rows = rows_of(files, "decoded").add_column("id", [*"0123"])
            split = RetrievalSplitData(
                queries=rows.select_columns(["id", "video"]),
                corpus=rows.select_columns(["id", "audio"]),
                relevant_docs={n: {n: 1} for n in "0123"},
                top_ranked=None,
            )
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    clips = [read_clip(path, INPUTS) for path in files]
    pictures = torch.tensor(np.stack([expected(encoder, image, None) for image, _ in clips]))
    sounds = torch.tensor(np.stack([expected(encoder, None, audio) for _, audio in clips]))
    cosines = normalize(pictures, dim=-1) @ normalize(sounds, dim=-1).T
    assert model.similarity(pictures, sounds.numpy()) == pytest.approx(cosines.numpy(), abs=1e-6)
    right = (cosines.argmax(1) == torch.arange(4)).float().mean().item()
    assert evaluate(mteb, model, Sounds())["recall_at_1"] == pytest.approx(right)


def test_it_tells_what_it_is(mteb, model, encoder, tmp_path):
    from mteb.models.models_protocols import EncoderProtocol

    meta = model.mteb_model_meta
    assert isinstance(model, EncoderProtocol)
    assert meta.name == "avfuse/ours" and meta.similarity_fn_name == "cosine"
    assert meta.modalities == ["image", "audio", "video"] and meta.license is None
    assert meta.embed_dim == 3 * encoder.fusion_tokens.shape[-1]
    assert meta.n_parameters == sum(weight.numel() for weight in encoder.parameters())
    other = make_encoder(inputs=INPUTS).float()
    other.facts = dict(licence="MIT")
    other.save_pretrained(tmp_path / "theirs")
    theirs = mteb_model(tmp_path / "theirs", features=["fusion", "audio"])
    assert theirs.features == ("audio", "fusion")  # results of other weights and features are others
    assert theirs.mteb_model_meta.revision != meta.revision and theirs.mteb_model_meta.experiment_kwargs
    assert (theirs.mteb_model_meta.embed_dim, theirs.mteb_model_meta.license) == (
        2 * encoder.fusion_tokens.shape[-1],
        "mit",
    )
    with pytest.raises(ValueError, match="features must be of image, audio, fusion, got"):
        mteb_model(tmp_path / "ours", features=("text",))
