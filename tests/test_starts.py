"""What a run begins with: all weights of a model, told by name, and what is new beside them."""

from dataclasses import replace

import pytest
import torch
from videos import write_video

from avfuse import AVMAE, create_encoder
from avfuse.tasks.classifier import Classifier
from avfuse.tasks.classify import Classification, ClassifyConfig
from avfuse.tasks.localize import Localizer
from avfuse.tasks.options import parse as parse_classify
from avfuse.train import Pretraining
from avfuse.training import loop
from avfuse.training.plan import make_model, plan
from avfuse.training.recipes import TrainConfig, parse
from avfuse.training.run_folder import check_run
from avfuse.training.settings import checked
from avfuse.training.starts import begin_from, first_encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("own")
    for number in range(4):
        write_video(root / ("bird", "cat")[number % 2] / f"{number}.mp4", 1.0)
    return root


def noisy(model):
    """Weights that no fresh model has."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def begun(config, task, capsys):
    run = loop.set_up(config, task)
    run.lock.close()
    return run.task.model.state_dict(), capsys.readouterr().out


def same(weights, others, part):
    names = [name for name in weights if name.startswith(part)]
    return bool(names) and all(torch.equal(weights[name], others[name]) for name in names)


def test_pretraining_begins_from_all_weights_of_a_model(folder, tmp_path, capsys):
    mae = noisy(AVMAE(create_encoder("tiny", "token"), decoder_dim=32, decoder_depth=1, decoder_heads=2))
    mae.save_pretrained(tmp_path / "before" / "model")
    settings = dict(data=folder, workers=0, checkpoint=str(tmp_path / "before"), image_mask_ratio=0.5)
    weights, said = begun(TrainConfig(run=tmp_path / "run", **settings), Pretraining, capsys)
    assert same(weights, mae.state_dict(), "")
    assert f"weights of {tmp_path / 'before'}: encoder, image_decoder, audio_decoder, which is all" in said
    assert f"model of {tmp_path / 'before'}, token: " in said
    changed = TrainConfig(run=tmp_path / "other", decoder_dim=64, **settings)
    weights, said = begun(changed, Pretraining, capsys)
    assert "before: encoder; new: image_decoder, audio_decoder" in said
    assert same(weights, mae.state_dict(), "encoder.")
    with pytest.raises(
        ValueError, match="has another encoder than --interactions factorized: leave these out"
    ):
        loop.set_up(TrainConfig(run=tmp_path / "third", interactions="factorized", **settings), Pretraining)
    assert "token interactions" in plan(TrainConfig(**settings))


def test_a_checkpoint_may_be_spelled_in_another_way(folder, tmp_path, monkeypatch, capsys):
    create_encoder("tiny").save_pretrained(tmp_path / "before")
    create_encoder("tiny").save_pretrained(tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    settings = dict(data=folder, run=tmp_path / "run", workers=0, epochs=1, warmup_epochs=0)
    loop.set_up(ClassifyConfig(checkpoint="before", **settings), Classification).lock.close()
    for spelled in "before/", "./before", str(tmp_path / "before"):
        check_run(ClassifyConfig(checkpoint=spelled, **settings))
    with pytest.raises(ValueError, match="with other settings .--checkpoint .*before -> other"):
        check_run(ClassifyConfig(checkpoint="other", **settings))


def test_what_decoders_see_goes_on(folder, tmp_path, capsys):
    mae = noisy(
        AVMAE(create_encoder("tiny"), decode_from="fusion", decoder_dim=128, decoder_depth=2, decoder_heads=4)
    )
    mae.save_pretrained(tmp_path / "before" / "model")
    settings = dict(data=folder, workers=0, checkpoint=str(tmp_path / "before"))
    run = loop.set_up(TrainConfig(run=tmp_path / "run", **settings), Pretraining)
    run.lock.close()
    assert run.task.model.settings["decode_from"] == "fusion" and run.task.has_unused_parameters
    assert run.accelerator.ddp_handler.find_unused_parameters
    run = loop.set_up(TrainConfig(run=tmp_path / "other", data=folder, workers=0), Pretraining)
    run.lock.close()
    assert run.accelerator.ddp_handler is None  # to look for them takes time in every step


def test_of_the_model_of_a_task_pretraining_takes_the_encoder(folder, tmp_path, capsys):
    classifier = noisy(Classifier(create_encoder("tiny"), 3))
    classifier.save_pretrained(tmp_path / "named")
    config = parse(["--checkpoint", str(tmp_path / "named"), "--run-dir", str(tmp_path / "run"), "-j", "0"])
    config.data = folder
    weights, said = begun(config, Pretraining, capsys)
    assert same(weights, classifier.state_dict(), "encoder.")
    assert "named: encoder; new: image_decoder, audio_decoder" in said


@pytest.mark.parametrize(
    "names, fits", [(("bird", "cat"), True), (("cat", "bird"), False), (("a", "b", "c"), False)]
)
def test_a_task_takes_the_heads_of_the_same_classes(folder, tmp_path, capsys, names, fits):
    classifier = noisy(Classifier(create_encoder("tiny"), len(names), class_names=names))
    classifier.save_pretrained(tmp_path / "named")
    config = ClassifyConfig(data=folder, checkpoint=str(tmp_path / "named"), run=tmp_path / "run", workers=0)
    weights, said = begun(config, Classification, capsys)
    assert same(weights, classifier.state_dict(), "encoder.")
    heads = "image_head, audio_head, fusion_head"
    assert (f"encoder, {heads}, which is all" if fits else f"encoder; new: {heads}") in said
    assert fits == (names[:2] == ("bird", "cat") and same(weights, classifier.state_dict(), "image_head"))


@pytest.mark.parametrize("features", [("image", "audio", "fusion"), ("fusion",)], ids=len)
def test_fine_tuning_begins_with_what_a_probe_says(tmp_path, features):
    """Whose heads read standardised features: those of the classifier take that in."""
    config = ClassifyConfig(checkpoint=str(tmp_path))
    probe = noisy(Classifier(create_encoder("micro"), 3, features=features, batch_norm=True, frozen=True))
    for name, buffer in probe.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.2, 2)
    probe.eval().save_pretrained(tmp_path)
    said = []
    model = Classifier(first_encoder(config), 3, features=("image", "fusion"))
    begin_from(model, str(tmp_path), said.append)
    taken = [name for name in ("image", "fusion") if name in features]
    image = torch.randn(2, 3, *model.encoder.image.patch_embed.img_size)
    audio = torch.randn(2, 1, *model.encoder.audio.patch_embed.img_size)
    with torch.no_grad():
        ours, truth = model.eval()(image, audio).heads, probe(image, audio).heads
    for name in taken:
        torch.testing.assert_close(ours[name], truth[name])
    if len(features) == 3:
        assert said[0].endswith("encoder, image_head, fusion_head; not taken: audio_norm, audio_head")
    else:
        assert said[0].endswith("encoder, fusion_head; new: image_head")


def test_what_decoders_predict_goes_on(tmp_path):
    AVMAE(
        create_encoder("micro"), norm_target=False, decoder_dim=16, decoder_depth=1, decoder_heads=2
    ).save_pretrained(tmp_path)
    for options in {}, dict(decoder_depth=2, given=("decoder_depth",)), dict(decoder_depth=3):
        model = make_model(TrainConfig(checkpoint=str(tmp_path), **options))
        assert not model.norm_target and model.settings["decoder_depth"] == options.get("decoder_depth", 1)


def test_what_nothing_trains_is_judged_as_it_is(tmp_path):
    Localizer(create_encoder("micro"), 8, modalities="image").save_pretrained(tmp_path)
    model = Localizer(create_encoder("micro"), 8, modalities="image")
    begin_from(model, str(tmp_path), said := [].append, is_trained=False)
    wrong = "as it is, and that has no such {}: leave --epochs 0 out"
    for dim, modalities, fault in (
        (8, "both", "modalities"),
        (16, "image", "image_head, audio_head, dim"),
    ):
        model = Localizer(create_encoder("micro"), dim, modalities=modalities)
        with pytest.raises(ValueError, match=wrong.format(fault)):
            begin_from(model, str(tmp_path), said, is_trained=False)
        begin_from(model, str(tmp_path), said)  # and then learns


def test_weights_of_a_branch_and_of_a_whole_model_are_not_both_taken(tmp_path):
    with pytest.raises(ValueError, match="--image-weights would take the place of weights of --checkpoint"):
        TrainConfig(checkpoint="runs/x", image_weights=tmp_path / "a.pth")


@pytest.mark.parametrize(
    "kind, task", [(TrainConfig, Pretraining), (ClassifyConfig, Classification)], ids=["train", "classify"]
)
def test_a_checkpoint_that_is_not_there_is_missed_before_clips_are_read(
    folder, tmp_path, monkeypatch, kind, task
):
    def find(config, say):
        raise AssertionError("clips were looked for")

    monkeypatch.setattr(task, "find", staticmethod(find))
    config = kind(data=folder, run=tmp_path / "run", checkpoint=str(tmp_path / "nowhere/else"))
    with pytest.raises(ValueError, match="is no file, no folder and no name on the hub"):
        loop.set_up(config, task)
    assert not (tmp_path / "run").exists()


def test_another_encoder_than_that_of_the_checkpoint_is_refused(tmp_path):
    create_encoder("micro").save_pretrained(tmp_path)
    for options, said in (
        (dict(model="base"), "has another encoder than --model base: leave these out"),
        (dict(interactions="joint"), "has another encoder than --interactions joint"),
    ):
        with pytest.raises(ValueError, match=said):
            first_encoder(ClassifyConfig(checkpoint=str(tmp_path), **options))
    first_encoder(ClassifyConfig(checkpoint=str(tmp_path), model="micro"))


def test_what_a_preset_asks_for_beside_a_checkpoint_is_for_fresh_weights(tmp_path):
    create_encoder("tiny").save_pretrained(tmp_path / "dense")
    scenes = ["--scene", "synchrony", "--checkpoint", str(tmp_path / "dense")]  # where fresh ones are micro
    assert first_encoder(checked(parse_classify)(scenes)).dims["image"] == 192
    create_encoder("micro", fusion_layers=[1], interactions="factorized").save_pretrained(tmp_path)
    source = ["--checkpoint", str(tmp_path)]
    for kind, options in (
        (parse_classify, ["--preset", "vggsound-probe"]),
        (parse, ["--preset", "vggsound-ablation"]),
        (parse, ["--audio-seconds", "0"]),
        (parse, ["--interactions", "factorized", "--fusion-layers", "1", "--fusion-tokens", "16"]),
    ):
        begin = make_model if kind is parse else first_encoder
        assert begin(checked(kind)([*options, *source]))
    for options, said in (
        (["--model", "tiny"], "--model tiny"),  # which is the default
        (["--fusion-layers", "0"], r"--fusion-layers \(0,\)"),
        (["--audio-seconds", "10"], "--audio-seconds 10.0"),
        (["--interactions", "factorized", "--fusion-tokens", "4"], "--fusion-tokens 4"),
    ):
        with pytest.raises(ValueError, match=f"another encoder than {said}: leave"):
            make_model(checked(parse)([*options, *source]))


def test_pretraining_drops_no_blocks_whatever_its_checkpoint_did(tmp_path):
    Classifier(create_encoder("micro", drop_path=0.1), 3).save_pretrained(tmp_path)
    model = make_model(TrainConfig(checkpoint=str(tmp_path)))
    config = model.encoder.to_config()
    assert not config["drop_path"] and not config["image"].get("drop_path_rate")


def test_what_several_frames_bring_is_told_as_new(tmp_path):
    create_encoder("micro").save_pretrained(tmp_path)
    said, config = [], TrainConfig(checkpoint=str(tmp_path), frames=4, pair_bias="time")
    begin_from(make_model(config), str(tmp_path), said.append)
    assert "new: positions of frames, a bias of time" in said[0]
    make_model(config).encoder.save_pretrained(tmp_path / "again")
    again = replace(config, checkpoint=str(tmp_path / "again"))
    begin_from(make_model(again), again.checkpoint, said.append)
    assert said[1].endswith(": encoder; new: image_decoder, audio_decoder")
    still = replace(again, frames=1)  # which has one position
    begin_from(make_model(still), again.checkpoint, said.append)
    assert said[2].endswith("new: image_decoder, audio_decoder; not taken: positions of frames")
