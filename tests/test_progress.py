"""Bars for people who watch, a few lines for those who read a log later, nothing for those who want none."""

import io
import sys

import pytest
from tqdm import tqdm

from avfuse.progress import progress_bar


@pytest.mark.parametrize("steps", [3, 10, 1000])
def test_a_log_file_has_a_line_for_every_tenth(capsys, steps):
    with progress_bar(total=steps, desc="training", unit="step") as bar:
        for step in range(steps):
            bar.set_postfix(loss=f"{step:.1f}", refresh=False)
            bar.update()
            tqdm.write("said in between", file=io.StringIO())  # brings no bar back
    said = capsys.readouterr().err
    lines = said.splitlines()
    assert "\r" not in said and len(lines) == min(steps, 10) + 1
    assert lines[0].startswith(f"training: 0 of {steps}, 00:00")
    assert lines[-1].startswith(f"training: {steps} of {steps}, ") and lines[-1].endswith(
        f"loss={steps - 1}.0"
    )


def test_what_would_not_stay_on_a_terminal_is_not_in_a_log_file(capsys):
    assert list(progress_bar(iter("abc"), leave=False)) == list("abc") and not capsys.readouterr().err


@pytest.mark.parametrize("is_terminal", [False, True])
def test_nothing_is_shown_to_those_who_want_nothing(capsys, monkeypatch, is_terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal, raising=False)
    assert list(progress_bar(range(9), shown=False)) == list(range(9)) and not capsys.readouterr().err


def test_a_terminal_has_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(progress_bar(range(9), desc="reading")) == list(range(9))
    assert "\rreading: 100%|" in capsys.readouterr().err


def test_nothing_is_shown_where_stderr_is_closed(monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    assert list(progress_bar(range(3))) == [0, 1, 2]
