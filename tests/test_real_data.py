"""Published data sets, in trees of their layouts, from files on disk to a pretrained model and its tasks."""

import json

import pytest
from trees import audioset, plant, vggsound, videos, write_list

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
