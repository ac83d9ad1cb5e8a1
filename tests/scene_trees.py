"""Small trees in the layouts of AVSBench, Flickr-SoundNet and VGG-SS, made of Sounding Shapes clips."""

import csv
import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image
from videos import write_video

from avfuse.data import sounding_shapes
from avfuse.data.sounding_shapes.truths import SHAPE_CLASSES

SHAPES = dict(train=3, test=3, seconds=5.0, fps=2, size=64, workers=1, progress=False)


def write_avsbench(root: Path, shapes: Path, subset: str = "v1s", names: tuple[str, ...] = ()) -> list[str]:
    """The clips of a Sounding Shapes data set of 5 s or more in the layout of AVSBench: their names."""
    count = dict(v1s=5, v1m=5, v2=10)[subset]
    rows, uids = [], []
    for split in sounding_shapes.SPLITS:
        for number, entry in enumerate(sounding_shapes.read_manifest(shapes, split)):
            uid = names[len(uids)] if len(uids) < len(names) else f"{split}_{number}"
            folder = root / subset / uid
            (folder / "frames").mkdir(parents=True)
            (folder / "labels_semantic").mkdir()
            frames = sounding_shapes.read_frames(shapes / entry.file)
            masks, _ = sounding_shapes.load_masks(shapes, entry)
            for second in range(count):
                frame = round((second + 0.5) * entry.fps) % len(frames)
                Image.fromarray(frames[frame]).save(folder / f"frames/{second}.jpg", quality=95)
                if second == 0 or (split, subset) != ("train", "v1s"):
                    label = masks[0, frame] * np.uint8(SHAPE_CLASSES.index(entry.shape))
                    Image.fromarray(label.astype(np.uint8)).save(folder / f"labels_semantic/{second}.png")
            write_sound(folder / "audio.wav", sounding_shapes.read_sound(shapes / entry.file))
            rows.append(
                dict(vid=uid, uid=uid, s_min=0, s_sec=0, a_obj=entry.shape, split=split, label=subset)
            )
            uids.append(uid)
    write_metadata(root, rows)
    index = {name: number for number, name in enumerate(SHAPE_CLASSES, start=1)}
    (root / "label2idx.json").write_text(json.dumps(index), encoding="utf-8")
    return uids


def write_metadata(root: Path, rows: list[dict]) -> None:
    with (root / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ("vid", "uid", "s_min", "s_sec", "a_obj", "split", "label"))
        writer.writeheader()
        writer.writerows(rows)


def write_flickr_soundnet(root: Path, shapes: Path, names: tuple[str, ...] = ()) -> list[str]:
    """The middle frames of all clips in the layout of Flickr-SoundNet, boxes by two people: their names."""
    ids = []
    for name in ("frames", "audio", "Annotations"):
        (root / name).mkdir(parents=True)
    for split in sounding_shapes.SPLITS:
        for number, entry in enumerate(sounding_shapes.read_manifest(shapes, split)):
            name = names[len(ids)] if len(ids) < len(names) else f"{split}{number}"
            frames = sounding_shapes.read_frames(shapes / entry.file)
            middle = len(frames) // 2
            Image.fromarray(frames[middle]).save(root / f"frames/{name}.jpg", quality=95)
            write_sound(root / f"audio/{name}.wav", sounding_shapes.read_sound(shapes / entry.file))
            box = sounding_shapes.load_masks(shapes, entry)[1][0, middle] * 256 // entry.size
            boxes = [box.tolist(), (box + 4).tolist()]
            (root / f"Annotations/{name}.xml").write_text(annotation(boxes), encoding="utf-8")
            ids.append(name)
    return ids


def write_vggss(root: Path, shapes: Path) -> list[str]:
    """The same pictures and sounds in the layout of VGG-SS, boxes by one person: their names."""
    names = write_flickr_soundnet(root, shapes, names=tuple(f"{letter * 11}_000030" for letter in "abcdef"))
    entries = []
    for name in names:
        box = ElementTree.parse(root / f"Annotations/{name}.xml").find(".//bbox")
        entries.append({"file": name, "class": "x", "bbox": [[int(at.text) / 256 for at in box[1:]]]})
    shutil.rmtree(root / "Annotations")
    (root / "vggss.json").write_text(json.dumps(entries), encoding="utf-8")
    return names


def write_silent(root: Path, kind: str, pairs: list[tuple[str, str]]) -> None:
    """SLAVC's list of pictures with the sounds of other clips."""
    rows = "".join(f"{picture},{sound},non-sounding\n" for picture, sound in pairs)
    (root / f"{kind}_test_plus_silent.csv").write_text("video,audio,label\n" + rows, encoding="utf-8")


def annotation(boxes: list[list[int]]) -> str:
    """The published format: each person's element holds boxes, whose first child is no corner."""
    people = "".join(
        "<person><bbox><n>{}</n><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bbox></person>".format(
            number, *box
        )
        for number, box in enumerate(boxes)
    )
    return f"<annotation>{people}</annotation>"


def write_sound(path: Path, samples: np.ndarray, sample_rate: int = 16_000) -> None:
    write_video(path, video=False, audio=samples[None], sample_rate=sample_rate, codecs=("", "pcm_s16le"))
