"""The documents tell the truth: commands, JSON fields and exit codes are those of the code."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from registry import manifest, results

ROOT = Path(__file__).parents[1]


def test_commands_are_up_to_date() -> None:
    program = "import sys; sys.path.insert(0, 'docs'); import make_cli; sys.stdout.write(make_cli.page())"
    page = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert page == (ROOT / "docs" / "cli.md").read_text(encoding="utf-8"), "run `make docs`"


SECTIONS = {
    "Checkpoint": (
        manifest.Checkpoint,
        manifest.Manifest,
        manifest.FileEntry,
        manifest.Metric,
        manifest.Note,
        manifest.Origin,
    ),
    "Report": (manifest.Report, manifest.Finding),
    "Merged model": (manifest.Merged, manifest.Recipe, manifest.RecipeInput, manifest.TensorRecord),
    "Repository": (results.Repository, results.RepositoryFile),
    "Shipment": (manifest.Shipment,),
    "Event": (manifest.Event,),
}


@pytest.mark.parametrize("title", SECTIONS)
def test_json_fields_are_documented(title: str) -> None:
    text = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")
    section = re.split(r"^## ", text, flags=re.M)
    words = set(re.findall(r"`([a-z_0-9]+)`", next(part for part in section if part.startswith(f"{title}\n"))))
    expected = {field.name for kind in SECTIONS[title] for field in fields(kind)}
    assert expected <= words, f"not documented: {sorted(expected - words)}"


def test_every_command_in_the_documents_exists() -> None:
    known = set(re.findall(r"^## `ckpt ?(.*)`$", (ROOT / "docs" / "cli.md").read_text(encoding="utf-8"), flags=re.M))
    for path in [ROOT / "README.md", ROOT / "examples" / "demo.py", *(ROOT / "docs").glob("*.md")]:
        for words in re.findall(
            r"(?:\$ |`|\")ckpt ((?:base |alias |metric |db )?[a-z]+)", path.read_text(encoding="utf-8")
        ):
            assert words in known, f"{path.name}: ckpt {words}"


def test_relative_links_lead_somewhere() -> None:
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
