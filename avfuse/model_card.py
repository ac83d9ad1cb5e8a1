"""The model card of a saved model: what it is, how it was trained and measured, whose licence it is under."""

import re
from collections.abc import Sequence

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .checks import is_number
from .files import in_markdown, printable

HEADINGS = {"recipe": "Training", "data": "Data", "metrics": "Measures"}
KINDS = {  # of a class of models: its name, the hub's pipeline, and the task
    "AVMAE": ("masked autoencoder", "feature-extraction", "masked-autoencoder"),
    "AVEncoder": ("encoder", "feature-extraction", "feature-extraction"),
    "Classifier": ("classifier", "video-classification", "audio-visual-classification"),
    "Localizer": ("localizer", "image-segmentation", "sound-source-localization"),
    "Segmenter": ("segmenter", "image-segmentation", "audio-visual-segmentation"),
    "Separator": ("separator", "audio-to-audio", "audio-visual-source-separation"),
}
KINDS_OF_FACTS = {"tables": list, "licence": str}  # others are dictionaries
UNKNOWN = "unknown"
# Words of licences that allow all, and words that say nothing of what one allows.
FREE = frozenset("mit apache bsd isc zlib unlicense zero cc by attribution odc pddl public domain".split())
FILLING = frozenset(
    "licence license version v clause the new revised software creative commons international".split()
)
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
    saved_as: str,
    facts: dict,
    origins: dict[str, dict[str, str]],
    home: str = "avfuse",
    classes: Sequence[str] | None = None,
) -> ModelCard:
    """The card of a model of class `saved_as` of the module `home`, ready for the Hugging Face hub.

    Args:
        facts: of its run, all optional: `recipe`, `data` and `metrics`, dictionaries (nested or not) of what
            the card shows; `tables`, each a list of rows of cells, the first of them the header, which show
            the metrics beside what they compare with; and `licence`, under which the weights are published.
            Where the data have a `name`, the metrics go into the `model-index`, which the hub shows.
        origins: by branch, the pretrained weights it began with: {"weights", "family", "licence"}.
        classes: the names of what it tells apart.

    Raises:
        ValueError: facts of other names or kinds.
    """
    check_facts(facts)
    licence = licence_of(facts, origins)
    title, pipeline, task = KINDS.get(saved_as, (saved_as.lower(), None, None))
    results = measured(facts, pipeline or "other", task or title)
    data = ModelCardData(
        library_name="avfuse",
        model_name=f"Audio-visual {title}" if results else None,
        eval_results=results or None,
        license=printable(licence).lower() if licence else None,
        pipeline_tag=pipeline,
        tags=["audio-visual", *([task] if task else [])],
    )
    parts = [f"---\n{data.to_yaml()}\n---", introduction(title, saved_as, home)]
    if classes:
        parts.append(f"## Classes\n\nIn the order of the outputs: {cell('; '.join(classes))}.")
    for name, heading in HEADINGS.items():
        told = [(key.replace("_", " "), value) for key, value in flat(facts.get(name, {}))]
        tables = [[("", ""), *told]] if told else []
        if name == "metrics":
            tables = facts.get("tables") or tables
        if tables:
            parts += [f"## {heading}", *map(in_columns, tables)]
    parts += [licence_section(licence, origins), citation(origins)]
    return ModelCard("\n\n".join(parts) + "\n")


