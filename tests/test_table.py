"""A table of clips gives back what a list would, in a fraction of the memory."""

import pickle
from pathlib import Path

import pytest
import torch

from avfuse.data.clips import ClipDataset, ClipSampler
from avfuse.data.container import ClipError, Part, Streams
from avfuse.data.table import Clip, ClipTable
from avfuse.inputs import InputSettings

CLASSES = {"kind": ("a", "b", "c"), "several": ("x", "y")}


def clips(count: int = 20) -> list[Clip]:
    """Of all kinds: scanned or not, files or members of archives, with odd names."""
    made = []
    for n in range(count):
        name = ("plain", "ünï cødé\n", "a\udcffb", "-")[n % 4] + f"{n}.mp4"
        part = Part(Path(f"/data/shard{n % 3}.tar"), 512 * n, 7 * n + 1) if n % 5 == 4 else None
        made.append(
            Clip(
                path=Path(f"/data/folder{n % 3}", name),
                labels={"kind": n % 3, "several": tuple(range(n % 3))},
                streams=None if n % 4 == 1 else Streams(bool(n % 2), n % 3 > 0, n / 7, 25 / (1 + n)),
                part=part,
                size=part.size if part else (None, 0, 10**11)[n % 3],
            )
        )
    return made


def test_it_reads_like_a_list():
    listed = clips()
    table = ClipTable(listed, classes=CLASSES)
    assert list(table) == listed and len(table) == 20 and table[-1] == listed[-1]
    assert list(table[3:15:4]) == listed[3:15:4] and table[:5].classes == CLASSES
    assert list(ClipTable(listed[:4])) == listed[:4] and ClipTable(listed[:4]).shards is None
    copy = pickle.loads(pickle.dumps(table))
    assert list(copy) == listed and copy.classes == CLASSES
    with pytest.raises(IndexError):
        table[20]
    assert not ClipTable()


def test_a_clip_takes_a_hundred_bytes():
    """As pickled, which is what each process that reads is sent: a list takes about six times as much."""
    many = ClipTable(
        Clip(Path(f"/data/vggsound/clips/class{n % 309}/{n:011d}_000000_000010.mp4"), {"class": n % 309})
        for n in range(3000)
    )
    assert len(pickle.dumps(many)) < 3000 * 100


def test_clips_that_do_not_go_together():
    table = ClipTable([Clip(Path("a"), {"kind": 1})], classes=CLASSES)
    for labels, message in (
        ({}, r"share their label names, got \['kind'\] for a but \[\] for b"),
        ({"kind": 3}, r"label kind must be in 0..2, got 3 for b"),
        ({"kind": -1}, r"label kind must be in 0..2, got -1 for b"),
        ({"kind": (1,)}, r"label kind must be a number in every clip or a tuple in every clip: b"),
    ):
        with pytest.raises(ValueError, match=message):
            table.append(Clip(Path("b"), labels))
    assert len(table) == 1 and table[0].labels == {"kind": 1}
    several = [Clip(Path("a"), {"kind": (1,)})]
    with pytest.raises(ValueError, match="must be a ClipTable that names the classes of label 'kind'"):
        ClipDataset(several, InputSettings(image_size=32), train=True)


def test_a_clip_does_not_lead_out_of_its_folder(tmp_path):
    (tmp_path / "outside").write_bytes(b"secret")
    root = tmp_path / "root"
    root.mkdir()
    (root / "link.mp4").symlink_to(tmp_path / "outside")
    (root / "loop.mp4").symlink_to(root / "loop.mp4")
    table = ClipTable(
        [
            Clip(root / "link.mp4"),
            Clip(root / "loop.mp4"),
            Clip(root / "a.tar/0.mp4", part=Part(root / "link.mp4", 0, 6)),
            Clip(root / "../outside"),
        ],
        root=root,
    )
    for clip in table:
        with pytest.raises(ClipError, match="leads out of the data folder|cannot be opened"):
            clip.open()


def test_shards_are_read_a_few_at_a_time():
    """Each clip once an epoch; those of one shard near to each other, in another order every epoch."""
    listed = [Clip(Path(f"s{n // 10}.tar/{n}"), part=Part(Path(f"s{n // 10}.tar"), n, 1)) for n in range(400)]
    sampler = ClipSampler(ClipTable(listed), train=True, seed=1)
    orders = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        orders.append([index for _, index in sampler])
        assert sorted(orders[-1]) == list(range(400))
    assert orders[0] != orders[1]
    shards = torch.tensor(orders[0]) // 10
    spans = [(shards == shard).nonzero().flatten() for shard in range(40)]
    assert max(int(span.max() - span.min()) for span in spans) < 8 * 10
    mixed = [len(set(shards[start : start + 20].tolist())) for start in range(0, 400, 20)]
    assert sum(mixed) / len(mixed) > 4  # a batch is not all of one shard
    plain = ClipSampler(ClipTable(Clip(clip.path) for clip in listed), train=True, seed=1)
    assert list(plain) == list(ClipSampler(range(400), train=True, seed=1))  # as it has always been
