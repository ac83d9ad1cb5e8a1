"""Published data sets, in trees of their layouts, from files on disk to a pretrained model and its tasks."""

import json

import pytest
import torch
from trees import audioset, plant, vggsound, videos, write_list

from avfuse.data.clips import ClipDataset
from avfuse.data.sets import music as reader
from avfuse.tasks.classify import Classification, ClassifyConfig
from avfuse.tasks.separate import SeparateConfig, Separation
from avfuse.train import main
from avfuse.training.loop import program
from avfuse.training.recipes import TrainConfig

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return videos(tmp_path_factory.mktemp("shapes"), 8)


def music(root, sources):
    """Eight solos of two instruments, of which every fifth is to test on."""
    solos = [(f"v{number:010d}", ("cello", "flute")[number % 2]) for number in range(8)]
    write_list(root / reader.LIST, "id,instrument,kind\n" + "".join(f"{v},{i},solo\n" for v, i in solos))
    for (video, instrument), source in zip(solos, sources, strict=True):
        plant(source, root / f"clips/{instrument}/{video}.mp4")
    return root


TINY = dict(epochs=1, warmup_epochs=0, batch_size=2, workers=0)


def results(run) -> dict:
    return json.loads((run / "results.json").read_text())


@pytest.mark.parametrize(("tree", "metric"), [(vggsound, "accuracy"), (audioset, "mAP"), (music, "accuracy")])
def test_from_a_tree_to_a_probe(tree, metric, sources, tmp_path):
    data = tree(tmp_path / "data", sources)
    decoder = dict(decoder_dim=16, decoder_depth=1, decoder_heads=2, fusion_layers=(3,), measure_every=0)
    assert main(TrainConfig(data=data, run=tmp_path / "train", **TINY, **decoder)) == 0
    card = (tmp_path / "train/model/README.md").read_text()
    assert "interactions" in card and "coverage" in card
    config = ClassifyConfig(
        data=data,
        run=tmp_path / "probe",
        checkpoint=str(tmp_path / "train"),
        probe=True,
        drop_path=0.0,
        **TINY,
    )
    assert program(config, Classification) == 0
    found = results(tmp_path / "probe")
    assert metric in found["metrics"]
    judged, expected = found["coverage"]["judged"], found["coverage"]["expected"]
    assert 0 < judged <= expected


def test_solos_are_mixed_and_separated(sources, tmp_path):
    data = music(tmp_path / "data", sources)
    config = SeparateConfig(
        data=data, run=tmp_path / "run", checkpoint="none", decoder_dim=16, pairs=2, **TINY
    )
    assert program(config, Separation) == 0
    assert results(tmp_path / "run")["coverage"] == dict(judged=2, expected=2)


def test_listed_mixtures_are_separated(sources, tmp_path, capsys):
    """By the splits and pairs of published lists, of which a clip and a video are not there."""
    data = music(tmp_path / "data", sources)
    names = [f"{('cello', 'flute')[n % 2]}/v{n:010d}" for n in range(9)]
    write_list(data / reader.TRAIN, "".join(f"/{name}.wav,/{name}.mp4,99\n" for name in names[:4]))
    write_list(data / reader.TESTS[0], "".join(f"/{name}.wav,/{name}.mp4,99\n" for name in names[4:]))
    pairs = [(4, 5), (7, 6), (4, 8), (4, 7), (4, 5)]
    write_list(data / reader.MIXTURES, "".join(f"/{names[a]}.wav, /{names[b]}.wav\n" for a, b in pairs))
    options = dict(data=data, checkpoint="none", decoder_dim=16, **TINY)
    found = Separation.find(SeparateConfig(run=tmp_path / "run", pairs=64, **options), print)
    said = capsys.readouterr().out
    assert "mixtures of test_sep.csv: test 4 of 5 clips found" in said
    assert "1 mixtures lack a clip, such as v0000000008" in said
    assert [(clip.path.stem[-1], clip.other.path.stem[-1]) for clip in found.test] == [
        *(("4", "5"), ("7", "6"), ("4", "7"), ("4", "5"))
    ]
    assert {clip.path.stem[-1] for clip in found.train} == set("0123")
    task = Separation(SeparateConfig(run=tmp_path / "run", **options), found)
    mixed, alone = task.dataset(found.test, train=False), task.dataset([*found.test[:2]], train=False)
    item = mixed[(0, 1)]
    for place, clip in enumerate((found.test[1], found.test[1].other)):
        expected = ClipDataset([clip], task.model.encoder.inputs, train=False)[0]["audio"]
        torch.testing.assert_close(mixed.spectrogram(item["sounds"][place]), expected)
    assert torch.equal(item["audio"], alone[(0, 1)]["audio"])
    assert program(SeparateConfig(run=tmp_path / "run", pairs=64, **options), Separation) == 0
    record = results(tmp_path / "run")
    assert record["split"] == "mixtures of test_sep.csv"
    assert record["coverage"] == dict(judged=4, expected=5)
