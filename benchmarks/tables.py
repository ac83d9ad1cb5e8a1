"""What a benchmark measured, as paragraphs and tables: one form for the terminal and for Markdown.

A part is a paragraph (a string) or a table (a list of rows, the first its header; the first column is aligned
to the left and the others to the right).
"""

from collections.abc import Iterable

MISSING = "not yet measured"


def terminal(parts: Iterable[str | list]) -> str:
    return "\n\n".join(part if isinstance(part, str) else aligned(part) for part in parts)


def markdown(parts: Iterable[str | list]) -> str:
    return "\n\n".join(part if isinstance(part, str) else piped(part) for part in parts)


def aligned(rows: list[tuple]) -> str:
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [str(cell).rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([str(first).ljust(widths[0]), *cells]).rstrip())
    lines.insert(1, "-" * (sum(widths) + 2 * len(widths) - 2))
    return "\n".join(lines)


def piped(rows: list[tuple]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    lines.insert(1, "| --- |" + " ---: |" * (len(rows[0]) - 1))
    return "\n".join(lines)


def spread(quantiles: dict, form: str, factor: float = 1.0) -> str:
    """Median and quartiles."""
    median, low, high = (format(factor * quantiles[name], form) for name in ("median", "q25", "q75"))
    return f"{median} ({low}-{high})"


def times(value: float) -> str:
    return f"{value:.2f} x"


def origin(record: dict | None) -> str:
    """One line that says where numbers come from."""
    if record is None:
        return f"{MISSING[0].upper()}{MISSING[1:]}."
    machine, versions = record["machine"], record["versions"]
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    place = machine.get("gpu") or f"{machine['cpu']}, {threads} on {machine['cores']} cores"
    note = "" if record["note"] in record["command"] else f"; {record['note']}"
    load = "" if "gpu" in machine else f", load {record['load_at_start']:.1f} to {record['load_at_end']:.1f}"
    return (
        f"`{record['command']}`: {place}; torch {versions['torch']}; commit {record['commit']}, "
        f"{record['date']}{load}{note}."
    )


def filled(text: str, sections: dict[str, str]) -> str:
    """The text with other content between `<!-- name -->` and `<!-- /name -->`."""
    for name, content in sections.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if text.count(start) != 1 or text.count(end) != 1:
            raise ValueError(f"there must be one {start.strip()} and one {end}")
        before, after = text.split(start)[0], text.split(end)[1]
        text = f"{before}{start}\n{content.strip()}\n\n{end}{after}"
    return text
