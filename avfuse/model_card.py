"""The model card of a saved model: what it is, how it was trained and measured, whose licence it is under."""

from huggingface_hub import ModelCard, ModelCardData

from .files import in_markdown, printable

HEADINGS = {"recipe": "Training", "data": "Data", "metrics": "Measures"}
KINDS = {"AVMAE": "masked autoencoder", "AVEncoder": "encoder"}
UNKNOWN = "unknown"
PAPER = r"""@inproceedings{mo2024unveiling,
  title = {Unveiling the Power of Audio-Visual Early Fusion Transformers with Dense Interactions through
           Masked Modeling},
  author = {Mo, Shentong and Morgado, Pedro},
  booktitle = {CVPR},
  year = {2024}
}"""
MAE = r"""@inproceedings{he2022masked,
  title = {Masked Autoencoders Are Scalable Vision Learners},
  author = {He, Kaiming and Chen, Xinlei and Xie, Saining and Li, Yanghao and Doll{\'a}r, Piotr and
            Girshick, Ross},
  booktitle = {CVPR},
  year = {2022}
}"""
AUDIOMAE = r"""@inproceedings{huang2022masked,
  title = {Masked Autoencoders that Listen},
  author = {Huang, Po-Yao and Xu, Hu and Li, Juncheng and Baevski, Alexei and Auli, Michael and
            Galuba, Wojciech and Metze, Florian and Feichtenhofer, Christoph},
  booktitle = {NeurIPS},
  year = {2022}
}"""
CITATIONS = {"MAE": [MAE], "AudioMAE": [AUDIOMAE], "DeepAVFusion": [MAE, AUDIOMAE]}  # beside the paper


def model_card(
    saved_as: str, facts: dict, origins: dict[str, dict[str, str]], home: str = "avfuse"
) -> ModelCard:
    """The card of a model of class `saved_as` of the module `home`, ready for the Hugging Face hub.

    Args:
        facts: of its run, all optional: `recipe`, `data` and `metrics`, dictionaries (nested or not) of what
            the card shows, and `licence`, under which the weights are published.
        origins: by branch, the pretrained weights it began with: {"weights", "family", "licence"}.

    Raises:
        ValueError: facts of other names or kinds.
    """
    check_facts(facts)
    licence = licence_of(facts, origins)
    data = ModelCardData(
        library_name="avfuse",
        license=printable(licence).lower() if licence else None,
        tags=["audio-visual", "masked-autoencoder"],
    )
    parts = [f"---\n{data.to_yaml()}\n---", introduction(saved_as, home)]
    for name, heading in HEADINGS.items():
        if facts.get(name):
            rows = [f"| {cell(key)} | {cell(value)} |" for key, value in flat(facts[name])]
            parts.append("\n".join([f"## {heading}\n", "|  |  |", "| --- | --- |", *rows]))
    parts += [licence_section(licence, origins), citation(origins)]
    return ModelCard("\n\n".join(parts) + "\n")


def check_facts(facts: dict) -> None:
    if not isinstance(facts, dict):
        raise ValueError(f"facts must be a dictionary, got {type(facts).__name__}")
    for name, fact in facts.items():
        if name not in (*HEADINGS, "licence"):
            raise ValueError(f"facts must be of {', '.join(HEADINGS)} and licence, got {name!r}")
        if not isinstance(fact, str if name == "licence" else dict):
            raise ValueError(f"facts: {name} cannot be a {type(fact).__name__}")


def check_origins(origins: dict) -> None:
    for branch, origin in origins.items():
        names = ("weights", "family", "licence")
        if not isinstance(origin, dict) or not all(isinstance(origin.get(name), str) for name in names):
            raise ValueError(f"origins: that of {branch} must tell weights, family and licence by text")


def licence_of(facts: dict, origins: dict) -> str | None:
    """The strictest of the licences that went in and the one stated; None if there is neither."""
    stated = [facts["licence"]] if "licence" in facts else []
    return strictest([*(origin["licence"] for origin in origins.values()), *stated])


def strictest(licences: list[str]) -> str | None:
    """The licence that forbids most, of which one that is unknown forbids all; None if there is none."""
    return max(licences, key=strictness, default=None)


def strictness(licence: str) -> int:
    words = set(licence.lower().replace("_", "-").split("-"))
    if words & {UNKNOWN, "other"}:
        return 3
    return 2 if "nc" in words else 1 if words & {"sa", "gpl", "lgpl", "agpl"} else 0


# --- the parts of the card ----------------------------------------------------------------------------------


def introduction(saved_as: str, home: str) -> str:
    return f"""# Audio-visual {KINDS.get(saved_as, saved_as.lower())}

A model of the library avfuse: image and audio transformers joined by fusion tokens. `config.json` carries its
input transforms (size and normalisation of the image, mel spectrogram).

## How to load it

```python
import {home}

model = {home}.{saved_as}.from_pretrained("FOLDER_OR_NAME")
encoder = avfuse.load_encoder("FOLDER_OR_NAME")  # an AVEncoder, in eval mode
```"""


def licence_section(licence: str | None, origins: dict) -> str:
    if not origins and not licence:
        return "## Licence\n\nNo pretrained weights went in. A licence has not been stated."
    rest = ", the strictest of what went in:" if origins else ""
    lines = [f"## Licence\n\nLicence: {in_markdown(licence)}{rest}"]
    if origins:
        lines += ["", "| transformer | began as | of | licence |", "| --- | --- | --- | --- |"]
    for branch, origin in origins.items():
        cells = branch, origin["weights"], origin["family"], origin["licence"]
        lines.append(f"| {' | '.join(map(cell, cells))} |")
    return "\n".join(lines)


def citation(origins: dict) -> str:
    entries = [PAPER]
    for origin in origins.values():
        entries += [entry for entry in CITATIONS.get(origin["family"], []) if entry not in entries]
    return "## Citation\n\n```bibtex\n" + "\n".join(entries) + "\n```"


def flat(facts: dict, prefix: str = ""):
    """(name, value) of nested dictionaries, the names joined"""
    for name, value in facts.items():
        name = f"{prefix} {name}".strip()
        if isinstance(value, dict):
            yield from flat(value, name)
        else:
            yield name, value


def cell(value: object) -> str:
    """In a Markdown table, whatever is in the value."""
    if isinstance(value, float):
        value = f"{value:.4g}"
    elif isinstance(value, (list, tuple)):
        value = ", ".join(map(str, value))
    return in_markdown(" ".join(str(value).replace("_", " ").split()))
