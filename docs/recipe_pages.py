"""Pages of the recipes, written from their YAML files: every value with its source, the data, the command, and the plan."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "configs" / "recipes"
SYNTHESIS = ROOT / "configs" / "synthesis"
CATALOG = ROOT / "configs" / "catalog.yaml"
PLANS = ROOT / "docs" / "results" / "recipe-plans.json"
PLAN_HEADER, PLAN_RULE = (
    "| machine | stage | gradcache.rows | memory of a device | step | whole stage |",
    "|---|---|---|---|---|---|",
)
COMMENT = re.compile(r"\s#\s(.*)$")
DRAWN_VALUE = re.compile(r".*\.values\.\w+|.*")  # the key of a placeholder, without its values
SENTENCE_END = re.compile(r"[.] (?=[\"A-Z])")


class Value(NamedTuple):
    """A value of a recipe: its key, its YAML text on one line, and the comment that names its source."""

    key: str
    text: str
    source: str


class DataSet(NamedTuple):
    """A source of a recipe: the key of its list, its catalog entry, the keys that differ from it, and the comment."""

    key: str
    name: str
    changes: dict[str, Any]
    source: str


def iter_values(text: str) -> Iterator[Value | DataSet]:
    """Yield the values and data sets of a recipe in the order of the file.

    Args:
        text: The YAML text. A comment at the end of a line names the source of the values that begin on it; values without a
            comment of their own have that of the key above them.
    """
    comments = {i: found[1] for i, line in enumerate(text.splitlines()) if (found := COMMENT.search(line))}
    root = yaml.compose(text, yaml.SafeLoader)
    yield from _iter_mapping(root, "", "", comments)


def _iter_mapping(node: Any, prefix: str, inherited: str, comments: Mapping[int, str]) -> Iterator[Value | DataSet]:
    for key_node, value in node.value:
        key = prefix + key_node.value
        source = comments.get(key_node.start_mark.line, inherited)
        if isinstance(value, yaml.MappingNode):
            yield from _iter_mapping(value, f"{key}.", source, comments)
        elif isinstance(value, yaml.SequenceNode) and value.value and isinstance(value.value[0], yaml.MappingNode):
            for i, entry in enumerate(value.value):
                yield from _iter_entry(entry, key, i, source, comments)
        else:
            yield Value(key, _to_text(_construct(value)), source)


def _iter_entry(entry: Any, key: str, index: int, inherited: str, comments: Mapping[int, str]) -> Iterator[Value | DataSet]:
    """Yield an entry of a list: a data set, or the values of a stage or objective."""
    keys = _construct(entry)
    if "catalog" in keys:
        name = keys.pop("catalog")
        yield DataSet(key, name, keys, comments.get(entry.start_mark.line, inherited))
    else:
        yield from _iter_mapping(entry, f"{key}.{index}.", inherited, comments)


def _construct(node: Any) -> Any:
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_object(node, deep=True)
    finally:
        loader.dispose()


def _to_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def list_recipes() -> list[str]:
    """Return the names of the recipes, in alphabetical order."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def write_list() -> str:
    """Return a table of the recipes, which links to their pages. Each is described by its first sentence."""
    rows = ["| recipe | system |", "|---|---|"]
    for name in list_recipes():
        text = _read_introduction((RECIPES / f"{name}.yaml").read_text())[1]
        rows.append(f"| [{name}](../recipes/{name}.md) | {_escape(SENTENCE_END.split(text)[0])} |")
    return "\n".join(rows)


def write_plans() -> str:
    """Return the table of all recorded plans."""
    plans = _read_plans()
    if not plans:
        return "No plan is recorded."
    rows = [f"| [{plan['recipe']}](../recipes/{plan['recipe']}.md) {_write_plan(plan)}" for plan in plans["plans"]]
    dates = sorted({plan["date"] for plan in plans["plans"]})
    header = f"| recipe {PLAN_HEADER}\n|---{PLAN_RULE}"
    return "\n".join([f"{plans['about']} Recorded on {' and '.join(dates)}.", "", header, *rows])


def write_page(name: str) -> str:
    """Return the page of a recipe in Markdown."""
    text = (RECIPES / f"{name}.yaml").read_text()
    return "\n\n".join([f"# {name}", _write_introduction(text), _write_values(text), _write_data(text), _write_plans(name)])


def write_synthesis_recipes() -> str:
    """Return a section for each synthesis recipe: its command, its description, and its values with their sources."""
    return "\n\n".join(_write_synthesis_recipe(path) for path in sorted(SYNTHESIS.glob("*.yaml")))


