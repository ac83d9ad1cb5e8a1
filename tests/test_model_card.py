"""Model cards tell what went in, what came out and whose licence holds, and follow the model."""

import json

import pytest
from huggingface_hub import ModelCard
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
