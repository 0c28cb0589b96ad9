"""What the documents say is so: the key table is the code's, links lead somewhere, the configs load."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from jaxembed import config
from jaxembed.config.sections import reference

ROOT = Path(__file__).parents[1]


def test_key_table_is_current():
    assert reference(config.Config) in (ROOT / "docs" / "config.md").read_text(), "run: python -m jaxembed.train --keys"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_config_loads_and_opens_with_its_command(path):
    settings = config.load_config(path)
    assert settings.run.dir == f"runs/{path.stem}"
    first = path.read_text().splitlines()[0]
    assert first.startswith(("# python -m jaxembed.train configs/", "# make "))


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert target.startswith("http") or (path.parent / target).exists(), target


def test_every_key_in_the_readme_exists():
    known = {key.replace("[]", "") for key in re.findall(r"^\| `([^`]+)`", reference(config.Config), re.M)}
    readme = (ROOT / "README.md").read_text()
    for key in re.findall(r"\b((?:train|optim|model|data)\.[\w.]+)=", readme):
        assert re.sub(r"\.\d+", "", key) in known, key
