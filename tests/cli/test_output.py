"""What others wrote cannot steer the terminal of whoever reads it."""

from __future__ import annotations

import sys

import pytest
from rich.text import Text

from cli import output

BAD = "a\x1b]0;mine\x07b\r\x9bc\x7f"
SHOWN = "a␛]0;mine␇b␍\ufffdc\ufffd"


def test_whatever_is_printed_shows_what_would_steer_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")  # no colours
    output.print_table(["one", "two"], [[BAD, Text(BAD)]])
    output.print_facts({"one": BAD, "two": Text(BAD)})
    output.print_side_by_side({"one": BAD})
    output.print_heading(BAD)
    output.print_line(BAD)
    output.stream([BAD, f"\n{BAD}"])
    output.say(output.plain(BAD))
    output.say_error(BAD, BAD)
    out, err = capsys.readouterr()
    # What rich makes of some of them is nothing; none stays.
    for text, lines in ((out, 9), (err, 3)):
        assert text.count("␛]0;mine") == lines
        assert not set(text) & set("\x1b\x07\r\x9b\x7f")
    assert f"{SHOWN}\n{SHOWN}\n{SHOWN}\n" in out


def test_programs_get_the_bytes_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_line(BAD)
    output.stream([BAD])
    assert capsys.readouterr().out == f"{BAD}\n{BAD}\n"
