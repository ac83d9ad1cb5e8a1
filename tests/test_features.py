"""Feature files: against the encoder itself, whatever the batch; and what is left out of them."""

import csv
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import relative_error
from videos import write_video

from avfuse import AVEncoder, create_encoder, read_clip
from avfuse.data.check import check
from avfuse.data.clips import ClipDataset
from avfuse.data.find import find_data, list_data
from avfuse.data.shards import shard
from avfuse.data.sounding_shapes.build import generate
from avfuse.features import FEATURES, FeaturesConfig, extract, main, read_features
from avfuse.weight_files import read_metadata, write_safetensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("clips")
    for number in range(3):
        write_video(root / f"{number}.mp4", 3.0 + 0.3 * number)
    write_video(root / "deaf" / "a.mp4", 3.0, audio=False)
    (root / "broken.mp4").write_bytes(b"no video")
    return root


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    create_encoder("tiny").save_pretrained(path)
    return path


def test_a_file_holds_the_features_of_every_clip_that_can_be_read(folder, saved, tmp_path, capsys):
    config = dict(folder=folder, checkpoint=str(saved), tokens=True, workers=0)
    for batch_size in 1, 3:
        out = tmp_path / f"{batch_size}.safetensors"
        main(FeaturesConfig(out=out, batch_size=batch_size, **config))
    assert "1 could not be read" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"1.safetensors", "3.safetensors"}
    umask = os.umask(0o027)
    os.umask(umask)
    assert (tmp_path / "1.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask  # as any file
    tensors, paths = read_features(tmp_path / "1.safetensors")
    assert sorted(paths) == ["0.mp4", "1.mp4", "2.mp4", "deaf/a.mp4"]

    encoder = AVEncoder.from_pretrained(saved)
    kept = find_data(folder, lambda line: None, missing="keep", workers=0).train
    clips = {str(clip.path.relative_to(folder)): clip for clip in kept}
    dataset = ClipDataset([clips[path] for path in paths], encoder.inputs, train=False)
    for row, path in enumerate(paths):
        item, is_deaf = dataset[row], path == "deaf/a.mp4"
        with torch.no_grad():
            output = encoder(item["image"][None], None if is_deaf else item["audio"][None])
        assert bool(tensors["audio_present"][row]) != is_deaf
        for name in FEATURES:
            tokens = getattr(output, name)
            tokens = torch.zeros_like(tensors[f"{name}_tokens"][row])[None] if tokens is None else tokens
            assert relative_error(tensors[f"{name}_tokens"][row], tokens[0]) < 1e-5, (path, name)
            assert relative_error(tensors[name][row], tokens[0].mean(0)) < 1e-5, (path, name)
    others = read_features(tmp_path / "3.safetensors")[0]
    assert all(torch.allclose(others[name].float(), t.float(), atol=1e-5) for name, t in tensors.items())


def test_windows_of_every_clip(saved, tmp_path, capsys):
    """Each row against the encoder on that window of that file; a clip that breaks later is named once."""
    folder, out = tmp_path / "clips", tmp_path / "out.safetensors"
    for name, seconds in ("a/long.mp4", 5.2), ("b/deaf.mp4", 4.0), ("short.mp4", 1.0):
        write_video(folder / name, seconds, audio="deaf" not in name)
    whole = (folder / "a/long.mp4").read_bytes()
    (folder / "hollow.mp4").write_bytes(hollow(whole))
    main(FeaturesConfig(folder=folder, out=out, checkpoint=str(saved), every=0.7, batch_size=2, workers=1))
    assert "1 could not be read: " in capsys.readouterr().out
    tensors, paths = read_features(out)
    encoder = AVEncoder.from_pretrained(saved)
    starts = [round(0.7 * n, 4) for n in range(4)]  # 3 s fit into 5.2 s up to 2.2 s
    assert paths == ["a/long.mp4"] * 4 + ["b/deaf.mp4"] * 2 + ["short.mp4"]
    assert tensors["start"].tolist() == pytest.approx([*starts, *starts[:2], 0.0])
    for row, (path, start) in enumerate(zip(paths, tensors["start"].tolist(), strict=True)):
        with torch.no_grad():
            truth = encoder(*read_clip(folder / path, encoder.inputs, start=start))
        for name in FEATURES:
            expected = torch.zeros(1) if getattr(truth, name) is None else getattr(truth, name)[0].mean(0)
            assert torch.allclose(tensors[name][row], expected, atol=1e-4), (path, start, name)


@pytest.mark.parametrize("every", [None, 1.0])
def test_a_table_has_the_rows_of_the_tensors(saved, tmp_path, every):
    folder = tmp_path / "clips"
    for name, seconds in (("a/long.mp4", 5.0), ("a/short.mp4", 1.0), ("b/deaf.mp4", 4.0)):
        write_video(folder / name, seconds, audio="deaf" not in name)
    options = dict(folder=folder, checkpoint=str(saved), every=every, workers=0)
    for name in "f.safetensors", "f.csv":
        main(FeaturesConfig(out=tmp_path / name, **options))
    tensors, paths = read_features(tmp_path / "f.safetensors")
    with open(tmp_path / "f.csv") as file:
        rows = list(csv.DictReader(file))
    starts = dict(long=[1.0], short=[0.0], deaf=[0.5])
    if every:
        starts = dict(long=[0.0, 1.0, 2.0], short=[0.0], deaf=[0.0, 1.0])
    assert [row["video"] for row in rows] == paths
    files = dict.fromkeys(paths)
    assert [float(row["start"]) for row in rows] == [s for path in files for s in starts[Path(path).stem]]
    for n, row in enumerate(rows):
        assert row["missing"] == ("sound" if "deaf" in row["video"] else "")
        for name in FEATURES:
            cells = [row[f"{name}_{column}"] for column in range(192)]
            if row["missing"] and name == "audio":
                assert cells == [""] * 192
            else:
                assert [float(cell) for cell in cells] == tensors[name][n].tolist()


def test_a_table_names_the_labels(saved, tmp_path):
    folder = generate(tmp_path / "shapes", train=2, test=1, size=64, progress=False)
    main(FeaturesConfig(folder=folder, out=tmp_path / "f.csv", checkpoint=str(saved), workers=0))
    listing = list_data(folder)
    clips = {str(clip.path.relative_to(folder)): clip for _, clip in listing.clips()}
    with open(tmp_path / "f.csv") as file:
        for row in csv.DictReader(file):
            labels = {f"label_{n}": listing.classes[n][k] for n, k in clips.pop(row["video"]).labels.items()}
            assert len(labels) == 2 and labels.items() <= row.items()
    assert not clips


def test_means_over_windows_of_every_clip(saved, tmp_path):
    """Each row against the encoder on ten windows of that file; the file says what its rows are."""
    folder, out, seconds = tmp_path / "clips", tmp_path / "out.safetensors", {"a.mp4": 5.3, "deaf.mp4": 4.3}
    for name in seconds:
        write_video(folder / name, seconds[name], audio=name != "deaf.mp4")
    main(FeaturesConfig(folder=folder, out=out, checkpoint=str(saved), windows=10, workers=0))
    tensors, paths = read_features(out)
    encoder = AVEncoder.from_pretrained(saved)
    assert sorted(paths) == [*seconds]
    for row, path in enumerate(paths):
        starts = [n * (seconds[path] - 3) / 9 for n in range(10)]
        with torch.no_grad():
            outputs = [encoder(*read_clip(folder / path, encoder.inputs, start=start)) for start in starts]
        for name in FEATURES:
            tokens = [getattr(output, name) for output in outputs if getattr(output, name) is not None]
            mean = torch.stack([t[0].mean(0) for t in tokens]).mean(0) if tokens else torch.zeros(1)
            assert torch.allclose(tensors[name][row], mean, atol=1e-4), (path, name)
    assert read_metadata(out)["protocol"] == "10 windows of 3.0 s, features averaged, middle frame"
    main(FeaturesConfig(folder=folder, out=out, checkpoint=str(saved), every=0.5, workers=0))
    assert read_metadata(out)["protocol"] == "1 window of 3.0 s, middle frame, every 0.5 s"


def hollow(video: bytes) -> bytes:
    """Headers as they were, zeros where the pictures and the sound were."""
    start = video.index(b"mdat") + 4
    size = int.from_bytes(video[start - 8 : start - 4], "big") - 8
    return video[:start] + bytes(size) + video[start + size :]


def test_another_number_of_frames(folder, tmp_path):
    """They are those of the encoder itself, given so many of each window."""
    path, settings = tmp_path / "model", dict(checkpoint=str(tmp_path / "model"), workers=0)
    encoder = create_encoder("tiny", frames=4, pair_bias="time").eval()
    torch.nn.init.normal_(encoder.frame_embed)
    encoder.save_pretrained(path)
    for frames, read in (0, 4), (2, 2):
        main(FeaturesConfig(folder=folder, out=tmp_path / "f.safetensors", frames=frames, **settings))
        tensors, paths = read_features(tmp_path / "f.safetensors")
        row = paths.index("1.mp4")
        clip = read_clip(folder / "1.mp4", replace(encoder.inputs, image_frames=read))
        with torch.no_grad():
            tokens = encoder(*clip)
        assert tokens.image.shape[1] == read == tensors["frames_shown"][row]
        for name in FEATURES:
            expected = getattr(tokens, name)[0].flatten(0, -2).mean(0)
            assert relative_error(tensors[name][row], expected) < 1e-5, (frames, name)
    assert "2 frames" in read_metadata(tmp_path / "f.safetensors")["protocol"]


def test_checked_folders_and_shards_are_read_too(folder, saved, tmp_path, capsys):
    checked, shards = tmp_path / "checked", tmp_path / "shards"
    shutil.copytree(folder, checked)
    check(checked, progress=False, workers=0)
    shard(checked, shards, progress=False, workers=0)
    features, named = [], []
    for root in folder, checked, shards:
        out = tmp_path / f"{root.name}.safetensors"
        main(FeaturesConfig(folder=root, out=out, checkpoint=str(saved), workers=0))
        tensors, paths = read_features(out)
        assert len(paths) == 4 and ("1 could not be read" in capsys.readouterr().out) == (root != shards)
        order = tensors["fusion"][:, 0].argsort()  # shards deal clips out in an order of their own
        features.append({name: tensor[order] for name, tensor in tensors.items()})
        named.append([paths[n] for n in order.tolist()])  # in shards, too, as they were before
    assert named[0] == named[1] == named[2] and all(path.endswith(".mp4") for path in named[0])
    for other in features[1:]:
        assert other.keys() == features[0].keys()
        for name, tensor in features[0].items():
            torch.testing.assert_close(other[name], tensor, atol=1e-5, rtol=1e-5)


def test_clips_to_test_on_follow_those_to_train_on(folder, saved, tmp_path):
    for split, name in (("train", "0.mp4"), ("train", "1.mp4"), ("test", "2.mp4")):
        (tmp_path / split).mkdir(exist_ok=True)
        shutil.copy(folder / name, tmp_path / split)
    out = tmp_path / "out.safetensors"
    main(FeaturesConfig(folder=tmp_path, out=out, checkpoint=str(saved), workers=0))
    assert read_features(out)[1] == ["train/0.mp4", "train/1.mp4", "test/2.mp4"]


def test_nothing_is_left_of_a_file_that_could_not_be_written(folder, saved, tmp_path, monkeypatch):
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"from before")

    def full_disk(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr("avfuse.weight_files.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        main(FeaturesConfig(folder=folder, out=out, checkpoint=str(saved), workers=0))
    assert [path.name for path in tmp_path.iterdir()] == [out.name] and out.read_bytes() == b"from before"


def test_names_that_are_not_unicode(folder, saved, tmp_path):
    odd = Path(os.fsdecode(bytes(tmp_path) + b"/odd\xff"))
    odd.mkdir()
    (odd / os.fsdecode(b"\xfe.mp4")).write_bytes((folder / "0.mp4").read_bytes())
    main(FeaturesConfig(folder=odd, out=tmp_path / "out.safetensors", checkpoint=str(saved), workers=0))
    assert [os.fsencode(path) for path in read_features(tmp_path / "out.safetensors")[1]] == [b"\xfe.mp4"]


def test_where_nothing_can_be_written_nothing_is_computed(saved, tmp_path, monkeypatch):
    (tmp_path / "a.safetensors").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setattr("avfuse.features.load_encoder", lambda path: pytest.fail("the work began"))
    for out in "a.safetensors", "file/a.safetensors", "/proc/a.csv", f"{'a' * 250}.csv":
        with pytest.raises(ValueError, match=f"--out .*{out} cannot be written: "):
            main(FeaturesConfig(folder=tmp_path, out=tmp_path / out, checkpoint=str(saved)))
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors", "file"}


def test_mistakes_are_explained(folder, saved, tmp_path):
    for wrong, message in (
        (dict(out=tmp_path / "out.pt"), "--out must end in .safetensors, .csv, .parquet, got"),
        (dict(out=tmp_path / "out.csv", tokens=True), "--tokens are more than a table holds"),
        (dict(every=0.0), "--every must be a positive number of seconds, 0.001 at least, got 0.0"),
        (dict(folder=tmp_path / "none"), "--data .*none does not exist"),
        (dict(windows=0), "--windows must be positive, got 0"),
        (dict(windows=2, every=1.0), "--windows 2 are averaged: leave out --every and --tokens"),
        (dict(windows=2, tokens=True), "--windows 2 are averaged: leave out --every and --tokens"),
        (dict(out=None), "--data and --out are both needed"),
        (dict(paths=(folder, tmp_path)), "give FOLDER OUT, or --data and --out, got "),
    ):
        options = dict(folder=folder, out=tmp_path / "out.safetensors", checkpoint=str(saved)) | wrong
        with pytest.raises(ValueError, match=message):
            FeaturesConfig(**options)
    with pytest.raises(ValueError, match="cannot be read"):
        read_features(folder / "broken.mp4")
    nested = tmp_path / "nested.safetensors"
    write_safetensors(nested, {"image": torch.zeros(1)}, dict(paths="[" * 100_000))
    with pytest.raises(ValueError, match="cannot be read: RecursionError"):
        read_features(nested)
    with pytest.raises(ValueError, match="batch_size"):
        extract(create_encoder("tiny"), [], batch_size=0)
    with pytest.raises(ValueError, match="windows=2 are averaged: neither every nor tokens"):
        extract(create_encoder("tiny"), [], windows=2, every=1.0)
