"""Settings of runs: the paper's presets against its text, how batches are dealt out, and what a plan says."""

import json
import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
import torch
from models import remembered

from avfuse.data.manifest import Entry, Header, write
from avfuse.tasks.classify import ClassifyConfig
from avfuse.tasks.classify import parse as parse_classify
from avfuse.tasks.retrieve import RetrieveConfig
from avfuse.tasks.segment import SegmentConfig
from avfuse.train import cli
from avfuse.training import costs, loop
from avfuse.training import plan as plans
from avfuse.training.length import with_enough_steps
from avfuse.training.plan import PUBLISHED_CLIPS, make_model, plan
from avfuse.training.recipes import PRESETS, TrainConfig, parse
from avfuse.training.run_folder import former_settings
from avfuse.training.settings import (
    Schedule,
    checked,
    learning_rate,
    schedule_of,
    settings_of,
    warmup_cosine,
)


@pytest.fixture(scope="module", autouse=True)
def counted_once():
    """The models of the presets are counted in one test after the other, for a second or two each time."""
    with pytest.MonkeyPatch.context() as context:
        for counting in "step_flops", "activation_bytes":
            context.setattr(plans, counting, remembered(getattr(plans, counting), key_of_count))
        yield


def key_of_count(mae, *options):
    return json.dumps([mae.to_config(), mae.encoder.grad_checkpointing, *options])


@pytest.mark.parametrize(
    "preset, clips, epochs, batch, lr, steps_per_epoch",  # paper Sec. 4.1: lr = 1.5e-4 * batch / 256
    [
        ("vggsound-ablation", 144_000, 200, 512, 3e-4, 281),
        ("vggsound-large", 144_000, 800, 1024, 6e-4, 140),
        ("audioset", 1_730_000, 200, 4096, 2.4e-3, 422),
    ],
)
def test_presets_are_the_papers_runs(preset, clips, epochs, batch, lr, steps_per_epoch):
    config = parse(["--preset", preset])
    assert (config.preset, config.epochs, config.batch_size) == (preset, epochs, batch)
    assert PUBLISHED_CLIPS.get(preset) == clips
    assert config.warmup_epochs == 40 and config.weight_decay == 0.05
    assert learning_rate(config, config.batch_size) == pytest.approx(lr)
    assert (config.image_mask_ratio, config.audio_mask_ratio) == (0.75, 0.8)
    assert (config.decoder_dim, config.decoder_depth, config.decoder_heads) == (512, 8, 16)
    assert (config.fusion_tokens, config.image_aggregation_tokens, config.audio_aggregation_tokens) == (
        16,
        8,
        8,
    )
    wide = preset == "audioset"
    assert (config.attn_ratio, config.mlp_ratio) == ((1.0, 4.0) if wide else (0.25, 1.0))
    schedule = schedule_of(config, clips, processes=8)
    assert schedule.steps_per_epoch == steps_per_epoch and schedule.steps == epochs * steps_per_epoch
    accumulated = {"vggsound-ablation": 1, "vggsound-large": 2, "audioset": 8}[preset]  # on 8 GPUs x 64 clips
    assert [len(part) for part in schedule.micro_batches(range(clips), 0)] == [64] * accumulated

    said = plan(config, processes=8)
    for fact in (
        f"{batch} clips = 8 processes x {accumulated} accumulated x 64",
        f"{lr:.3g} = 0.00015 x {batch} / 256",
        f"{epochs * steps_per_epoch:,} = {epochs} epochs x {steps_per_epoch}",
        "image 196 tokens, 49 seen; audio 96 tokens, 19 seen; 16 fusion",
        "dense interactions",
    ):
        assert fact in said


def test_the_plan_of_the_papers_interactions():
    config = replace(parse(["--preset", "vggsound-ablation"]), interactions="factorized")
    said = plan(config, processes=8)
    assert "audio 96 tokens, 19 seen; 32 fusion" in said and "factorized interactions" in said