def _write_synthesis_recipe(path: Path) -> str:
    text = path.read_text()
    command, about = _read_introduction(text)
    values = (value for value in iter_values(text) if isinstance(value, Value))
    groups = itertools.groupby(values, lambda value: DRAWN_VALUE.match(value.key)[0])  # type: ignore[index]
    rows = [_write_synthesis_row(key, list(group)) for key, group in groups]
    table = "\n".join(["| key | value | source |", "|---|---|---|", *rows])
    return "\n\n".join([f"## {path.stem}", f"```text\n{command}\n```", _escape(about), table])


def _write_synthesis_row(key: str, group: Sequence[Value]) -> str:
    """Return a row: a value, or the values of a placeholder with their weights. A prompt keeps its lines."""
    if len(group) > 1:
        cell = _escape(", ".join(f"{value.key.removeprefix(key + '.')}: {value.text}" for value in group))
    else:
        value = json.loads(group[0].text)
        cell = _escape(value).replace("\n", "<br>") if isinstance(value, str) else f"`{_escape(group[0].text)}`"
    return f"| `{key}` | {cell} | {_escape(group[0].source)} |"


def _read_introduction(text: str) -> tuple[str, str]:
    """Return the command and the text of the comment that opens a file."""
    comment = text[: re.search(r"^[^#]", text, re.M).start()]  # type: ignore[union-attr]
    command, *lines = (line.removeprefix("#").strip() for line in comment.splitlines())
    return command, " ".join(filter(None, lines))


def _write_introduction(text: str) -> str:
    command, about = _read_introduction(text)
    return f"```bash\n# Needs: the data of the recipe, its base model, and accelerators\n{command}\n```\n\n{_escape(about)}"


def _write_values(text: str) -> str:
    rows = [f"| `{v.key}` | `{_escape(v.text)}` | {_escape(v.source)} |" for v in iter_values(text) if isinstance(v, Value)]
    return "\n".join(["## Values", "", "| key | value | source |", "|---|---|---|", *rows])


def _write_data(text: str) -> str:
    """Return a table of data sets for each list of sources."""
    catalog = yaml.safe_load(CATALOG.read_text())
    parts: dict[str, list[str]] = {}
    for found in iter_values(text):
        if isinstance(found, DataSet):
            entry = {**catalog[found.name], **found.changes}
            changes = ", ".join(f"{key}: {_to_text(value)}" for key, value in found.changes.items())
            rows = f"{entry['max_examples']:,}" if "max_examples" in entry else "all"
            path = f"`{entry['path']}`" if "path" in entry else "set its path"
            cells = [f"`{found.name}`", rows, path, entry["license"], f"`{_escape(changes)}`" if changes else ""]
            parts.setdefault(found.key, []).append("| " + " | ".join(cells) + " |")
    header = "| entry of the catalog | rows | path | license | keys that differ |\n|---|---|---|---|---|"
    tables = ["\n".join([f"### `{key}`", "", header, *rows]) for key, rows in parts.items()]
    return "\n\n".join(["## Data", *tables])


def _write_plans(name: str) -> str:
    """Return what the compiler predicted for the recipe on each machine, from the recorded plans."""
    plans = _read_plans()
    rows = [_write_plan(plan) for plan in plans.get("plans", ()) if plan["recipe"] == name]
    if not rows:
        return "## Plan\n\nNot recorded."
    return "\n".join(["## Plan", "", plans["about"], "", f"{PLAN_HEADER}\n{PLAN_RULE}", *rows])


def _read_plans() -> dict[str, Any]:
    """Return the recorded plans: a text about them, and a list. Empty if there are none."""
    return json.loads(PLANS.read_text()) if PLANS.exists() else {}


def _write_plan(plan: Mapping[str, Any]) -> str:
    stage, rows = plan["stage"], plan["gradcache_rows"] or "all"
    if "error" in plan:
        return f"| {plan['machine']} | {stage} | {rows} | {_escape(plan['error'])} | | |"
    memory = f"{plan['memory_bytes'] / 2**30:.1f} of {plan['device_bytes'] / 2**30:.0f} GiB"
    cells = [plan["machine"], stage, rows, memory, f"{plan['step_s']:,.1f} s", f"{plan['hours']:,.1f} h"]
    return "| " + " | ".join(map(str, cells)) + " |"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;") if "`" not in text else text.replace("|", "\\|")
