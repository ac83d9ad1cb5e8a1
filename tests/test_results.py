"""docs/results.md: its commands as they are pasted, from lists on a disk to the cells of its table."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from scene_trees import SHAPES, write_avsbench, write_flickr_soundnet, write_silent, write_vggss
from trees import audioset, plant, videos, write_list

from avfuse.command import read
from avfuse.data import sounding_shapes
from avfuse.tasks import options
from avfuse.training import recipes
from avfuse.training.settings import checked

PAGE = Path(__file__).parents[1] / "docs/results.md"
PARSERS = {
    "avfuse.train": checked(recipes.parse),
    "avfuse.tasks.classify": checked(options.parse),
    "avfuse.tasks.separate": checked(read(options.SeparateConfig)),
    "avfuse.tasks.segment": checked(read(options.SegmentConfig)),
    "avfuse.tasks.localize": checked(read(options.LocalizeConfig)),
    "avfuse.tasks.retrieve": checked(read(options.RetrieveConfig)),
}
FOLDERS = "vgg music avsbench flickr vggss audioset".split()  # what the page has one put somewhere
LISTED = """\
aaaaaaaaaaa_000000.mp4,playing harp
bbbbbbbbbbb_000030.mp4,"playing violin, fiddle"
-cccccccccc_000007.mp4,dog barking
eeeeeeeeeee_000000.mp4,playing harp
"""
TESTED = """\
kkkkkkkkkkk_000000.mp4,playing harp
lllllllllll_000030.mp4,"playing violin, fiddle"
-mmmmmmmmmm_000007.mp4,dog barking
nnnnnnnnnnn_000000.mp4,playing harp
"""


def blocks() -> list[str]:
    return re.findall(r"^```\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)


def pasted(folder: Path) -> list[list[str]]:
    """What a shell in this folder makes of the page: it runs all but Python, whose arguments are returned."""
    calls = "".join(
        f"{name}() {{ printf '%s\\0' {name} \"$@\" >> calls; echo >> calls; }}\n"
        for name in ("python", "accelerate", "git")
    )
    script = "set -eu\n" + calls + "\n".join(blocks())
    done = subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True, timeout=60)
    assert not done.returncode and not done.stderr, done.stderr
    lines = (folder / "calls").read_text(encoding="utf-8").splitlines()
    return [line.split("\0")[:-1] for line in lines]


@pytest.fixture
def folder(tmp_path):
    """A folder with what one has fetched, as far as the shell looks at it."""
    write_list(tmp_path / "train.csv", LISTED)
    write_list(tmp_path / "test.csv", TESTED)
    rows = [
        (split, *re.match(r"(.{11})_(\d+).mp4,(.*)", line).groups())
        for split, text in (("train", LISTED), ("test", TESTED))
        for line in text.splitlines()
    ]
    write_list(tmp_path / "vggsound.csv", "".join(f"{v},{int(s)},{c},{split}\n" for split, v, s, c in rows))
    for _, video, start, name in rows:
        folder = name.strip('"').replace(" ", "_").replace(",", "_")
        clip = f"{video}_{int(start):06d}_{int(start) + 10:06d}.mp4"
        write_list(tmp_path / f"vgg/clips/{folder}/{clip}", "")
    lists = tmp_path / "released/metadata"
    names = [f"{video}_{start}" for split, video, start, _ in rows if split == "train"]
    write_list(lists / "vggmusic_train.txt", "".join(f"{name},x\n" for name in (*names[:2], names[3])))
    write_list(
        lists / "vgginstruments_train.txt", f"{names[0]},harp\n{names[3]},harp\n{'x' * 11}_000001,harp\n"
    )
    tested = [f"{video}_{start}" for split, video, start, _ in rows if split == "test"]
    pairs = "".join(f"{name},{tested[0]},x,y,Easy\n" for name in (*tested[:2], tested[3]))
    write_list(lists / "vggmusic_eval_ss.csv", "source_1,source_2,class_1,class_2,sep_type\n" + pairs)
    write_list(tmp_path / "music_solo.csv", "id,instrument,kind\n")
    for name in FOLDERS:
        (tmp_path / name).mkdir(exist_ok=True)
    return tmp_path


def test_every_command_is_one_that_avfuse_takes(folder, monkeypatch):
    calls = pasted(folder)
    monkeypatch.chdir(folder)
    runs = set()
    for module, *arguments in (call[call.index("-m") + 1 :] for call in calls if "-m" in call):
        if module == "avfuse.data":
            assert arguments == ["check", "vgg"]
            continue
        config = PARSERS[module](args=arguments, prog=module)
        begun = getattr(config, "checkpoint", "none")
        assert begun in (*runs, "none"), f"{begun} comes later, or from nowhere"
        if module != "avfuse.tasks.classify" or not config.export:
            assert str(config.run) not in runs, f"{config.run} would be of two runs"
        runs.add(str(config.run))
    assert len(runs) == 18


def test_the_lists_of_the_subsets_are_those_rows(folder):
    pasted(folder)
    kept = {
        path.relative_to(folder).as_posix(): path.read_text().splitlines()
        for path in folder.glob("vgg-*/annotations/t*.csv")
    }
    train, test = LISTED.splitlines(), TESTED.splitlines()
    assert kept == {
        "vgg-music/annotations/train.csv": [train[0], train[1], train[3]],
        "vgg-music/annotations/test.csv": [test[0], test[1], test[3]],
        "vgg-instruments/annotations/train.csv": [train[0], train[3]],
        "vgg-instruments/annotations/test.csv": [test[0], test[3]],
    }
    assert len(list(folder.glob("vgg-music/clips/*/*.mp4"))) == 8


def test_every_cell_names_its_command():
    """A cell that was not run names a command, and each command has a cell."""
    page = PAGE.read_text(encoding="utf-8")
    rows = [line.split("|")[-2] for line in page.splitlines() if line.startswith("| ") and "---" not in line]
    named = {name for cell in rows[1:] for name in re.findall(r"`([\w-]+)`", cell)}
    assert named == set(re.findall(r"  # ([\w-]+)$", "\n".join(blocks()), re.M))
    assert all(re.search("not run: (needs|comes)", cell) for cell in rows[1:])


TINY = "--workers 0 --epochs 1 --batch-size 2 --micro-batch 0 --precision no --quiet".split()
SMALL = dict(
    train="--model tiny --decoder-dim 16 --decoder-depth 1 --decoder-heads 2 --measure-every 0".split(),
    separate="--decoder-dim 16 --pairs 2".split(),
    classify="--windows 2".split(),
    retrieve="--workers 0 --quiet".split(),
)


def shrunk(kind: str, arguments: list[str]) -> list[str]:
    """The same command with small settings behind it, and without files that a tree does not have."""
    for option in {"--image-weights", "--audio-weights", "--export"} & {*arguments}:
        at = arguments.index(option)
        arguments = arguments[:at] + arguments[at + 2 :]
    judges = "--epochs 0" if "--epochs 0 " in " ".join(arguments) else ""
    layers = "--fusion-layers 2 3" if "--fusion-layers" in arguments else ""
    tiny = TINY if kind not in ("data", "__main__", "retrieve") else []
    return [*arguments, *tiny, *SMALL.get(kind, ()), *judges.split(), *layers.split()]


@pytest.mark.slow
def test_every_command_runs_on_generated_trees(folder, tmp_path_factory):
    """All of the page in order, on small files and with small settings."""
    made = tmp_path_factory.mktemp("made")
    sources, shapes = videos(made / "clips", 8), sounding_shapes.generate(made / "shapes", **SHAPES)
    for path, source in zip(sorted(folder.glob("vgg/clips/*/*.mp4")), sources, strict=True):
        shutil.copy(source, path)
    solos = [(f"v{n:010d}", ("cello", "flute")[n % 2]) for n in range(8)]
    write_list(folder / "music_solo.csv", "id,instrument\n" + "".join(f"{v},{i}\n" for v, i in solos))
    for (video, instrument), source in zip(solos, sources, strict=True):
        plant(source, folder / f"music/clips/{instrument}/{video}.mp4")
    for name in ("avsbench", "flickr", "vggss", "audioset"):
        (folder / name).rmdir()
    write_avsbench(folder / "avsbench", shapes)
    write_avsbench(folder / "more", shapes, "v1m")
    shutil.copytree(folder / "more/v1m", folder / "avsbench/v1m")
    more = (folder / "more/metadata.csv").read_text().split("\n", 1)[1]
    with (folder / "avsbench/metadata.csv").open("a") as file:
        file.write(more)
    names = write_flickr_soundnet(folder / "flickr", shapes, names=tuple(f"{n}" * 9 for n in range(6)))
    write_list(folder / "flickr/flickr_test.csv", "".join(f"{name},0\n" for name in names[:3]))
    write_silent(folder / "flickr", "flickr", [(names[0], names[2])])
    names = write_vggss(folder / "vggss", shapes)
    write_list(folder / "vggss/vggss_test.csv", "".join(f"{name}\n" for name in names))
    write_silent(folder / "vggss", "vggss", [(names[0], names[4])])
    audioset(folder / "audioset", sources)
    with (folder / "audioset/annotations/eval_segments.csv").open("a") as file:  # retrieval takes several
        file.write('xxxxxxxxxxx, 0.000, 10.000, "/m/04rlf"\nyyyyyyyyyyy, 0.000, 10.000, "/m/04rlf"\n')
    for name in "xx", "yy":
        plant(sources[7], folder / f"audioset/clips/{name}/{name * 5}{name[0]}_000000_000010.mp4")

    for module, *arguments in (call[call.index("-m") + 1 :] for call in pasted(folder) if "-m" in call):
        command = [sys.executable, "-m", module, *shrunk(module.rpartition(".")[2], arguments)]
        environment = os.environ | dict(PYTHONPATH=str(PAGE.parents[1]))
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600
        )
        assert not done.returncode, (command, done.stdout[-2000:], done.stderr[-4000:])
    results = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("runs/*/results.json")}
    assert len(results) == 18
    for name, result in results.items():
        assert result["coverage"]["judged"] > 0, name
    assert results["vggss-localize"]["metrics"].keys() >= {"ciou", "ap", "max_f1"}
