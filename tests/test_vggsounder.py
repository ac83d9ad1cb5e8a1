"""Logits for VGGSounder: what its package makes of them, and classes and clips that are not its own."""

import csv
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from trees import plant
from videos import write_video

from avfuse import read_clip
from avfuse.data.clips import Clip
from avfuse.tasks import vggsounder
from avfuse.tasks.classifier import load_classifier
from avfuse.tasks.classify import Classification, ClassifyConfig
from avfuse.training.loop import program
from avfuse.training.task import Task

KINDS = ("a", "v", "av")


class Labels(dict):
    """In the place of the package: the labels of a clip by its name."""

    def get_all_labels(self):
        return ["tuba", "cat", "bell, gong"]


@pytest.fixture
def labels(monkeypatch):
    labels = Labels({"aaaaaaaaaaa_000030": ["cat"], "-bbbbbbbb_b_000000": ["tuba"]})
    monkeypatch.setattr(vggsounder, "labels", lambda: labels)
    return labels


@pytest.fixture
def package():
    """The package itself, and the labels of all its clips."""
    package = pytest.importorskip("vggsounder.benchmark", reason="needs avfuse[eval]")
    return package, vggsounder.labels()


def some_clips(labels) -> list[str]:
    """Two clips with labels of each kind, of which the package wants some."""
    names = []
    for kind in "a only", "v only", "av":
        labels.set_modality(kind)
        names += [name for name in labels.keys() if name not in names][:2]
    labels.set_modality("all")
    return names


# --- what is written ----------------------------------------------------------------------------------------


def test_logits_are_written_by_name_in_the_order_of_the_package(labels, tmp_path):
    clips = [Clip(Path(f"x/{name}_000040.mp4")) for name in labels] + [Clip(Path("ccccccccccc_000001.mp4"))]
    order = vggsounder.columns(("bell, gong", "cat", "tuba"), clips)
    assert order == [2, 1, 0]
    rows = [
        {"index": np.array(n), "": both, "image_input": both + 1, "audio_input": both + 2}
        for n, both in ((0, np.float32([0.5, 1, 2])), (2, np.float32([3, 4, 5])))
    ]
    said = vggsounder.write(tmp_path / "new" / "a.pkl", clips, rows, order)
    assert said == "1 of the 2 clips of VGGSounder"
    assert pickle.loads((tmp_path / "new" / "a.pkl").read_bytes()) == {
        "aaaaaaaaaaa_000030": {"logits": {"a": [4.0, 3.0, 2.5], "v": [3.0, 2.0, 1.5], "av": [2.0, 1.0, 0.5]}},
        "ccccccccccc_000001": {"logits": {"a": [7.0, 6.0, 5.0], "v": [6.0, 5.0, 4.0], "av": [5.0, 4.0, 3.0]}},
    }


@pytest.mark.parametrize(
    "classes, name, problem",
    [
        (("bell, gong", "cat", "tubas"), "aaaaaaaaaaa_000030", "VGGSounder has no class 'tubas'"),
        (("bell_ gong", "cat", "tuba"), "aaaaaaaaaaa_000030", "VGGSounder has no class 'bell_ gong'"),
        (("cat", "tuba"), "aaaaaaaaaaa_000030", "VGGSounder has 'bell, gong', which --data has not"),
        (("bell, gong", "cat", "tuba"), "clip-1", "clip-1.mp4 is not named as clips of VGGSound"),
        (("bell, gong", "cat", "tuba"), "aaaaaaaaaaa_30", "aaaaaaaaaaa_30.mp4 is not named as"),
        (("bell, gong", "cat", "tuba"), "aaaaaaaaaaa_000031", "labels for none of the test clips"),
    ],
)
def test_other_classes_and_clips_are_named(labels, classes, name, problem):
    with pytest.raises(ValueError, match=f"--export: .*{problem}"):
        vggsounder.columns(classes, [Clip(Path(f"{name}.mp4"))])


def test_without_the_package_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "vggsounder", None)
    with pytest.raises(
        ValueError, match=r'--export takes classes from vggsounder, pip install "avfuse\[eval\]"'
    ):
        vggsounder.columns(("cat", "tuba"), [])


def test_options_that_leave_logits_out_are_refused(tmp_path):
    for wrong in dict(modalities="image"), dict(missing="keep"), dict(features=("audio",)):
        with pytest.raises(ValueError, match="--export is by image alone, by sound alone and by both"):
            ClassifyConfig(export=Path("a.pkl"), **wrong)
    for path in Path("a.npz"), tmp_path:
        with pytest.raises(ValueError, match="--export must be a .pkl file, got"):
            ClassifyConfig(export=path)
    assert ClassifyConfig(export=Path("a.pkl"), features=("image", "audio")).export == Path("a.pkl")