def test_plan_counts_the_arithmetic_of_a_step():
    """By hand: the products with weights are most of it, and a backward has twice those of its forward."""
    config = parse(["--preset", "vggsound-ablation"])
    with torch.device("meta"):
        mae = make_model(config)
    flops = costs.step_flops(mae)
    assert flops == pytest.approx(94.6e9, rel=0.01)  # as counted of a real step on a GPU
    vits = 12 * (2 * 12 * 768**2) * (50 + 20)  # a token meets 12 D^2 weights in each block
    decoders = 8 * (2 * 12 * 512**2) * (196 + 16 + 96 + 16)
    assert 3 * (vits + decoders) < flops < 1.2 * 3 * (vits + decoders)  # the rest is attention and fusion
    assert costs.count_blocks(mae) == 12 + 12 + 12 + 8 + 8
    plain, again = (
        costs.step_flops(make_model(replace(TrainConfig(), grad_checkpointing=on))) for on in (False, True)
    )
    assert 1.05 * plain < again < 4 / 3 * plain  # the encoder's forward once more


@pytest.mark.parametrize(
    "precision, clips, milliseconds", [("bf16", 64, 202), ("no", 64, 207), ("no", 128, 344), ("no", 256, 643)]
)
def test_planned_times_are_near_those_of_an_h200(precision, clips, milliseconds):
    """Measured with PyTorch 2.11 and the preset's model, 94.6 GFLOP a clip."""
    with torch.device("meta"):
        mae = make_model(parse(["--preset", "vggsound-ablation"]))
    seconds = costs.step_seconds(mae, 94.6e9, "H100 or H200", precision, clips, 1, True)
    assert 1e3 * seconds == pytest.approx(milliseconds, rel=0.1)


@pytest.mark.parametrize(
    "interactions, flops, clips, milliseconds",
    [
        ("none", 82.6e9, 64, 34.1),
        ("none", 82.6e9, 128, 59.1),
        ("dense", 94.6e9, 64, 40.7),
        ("dense", 94.6e9, 128, 67.2),
    ],
)
def test_planned_times_of_cuda_graphs_are_near_those_of_an_h200(interactions, flops, clips, milliseconds):
    with torch.device("meta"):
        mae = make_model(parse(["--preset", "vggsound-ablation", "--interactions", interactions]))
    seconds = costs.step_seconds(mae, flops, "H100 or H200", "bf16", clips, 1, False)
    assert 1e3 * seconds == pytest.approx(milliseconds, rel=0.05)


def test_plan_says_hours_disk_and_reading_speed():
    said = plan(parse(["--preset", "vggsound-ablation"]), processes=2)
    hours, wall, speed = re.search(
        r"A100 +(\S+) GPU hours \((\S+) h\); to read: (\S+) clips/s", said
    ).groups()
    assert float(hours) == pytest.approx(2 * float(wall), rel=0.01)
    assert float(speed.replace(",", "")) * 3600 * float(wall) == pytest.approx(200 * 281 * 512, rel=0.02)
    parameters = float(re.search(r"(\S+) M with decoders", said)[1])
    disk = float(re.search(r"disk +(\S+) GB: 2 checkpoints", said)[1])
    assert disk == pytest.approx(parameters * 1e6 * (3 * 12 + 4) / 1e9, abs=0.06)
    assert "3.8 ms a block to launch, or 0.27 ms a block and its arithmetic at 23% of the card's peak" in said


def test_plan_of_cuda_graphs():
    argv = ["--preset", "vggsound-ablation"]
    plain, said = plan(parse(argv)), plan(parse([*argv, "--cuda-graphs"]))
    assert "launch" in plain and "launch" not in said
    memory = [float(re.search(r"about (\S+) GiB", text)[1]) for text in (plain, said)]
    parameters = float(re.search(r"(\S+) M with decoders", said)[1])
    assert memory[1] - memory[0] == pytest.approx(4e6 * parameters / 2**30, abs=0.11)
    with pytest.raises(ValueError, match="--cuda-graphs is for one process"):
        plan(parse([*argv, "--cuda-graphs"]), processes=2)