def check_facts(facts: dict) -> None:
    if not isinstance(facts, dict):
        raise ValueError(f"facts must be a dictionary, got {type(facts).__name__}")
    for name, fact in facts.items():
        if name not in (*HEADINGS, *KINDS_OF_FACTS):
            raise ValueError(f"facts must be of {', '.join(HEADINGS)}, tables and licence, got {name!r}")
        if not isinstance(fact, KINDS_OF_FACTS.get(name, dict)):
            raise ValueError(f"facts: {name} cannot be a {type(fact).__name__}")
    for table in facts.get("tables", ()):
        if not (table and isinstance(table, list) and all(isinstance(row, list | tuple) for row in table)):
            raise ValueError("facts: tables must be lists of rows, which are lists of cells")


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
    """The licence that forbids most, of which one that is unknown forbids all; None if there is none. It is
    "other" where one of unknown terms meets one that is known to forbid something: both hold.
    """
    found = max(licences, key=strictness, default=None)
    unknown = {licence for licence in licences if strictness(licence) == 3}
    if unknown and not any({UNKNOWN, "other"} & words_of(licence) for licence in unknown):
        return "other" if len(unknown) > 1 or any(strictness(x) in (1, 2) for x in licences) else found
    return found


def strictness(licence: str) -> int:
    """0 allows all, 1 asks for the same licence, 2 forbids commercial use or changes; 3 is one not known."""
    words = words_of(licence) - FILLING
    if words & {UNKNOWN, "other"}:
        return 3
    no_sales = "commercial" in words and words & {"no", "non", "not"}
    if no_sales or words & {"nc", "nd", "noncommercial", "noderivatives"}:
        return 2
    if words & {"sa", "sharealike", "mpl", "gpl", "gplv", "lgpl", "lgplv", "agpl", "agplv"}:
        return 1
    return 0 if words and words <= FREE else 3


def words_of(licence: str) -> set[str]:
    return set(re.findall(r"[a-z]+", licence.lower().replace("cc0", "cc-zero")))


def measured(facts: dict, pipeline: str, task: str) -> list[EvalResult]:
    """The metrics, and on what they were measured: data set, split, coverage and protocol."""
    data = {name: printable(value) for name, value in flat(facts.get("data", {}))}
    if "name" not in data:
        return []
    told = {"coverage": data.get("coverage test"), "protocol": data.get("measured_by")}
    return [
        EvalResult(
            task_type=pipeline,
            task_name=task,
            dataset_type=identifier(data["name"], "-"),
            dataset_name=data["name"],
            dataset_split=re.sub(r"^\d+ ", "", data.get("measured_on", "")) or None,
            dataset_args={name: value for name, value in told.items() if value} or None,
            metric_type=identifier(name, "_"),
            metric_name=printable(name.replace("_", " ")),
            metric_value=value,
        )
        for name, value in flat(facts.get("metrics", {}))
        if is_number(value) and not isinstance(value, int)  # whole numbers count clips
    ]


def identifier(name: str, joint: str) -> str:
    """A name as the hub writes those of data sets and metrics."""
    return re.sub(r"[^a-z0-9@.]+", joint, name.lower()).strip(joint) or UNKNOWN


# --- the parts of the card ----------------------------------------------------------------------------------


def introduction(title: str, saved_as: str, home: str) -> str:
    return f"""# Audio-visual {title}

A model of the library avfuse: image and audio transformers joined by fusion tokens. `config.json` carries its
input transforms (size and normalisation of the image, mel spectrogram).

## How to load it

```python
import avfuse

model = avfuse.load("FOLDER_OR_NAME")  # {home}.{saved_as}.from_pretrained("FOLDER_OR_NAME")
encoder = avfuse.load_encoder("FOLDER_OR_NAME")  # an AVEncoder, in eval mode
print(model.predict("VIDEO.mp4"))
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


def in_columns(rows: Sequence[Sequence]) -> str:
    """A Markdown table, whose first row names the columns."""
    head = [name.replace("_", " ") if isinstance(name, str) else name for name in rows[0]]
    lines = [f"| {' | '.join(map(cell, row))} |" for row in (head, *rows[1:])]
    return "\n".join([lines[0], "| --- " * len(head) + "|", *lines[1:]])


def cell(value: object) -> str:
    """In a Markdown table, whatever is in the value; nothing for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        value = f"{value:.4g}"
    elif isinstance(value, (list, tuple)):
        value = ", ".join(map(str, value))
    return in_markdown(" ".join(str(value).split()))
