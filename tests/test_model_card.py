"""Model cards tell what went in, what came out and whose licence holds, and follow the model."""

import json
import math

import pytest
from huggingface_hub import EvalResult, ModelCard, metadata_load
from models import make_encoder
from safetensors import safe_open

from avfuse import AVMAE, AVEncoder
from avfuse.model_card import model_card

FACTS = dict(
    recipe={"model": "tiny", "epochs": 60, "base lr": 0.0060000001, "clip_grad": 1.0},
    data={"train clips": "800 of 801", "set | of": "a <b> & c"},
    metrics={"image loss": 0.123456, "probes": {"shape": {"image": 0.5}}, "sizes": [1, 2]},
)
MAE = {"weights": "mae.pth", "family": "MAE", "licence": "CC-BY-NC-4.0"}
OWN = {"weights": "own.pth", "family": "ViT", "licence": "apache-2.0"}


def rows(card):
    """The cells of every table row."""
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in card.text.splitlines()
        if "|" in line
    ]


def test_a_card_tells_all_facts():
    card = model_card("AVMAE", FACTS, {})
    told = rows(card)
    for row in (
        *(["model", "tiny"], ["epochs", "60"], ["base lr", "0.006"], ["clip grad", "1"]),
        *(["train clips", "800 of 801"], ["set \\| of", "a &lt;b> &amp; c"]),
        *(["image loss", "0.1235"], ["probes shape image", "0.5"], ["sizes", "1, 2"]),
    ):
        assert row in told
    assert [line for line in card.text.splitlines() if line.startswith("#")] == [
        "# Audio-visual masked autoencoder",
        *("## How to load it", "## Training", "## Data", "## Measures", "## Licence", "## Citation"),
    ]
    assert 'avfuse.AVMAE.from_pretrained("FOLDER_OR_NAME")' in card.text
    assert "Shentong" in card.text and "He, Kaiming" not in card.text
    assert card.data.library_name == "avfuse" and card.data.tags == ["audio-visual", "masked-autoencoder"]


def test_the_strictest_licence_is_that_of_the_card():
    for facts, origins, licence in (
        ({}, {}, None),
        (dict(licence="MIT"), {}, "mit"),
        (dict(licence="mit"), {"image": MAE}, "cc-by-nc-4.0"),
        ({}, {"image": OWN, "audio": MAE | {"family": "AudioMAE"}}, "cc-by-nc-4.0"),
        ({}, {"image": OWN}, "apache-2.0"),
        ({}, {"image": MAE, "audio": OWN | {"licence": "unknown"}}, "unknown"),
    ):
        card = model_card("AVEncoder", facts, origins)
        assert card.data.license == licence
        assert ModelCard(str(card)).data.license == licence  # as the hub will read it
        for branch, origin in origins.items():
            assert [branch, origin["weights"], origin["family"], origin["licence"]] in rows(card)
        families = {origin["family"] for origin in origins.values()}
        assert ("He, Kaiming" in card.text) == ("MAE" in families)
        assert ("Huang, Po-Yao" in card.text) == ("AudioMAE" in families)


MEASURED = dict(
    licence="MIT",
    data=dict(
        name="VGG Sound",
        measured_on="3 clips of test.csv",
        measured_by="10 windows: logits averaged",
        coverage=dict(train="7 of 9", test="3 of 4"),
    ),
    metrics={"accuracy": 0.25, "probes": {"shape_recall@1": 1.0}, "clips": 3, "lost": math.nan},
)


def test_the_hub_reads_what_was_measured_on_what(tmp_path):
    card = model_card("Classifier", MEASURED, {"image": MAE})
    card.save(tmp_path / "README.md")
    on = dict(
        task_type="video-classification",
        task_name="audio-visual-classification",
        dataset_type="vgg-sound",
        dataset_name="VGG Sound",
        dataset_split="clips of test.csv",
        dataset_args=dict(coverage="3 of 4", protocol="10 windows: logits averaged"),
    )
    results = [
        EvalResult(metric_type="accuracy", metric_name="accuracy", metric_value=0.25, **on),
        EvalResult(
            metric_type="probes_shape_recall@1", metric_name="probes shape recall@1", metric_value=1.0, **on
        ),
    ]
    loaded = ModelCard.load(tmp_path / "README.md")
    assert loaded.data.eval_results == card.data.eval_results == results
    assert (loaded.data.license, loaded.data.pipeline_tag) == ("cc-by-nc-4.0", "video-classification")
    (index,) = metadata_load(tmp_path / "README.md")["model-index"]
    assert index["name"] == "Audio-visual classifier" == loaded.data.model_name
    (result,) = index["results"]  # of one task and data set
    assert [metric["value"] for metric in result["metrics"]] == [0.25, 1.0]
    assert str(loaded) == str(card)