def test_plan_counts_the_parameters_of_the_model():
    of_encoder, of_all = map(
        float, re.search(r"parameters +(\S+) M in the encoder, (\S+) M", plan(TrainConfig())).groups()
    )
    mae = make_model(TrainConfig())
    assert of_encoder == pytest.approx(sum(p.numel() for p in mae.encoder.parameters()) / 1e6, abs=0.05)
    assert of_all == pytest.approx(sum(p.numel() for p in mae.parameters()) / 1e6, abs=0.05)


def test_activations_are_those_that_a_real_forward_keeps():
    mae, kept = make_model(TrainConfig()).train(), {}
    owned = {tensor.untyped_storage().data_ptr() for tensor in mae.state_dict().values()}

    def count(tensor):
        if tensor.untyped_storage().data_ptr() not in owned:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        output = mae(torch.randn(3, 3, 96, 96), torch.randn(3, 1, 64, 128))
    assert plans.activation_bytes(mae, "no", 3) == pytest.approx(sum(kept.values()), rel=0.05)
    del output
    assert plans.activation_bytes(mae, "bf16", 8) < plans.activation_bytes(mae, "no", 8)


def test_plan_counts_the_files_there_are(tmp_path):
    plant(tmp_path, "train/a.mp4", "train/b/c.MKV", "train/notes.txt", "test/d.mp4")
    said = plan(replace(TrainConfig(), data=tmp_path))
    assert "240 = 240 epochs x 1, at 2 clips (files that may be clips)" in said  # --min-steps
    assert "0.000265 = 0.006 x sqrt(2 x 64) / 256, 24 epochs of warm-up" in said
    (tmp_path / "test").rename(tmp_path / "train/test")
    said = plan(replace(TrainConfig(), data=tmp_path, epochs=3, warmup_epochs=1))
    assert "3 = 3 epochs x 1, at 2 clips (0.2 of 3 files that may be clips are held out)" in said
    with pytest.raises(ValueError, match="folder .*nowhere does not exist"):
        plan(replace(TrainConfig(), data=tmp_path / "nowhere"))


