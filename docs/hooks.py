"""Fill the reference pages from the code when mkdocs builds the site."""

from __future__ import annotations

import argparse
import os
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import recipe_pages  # noqa: E402  (after the checkout is on the path)

from jaxembed import config  # noqa: E402
from jaxembed.__main__ import COMMANDS  # noqa: E402
from jaxembed.config.curation import CurateConfig  # noqa: E402
from jaxembed.config.sections import make_key_table  # noqa: E402
from jaxembed.config.synthesis import SynthesisConfig  # noqa: E402

PLACEHOLDER = re.compile(r"<!-- generated: ([\w-]+) -->")
HELP_COLUMNS = 110


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace every `<!-- generated: NAME -->` of a page with what the code says today."""
    return PLACEHOLDER.sub(lambda found: GENERATORS[found.group(1)](), markdown)


def on_files(files: Any, config: Any) -> Any:
    """Add a page for each recipe, and list it in the navigation."""
    from mkdocs.structure.files import File

    names = recipe_pages.list_recipes()
    for name in names:
        files.append(File.generated(config, f"recipes/{name}.md", content=recipe_pages.write_page(name)))
    config["nav"].insert(3, {"Recipes": [f"recipes/{name}.md" for name in names]})
    return files


def config_keys() -> str:
    """Return a heading and a table of keys for each section of the configuration."""
    header, rule, *rows = make_key_table(config.Config).splitlines()
    sections: dict[str, list[str]] = {}
    for row in rows:
        section = re.match(r"\| `(\w+)", row)
        assert section is not None, row
        sections.setdefault(section.group(1), []).append(row)
    return "\n\n".join("\n".join([f"## `{name}`", "", header, rule, *found]) for name, found in sections.items())


def curation_keys() -> str:
    """Return a table of the keys of a curation, without those of sources."""
    return "\n".join(row for row in make_key_table(CurateConfig).splitlines() if not row.startswith("| `sources[]."))


def synthesis_keys() -> str:
    """Return a table of the keys of a synthesis recipe."""
    return make_key_table(SynthesisConfig)


def command_options() -> str:
    """Return the help text of every command and subcommand."""
    os.environ["COLUMNS"] = str(HELP_COLUMNS)  # the width that argparse wraps at
    parts = []
    for name in COMMANDS:
        parser = runpy.run_module(f"jaxembed.{name}", run_name="command")["make_parser"]()
        parts += [
            (f"jaxembed {name}", parser),
            *((f"jaxembed {name} {sub}", subparser) for sub, subparser in subparsers(parser)),
        ]
    return "\n\n".join(f"## {name}\n\n```text\n{parser.format_help()}```" for name, parser in parts)


def subparsers(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield the name and the parser of each subcommand."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.items()


GENERATORS = {
    "config-keys": config_keys,
    "curation-keys": curation_keys,
    "command-options": command_options,
    "recipes": recipe_pages.write_list,
    "synthesis-keys": synthesis_keys,
    "synthesis-recipes": recipe_pages.write_synthesis_recipes,
    "recipe-plans": recipe_pages.write_plans,
}