def test_what_was_measured_on_no_data_with_a_name_is_not_for_the_hub():
    for facts in {}, FACTS, MEASURED | dict(metrics={}), MEASURED | dict(data={}), dict(metrics={"a": 0.5}):
        card = ModelCard(str(model_card("AVEncoder", facts, {})))
        assert card.data.eval_results is None and "model-index" not in card.content


@pytest.mark.parametrize(
    "name", ["a\n---\nb", "x: [", "\x1b[2J", "\u202eg", "yes", "", "'\"{}#&*!|>%@`", 7, [1, "a"]]
)
def test_names_from_files_stay_what_they_are(name):
    facts = dict(
        data=dict(name=name, measured_on=name, measured_by=name, coverage=name), metrics={f"{name}": 0.5}
    )
    card = model_card("AVEncoder", facts, {})
    (result,) = ModelCard(str(card)).data.eval_results
    said = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(name))
    assert (result.dataset_name, result.metric_value) == (said, 0.5)
    assert result.metric_name == said and str(card).count("\n---\n") == 1
    assert all(line.isprintable() for line in str(card).split("\n"))


def test_only_names_of_facts_get_spaces():
    """Two classes may differ in that alone, and a file is found by its name."""
    tables = [[("", "f_score"), ("dog_bark", 0.5), (None, None)]]
    facts = dict(data=dict(measured_on="my_clips/a_b.mp4"), metrics=dict(f_score=0.5), tables=tables)
    card = str(model_card("Classifier", facts, {}, classes=("dog_bark", "dog bark")))
    for line in (
        r"In the order of the outputs: dog\_bark; dog bark.",
        r"| measured on | my\_clips/a\_b.mp4 |",
        "|  | f score |",
        r"| dog\_bark | 0.5 |",
    ):
        assert line in card.split("\n")


def test_facts_follow_the_model(tmp_path):
    mae = AVMAE(make_encoder().float(), decoder_dim=16, decoder_depth=1, decoder_heads=2)
    mae.facts, mae.encoder.image.origin = FACTS, MAE
    mae.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card == str(model_card("AVMAE", FACTS, {"image": MAE}))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "licence": "CC-BY-NC-4.0"}
    loaded = AVMAE.from_pretrained(tmp_path)
    assert loaded.facts == FACTS
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text() == card


def test_a_card_is_that_of_the_weights_beside_it(tmp_path):
    """Also where another model was saved before."""
    encoder = make_encoder().float()
    encoder.save_pretrained(tmp_path)
    assert "avfuse.AVEncoder.from_pretrained" in (tmp_path / "README.md").read_text()
    assert "facts" not in json.loads((tmp_path / "config.json").read_text())
    encoder.facts = dict(metrics=dict(accuracy=0.25))
    encoder.save_pretrained(tmp_path)
    assert "| accuracy | 0.25 |" in (tmp_path / "README.md").read_text()
    assert AVEncoder.from_pretrained(tmp_path).facts == encoder.facts


def test_what_is_pushed_has_the_card(monkeypatch):
    """The hub is played by a function that looks at the folder which would be uploaded."""
    pushed = {}

    class Hub:
        def __init__(self, **_):
            pass

        def create_repo(self, repo_id, **_):
            return type("Url", (), dict(repo_id=repo_id))

        def upload_folder(self, folder_path, **_):
            pushed.update({path.name: path.read_bytes() for path in folder_path.iterdir()})

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Hub)
    encoder = make_encoder().float()
    encoder.facts = FACTS
    encoder.push_to_hub("someone/model")
    assert pushed.keys() == {"config.json", "model.safetensors", "README.md"}
    assert pushed["README.md"].decode() == str(model_card("AVEncoder", FACTS, {}))


def test_other_facts_are_refused(tmp_path):
    for facts, message in (
        (dict(speed={}), "facts must be of recipe, data, metrics, tables and licence, got 'speed'"),
        (dict(metrics=[0.5]), "facts: metrics cannot be a list"),
        (dict(licence=None), "facts: licence cannot be a NoneType"),
        (dict(tables={}), "facts: tables cannot be a dict"),
        (dict(tables=[[]]), "facts: tables must be lists of rows"),
        (dict(tables=[["model"]]), "facts: tables must be lists of rows"),
    ):
        encoder = make_encoder().float()
        encoder.facts = facts
        with pytest.raises(ValueError, match=message):
            encoder.save_pretrained(tmp_path)
        assert not list(tmp_path.iterdir())