def plant(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


@pytest.mark.parametrize(
    "names, reason",
    [
        ([], "no file ends in .mp4"),
        (["train-000000.tar", "train-000001.tar"], "no file ends in .mp4.*; passed over by suffix: 2 .tar"),
        (["a.wav", "b.wav"], "0 clips; 2 without pictures dropped: a.wav, b.wav"),
    ],
)
def test_plan_of_a_folder_without_clips_says_what_training_does(tmp_path, names, reason):
    plant(tmp_path, *names)
    with pytest.raises(ValueError, match=f"folder {tmp_path} has no clip to use: {reason}"):
        plan(replace(TrainConfig(), data=tmp_path))


def test_plan_counts_sounds_where_they_are_kept(tmp_path):
    plant(tmp_path, "a.wav", "b.wav", "c.mp4")
    for missing, count in ("drop", 1), ("keep", 3):
        said = plan(replace(TrainConfig(), data=tmp_path, missing=missing, test_share=0.0))
        assert f"at {count} clips (files that may be clips)" in said


def test_plan_of_a_few_clips_with_a_large_share_to_test_on_leaves_one_to_train_on(tmp_path):
    plant(tmp_path, "a/1.mp4", "b/2.mp4")
    assert "at 1 clips (0.9 of 2 files" in plan(replace(TrainConfig(), data=tmp_path, test_share=0.9))


LISTED = [
    Entry(f"train-000000.tar/{n}.mp4", split, {}, 9, 0, start=512 * n, error=error, video=True, audio=n != 5)
    for n, (split, error) in enumerate([("train", None)] * 6 + [("test", None), ("train", "is broken")])
]


def test_plan_counts_shards_by_their_manifest(tmp_path):
    write(tmp_path, Header(expected=dict(train=7, test=1)), LISTED)
    said = plan(replace(TrainConfig(), data=tmp_path))
    assert "at 5 clips (clips of avfuse-manifest.jsonl)" in said


def test_plan_counts_what_lies_at_an_address(tmp_path):
    content = write(tmp_path, Header(expected=dict(train=7, test=1)), LISTED).read_bytes()
    fsspec.filesystem("memory").pipe("/planned/avfuse-manifest.jsonl", content)
    config = replace(TrainConfig(), data=Path("memory://planned"))
    assert "at 5 clips (clips of avfuse-manifest.jsonl)" in plan(config)


def test_plan_of_a_manifest_whose_clips_are_all_broken(tmp_path):
    write(tmp_path, Header(expected=dict(train=7, test=1)), LISTED[-2:])
    with pytest.raises(ValueError, match="--data: none of the clips to train on can be read"):
        plan(replace(TrainConfig(), data=tmp_path))


def test_options_override_a_preset():
    config = parse(["--batch-size", "64", "--preset", "audioset", "--interactions", "dense", "-j", "3"])
    assert (config.batch_size, config.interactions, config.workers) == (64, "dense", 3)
    assert config.epochs == 200 and str(config.run) == "runs/audioset"
    assert parse([]) == TrainConfig()
    assert str(parse(["--run-dir", "x"]).run) == "x"
    for name, options in PRESETS.items():
        assert replace(parse(["--preset", name]), run=None) == TrainConfig(preset=name, run=None, **options)


@pytest.mark.parametrize("wrong", [["--preset", "imagenet"], ["--epoch", "3"], ["--batch-size", "x"]])
def test_wrong_options_end_the_program(wrong, capsys):
    with pytest.raises(SystemExit):
        parse(wrong)
    assert wrong[0] in capsys.readouterr().err


def test_plan_starts_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli(parse(["--preset", "audioset", "--plan"])) == 0
    assert "4096 clips" in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("micro_batch", [0, 1, 4])
def test_every_clip_of_a_batch_is_dealt_out_once(processes, micro_batch):
    config = replace(TrainConfig(), batch_size=10, epochs=2, micro_batch=micro_batch)
    order = list(range(100, 127))
    for step in range(4):
        batch = order[step % 2 * 10 : step % 2 * 10 + 10]
        dealt = []
        for process in range(processes):
            schedule = schedule_of(config, len(order), process, processes)
            assert (schedule.steps, schedule.steps_per_epoch) == (4, 2)
            parts = schedule.micro_batches(order, step)
            assert parts and all(0 < len(part) <= (micro_batch or 10) for part in parts)
            dealt += [clip for part in parts for clip in part]
        assert sorted(dealt) == batch


def test_every_epoch_has_an_order_of_its_own_and_a_resumed_run_the_same():
    schedule = Schedule(clips=9, epochs=3, batch_size=4, micro_batch=2)
    run = SimpleNamespace(schedule=schedule, config=SimpleNamespace(epochs=3, seed=5), first_step=0)
    run.found = SimpleNamespace(train=range(9))
    steps = list(loop.steps_of(run, SimpleNamespace(batches=iter)))
    keys = [key for batches in steps for batch in batches for key in batch]
    assert [epoch for epoch, _ in keys] == 8 * [0] + 8 * [1] + 8 * [2]
    orders = {tuple(index for epoch, index in keys if epoch == each) for each in range(3)}
    assert len(orders) == 3 and all(len(set(order)) == 8 for order in orders)
    assert not any(order == tuple(sorted(order)) for order in orders)
    run.config.seed = 6
    assert list(loop.steps_of(run, SimpleNamespace(batches=iter))) != steps
    run.config.seed, run.first_step = 5, 3
    assert list(loop.steps_of(run, SimpleNamespace(batches=iter))) == steps[3:]


def test_the_learning_rate_does_not_vanish_with_the_batch():
    rate = partial(learning_rate, TrainConfig())
    assert rate(3) == pytest.approx(6e-3 * math.sqrt(3 * 64) / 256)  # 3.2e-4; in proportion it was 7e-5
    assert rate(64) == pytest.approx(1.5e-3) and rate(256) == pytest.approx(6e-3)  # the linear rule
    assert learning_rate(replace(TrainConfig(), lr_scaling="linear"), 3) == pytest.approx(7e-5, rel=0.01)
    assert learning_rate(ClassifyConfig(), 8) == pytest.approx(
        8e-3 * 16 / 256
    )  # half of that of the usual 32


def test_rates_fall_from_the_top_layer_down():
    task, config = loop.Task(None, None), SimpleNamespace(weight_decay=0.3, layer_decay=0.5)
    task.parameter_groups = lambda decay: [dict(layer=n, weight_decay=decay, ramp=n == 1) for n in (0, 1, 3)]
    groups = loop.optimizer_groups(task, config, lr=0.8)
    found = [(group["lr"], group["weight_decay"], group["ramp"]) for group in groups]
    assert found == [(0.1, 0.3, False), (0.2, 0.3, True), (0.8, 0.3, False)]


def test_clips_are_waited_for_as_long_as_the_settings_say(monkeypatch):
    made, task = [], SimpleNamespace(dataset=lambda clips, train: (clips, train))
    monkeypatch.setattr(loop, "ClipLoader", lambda *args, **options: made.append((*args, options)))
    loop.make_loader(task, SimpleNamespace(workers=3, clip_timeout=7.0), ["clip"], train=True)
    assert made == [((["clip"], True), dict(workers=3, timeout=7.0))]


def test_a_small_data_set_gets_more_epochs():
    default = TrainConfig()
    small = with_enough_steps(default, 3)
    assert (small.epochs, small.warmup_epochs) == (240, 24)
    given = with_enough_steps(replace(default, warmup_epochs=3, given=("warmup_epochs",)), 3)
    assert (given.epochs, given.warmup_epochs) == (small.epochs, 3)
    assert with_enough_steps(default, 130).epochs == 120 and with_enough_steps(default, 256) == default
    assert with_enough_steps(replace(default, min_steps=241), 130).epochs == 121  # of two steps
    preset = checked(parse)(["--preset", "audioset"])  # of 200 epochs
    for asked in replace(default, epochs=10), replace(default, min_steps=0), preset:  # as they were ordered
        assert with_enough_steps(asked, 3) == asked


@pytest.mark.parametrize("read", [parse, parse_classify], ids=["train", "classify"])
@pytest.mark.parametrize("written", ["--epochs {}", "--epochs={}"])
def test_epochs_that_are_given_are_an_order_be_they_the_default(read, written):
    default = checked(read)([])
    asked = checked(read)(written.format(default.epochs).split())
    assert with_enough_steps(asked, 3) == asked and with_enough_steps(default, 3).epochs == 240
    assert settings_of(asked) == settings_of(default)  # else a run would be refused to go on


def test_what_may_change_when_a_run_is_resumed_is_how_it_is_carried_out():
    config = TrainConfig(data=Path("videos"))
    free = dict(data=Path("moved"), run=Path("elsewhere"), restart=True, quiet=True, epochs=99)
    free |= dict(warmup_epochs=9, micro_batch=1, grad_checkpointing=True, workers=0, threads=1)
    free |= dict(clip_timeout=9.0, max_unreadable=0.5)
    free |= dict(measure_every=7, checkpoint_every=7, keep_checkpoints=7)
    fixed = dict(batch_size=7, base_lr=0.1, lr_scaling="linear", weight_decay=0.1, layer_decay=0.5)
    fixed |= dict(clip_grad=0.0, ema=0.5, precision="bf16", frames=3, pair_bias="time", missing="keep")
    fixed |= dict(test_share=0.5, seed=7)
    truth = settings_of(config, fixed=True)
    for name, value in (free | fixed).items():
        changed = settings_of(replace(config, **{name: value}), fixed=True)
        assert (changed == truth) == (name in free), name


def test_runs_of_before_go_on_as_they_began():
    former = former_settings(TrainConfig(), dict(settings=dict(frames=4)))
    began = dict(lr_scaling="linear", min_steps=0, test_share=0.0, norm_eps=1e-5, pair_bias="")
    assert former.items() >= began.items() and "frames" not in former


def test_the_rate_of_an_extended_run_rises_to_that_of_a_longer_one():
    rates = [warmup_cosine(step, 10, 200, extended_at=100) for step in range(200)]
    assert rates[:100] == [warmup_cosine(step, 10, 100) for step in range(100)]
    assert rates[109:] == [warmup_cosine(step, 10, 200) for step in range(109, 200)]
    assert all(0 < b - a < 0.06 for a, b in zip([0, *rates[100:109]], rates[100:110], strict=True))
    assert warmup_cosine(100, 0, 200, extended_at=100) == warmup_cosine(100, 0, 200)  # no warm-up, no rise


def test_a_small_data_set_shrinks_the_batch_but_every_process_needs_a_clip():
    assert schedule_of(replace(TrainConfig(), batch_size=64), 5).batch_size == 5
    assert schedule_of(replace(TrainConfig(), micro_batch=16), 5, processes=2).micro_batch == 3
    with pytest.raises(ValueError, match="--batch-size 3 leaves some of the 4 processes without a clip"):
        schedule_of(TrainConfig(), 3, processes=4)
    assert Schedule(clips=8, epochs=1, batch_size=4, micro_batch=4, processes=4).steps == 2


@pytest.mark.parametrize(
    "config, run",
    [
        (TrainConfig(), "runs/demo"),
        (parse(["--preset", "audioset"]), "runs/audioset"),
        (TrainConfig(data=Path("/videos/holiday/")), "runs/holiday"),
        (parse(["--data", "/videos/vgg", "--preset", "audioset"]), "runs/vgg"),
        (TrainConfig(data=Path("/videos/demo")), "runs/demo-data"),  # that of the demo is its own
        (TrainConfig(data=Path("/")), "runs/demo-data"),
        (TrainConfig(scene="synchrony"), "runs/synchrony-demo"),
        (TrainConfig(data=Path("/videos/synchrony-demo")), "runs/demo-data"),
        (ClassifyConfig(scene="synchrony"), "runs/synchrony-classify"),
        (TrainConfig(data=Path("/videos"), run=Path("elsewhere")), "elsewhere"),
        (ClassifyConfig(), "runs/classify"),
        (ClassifyConfig(data=Path("/videos/birds")), "runs/birds-classify"),
        (parse_classify(["--probe", "--data", "birds"]), "runs/birds-classify-probe"),
        (SegmentConfig(data=Path("avs")), "runs/avs-segment"),
        (RetrieveConfig(data=Path("birds")), "runs/birds-retrieve"),
    ],
)
def test_a_run_folder_has_the_name_of_the_data(config, run):
    assert str(config.run) == run


def test_a_contrastive_term_needs_the_clips_of_a_step_together():
    with pytest.raises(ValueError, match="--contrastive 0.1 compares .* give --micro-batch 0, not 4"):
        TrainConfig(contrastive=0.1, micro_batch=4)
    assert make_model(TrainConfig(contrastive=0.1, fusion_layers=(3,))).contrastive == 0.1
    with pytest.raises(ValueError, match="Let fusion_layers begin later"):
        make_model(TrainConfig(contrastive=0.1))