def test_a_file_that_cannot_be_written_is_refused_before_the_data_are_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(Task, "find", lambda *_: pytest.fail("the work began"))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="--export .*/file/a.pkl cannot be written: "):
        Classification.find(ClassifyConfig(export=tmp_path / "file/a.pkl"), print)


# --- what its package makes of it ---------------------------------------------------------------------------


def test_its_benchmark_and_confusion_of_made_up_logits(package, tmp_path):
    """Sound is always right, the picture never, both together for every other clip."""
    benchmark, labels = package
    names, classes = some_clips(labels), sorted(labels.get_all_labels())
    clips = [Clip(Path(f"{name}.mp4")) for name in names]
    rows = []
    for n, name in enumerate(names):
        right = np.float32([5 * (label == labels[name].labels[0]) for label in classes])
        wrong = np.float32(
            [5 * (label == next(c for c in classes if c not in labels[name].labels)) for label in classes]
        )
        rows.append({"index": n, "audio_input": right, "image_input": wrong, "": wrong if n % 2 else right})
    vggsounder.write(tmp_path / "ours.pkl", clips, rows, vggsounder.columns(classes, clips))
    options = dict(vggsounder=labels, verbose=False)
    metrics = [("mu", [*KINDS]), ("hit_rate", [*KINDS])]
    table = benchmark.benchmark(str(tmp_path), {"ours": "avfuse"}, metrics, **options)
    found = {kind: table.loc["avfuse", ("mu", kind)] for kind in KINDS}
    assert found == {"a": pytest.approx(50), "v": 0, "av": 0}
    each = benchmark.compute_all_results(str(tmp_path), aggregate_modality_confusion=False, **options)
    confused = dict(zip([n for n in labels.keys() if n in names], each["ours"]["a"]["mu"], strict=True))
    assert [confused[name] for name in names] == [n % 2 == 1 for n in range(len(names))]


@pytest.mark.usefixtures("undrawn")
def test_a_run_exports_what_its_benchmark_reads(package, tmp_path):
    benchmark, labels = package
    names, data, export = some_clips(labels), tmp_path / "vgg", tmp_path / "models" / "ours.pkl"
    rows = [(f"train{number:06d}", 0, label, "train") for number, label in enumerate(labels.get_all_labels())]
    rows += [(name[:11], int(name[12:]), labels[name].labels[0], "test") for name in names]
    for n, (clip, start, label, _) in enumerate(rows[:3] + rows[-len(names) :]):
        folder = label.translate(str.maketrans(" (),", "____"))
        source = write_video(tmp_path / f"{n}.mp4", 3.0, fps=5 + n)
        plant(source, data / "clips" / folder / f"{clip}_{start:06d}_{start + 10:06d}.mp4")
    (data / "annotations").mkdir()
    with open(data / "annotations/vggsound.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    options = dict(checkpoint="none", data=data, run=tmp_path / "run", workers=0, batch_size=3)
    assert program(ClassifyConfig(epochs=1, warmup_epochs=0, **options), Classification) == 0
    assert not export.exists()
    # The same command with --export judges once more, and writes.
    again = ClassifyConfig(epochs=1, warmup_epochs=0, export=export, **options)
    assert program(again, Classification) == 0

    model, logits = load_classifier(tmp_path / "run"), pickle.loads(export.read_bytes())
    assert {*logits} == {*names} and model.class_names == tuple(sorted(labels.get_all_labels()))
    hits = dict.fromkeys(KINDS, 0)
    for path in data.glob("clips/*/*.mp4"):
        if (name := path.name[:18]) not in names:
            continue
        image, audio = read_clip(path, model.encoder.inputs)
        for kind, inputs in zip(KINDS, ((None, audio), (image, None), (image, audio)), strict=True):
            with torch.no_grad():
                by_name = dict(zip(model.class_names, model(*inputs).logits[0].tolist(), strict=True))
            expected = [by_name[label] for label in labels.get_all_labels()]
            assert logits[name]["logits"][kind] == pytest.approx(expected, abs=1e-5)
            labels.set_modality(kind)
            hits[kind] += max(by_name, key=by_name.get) in (labels[name].labels if name in labels else ())
    metrics, counts = [("hit_rate", [*KINDS])], {}
    table = benchmark.benchmark(
        str(export.parent), {"ours": "avfuse"}, metrics, vggsounder=labels, verbose=False
    )
    for kind in KINDS:
        labels.set_modality(kind)
        counts[kind] = sum(name in labels for name in names)
        assert table.loc["avfuse", ("hit_rate", kind)] == pytest.approx(100 * hits[kind] / counts[kind])
    assert json.loads((tmp_path / "run/results.json").read_text())["coverage"]["judged"] == len(names)
