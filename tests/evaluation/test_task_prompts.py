"""Which prompts a task gets: the user's table, the published model's, the stored prompts, MTEB's, in this order."""

from __future__ import annotations

import numpy as np
import pytest

from jaxembed.config.instructions import INSTRUCTION_TABLES, InstructionTable, load_instruction_table
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.evaluation.mteb_encoder import choose_prompts, get_task_instruction
from jaxembed.evaluation.task_encoder import TaskEncoder
from jaxembed.evaluation.task_prompts import PromptChooser
from jaxembed.formats.published import find_published_layout

TEMPLATE = "Instruct: {instruction}\nQuery:"
INSTRUCT_SPEC = EmbeddingSpec(prompts={"document": "d: "}, instruction_template=TEMPLATE)


def choose_query(spec: EmbeddingSpec, task: str = "SciFact", kind: str = "Retrieval", **options: object) -> str:
    return PromptChooser(spec, **options).choose(task, kind, "mteb's").query  # type: ignore[arg-type]


def test_instructions_come_from_the_first_source_that_has_them() -> None:
    option = InstructionTable(by_task={"SciFact": "option"})
    published = INSTRUCT_SPEC.replace(instruction_table="kalm")
    stored = published.replace(prompts={"NFCorpus": "Instruct: stored\nQuery:", "Tatoeba": "Instruct: ours\nQuery:"})
    assert choose_query(stored, user_table=option) == "Instruct: option\nQuery:"
    assert "Given a query, retrieve documents" in choose_query(stored, "NFCorpus", user_table=option)
    assert choose_query(stored, "Tatoeba", "BitextMining") == "Instruct: ours\nQuery:"
    assert choose_query(stored, "BUCC", "BitextMining") == "Instruct: mteb's\nQuery:"
    assert PromptChooser(stored).choose("Tatoeba", "BitextMining", "").instruction == "ours"
    # An instruction that a user asks for is given to a model without prompts too; other tasks get none.
    assert choose_query(EmbeddingSpec(), user_table=option) == "Instruct: option\nQuery:"
    assert choose_query(EmbeddingSpec(), "NFCorpus", user_table=option) == ""


def test_stored_prompts_without_an_instruction_are_used_for_every_task() -> None:
    fixed = EmbeddingSpec(prompts={"query": "query: ", "passage": "passage: "})
    prompts = PromptChooser(fixed).choose("SciFact", "Retrieval", "mteb's")
    assert (prompts.query, prompts.document, prompts.instruction) == ("query: ", "passage: ", "")
    flagged = INSTRUCT_SPEC.replace(fixed_prompts=True, prompts={"query": "Instruct: x\nQuery:", "document": "d: "})
    assert choose_query(flagged) == "Instruct: x\nQuery:"
    assert choose_query(EmbeddingSpec(prompts={"query": "", "document": ""})) == ""  # trained without instructions
    trained = EmbeddingSpec().add_source_prompts({"plain": ("", ""), "instructed": ("Find it", "")})
    assert choose_query(trained) == "Instruct: mteb's\nQuery:"
    by_type = EmbeddingSpec(prompts={"query": "q: ", "STS": "sts: "})
    assert choose_query(by_type, "STS17", "STS") == "sts: "


def test_documents_get_the_instruction_where_the_table_says_so() -> None:
    chooser = PromptChooser(INSTRUCT_SPEC.replace(instruction_table="qwen3_embedding"))
    assert chooser.choose("SciFact", "Retrieval", "").document == "d: "
    reranking = chooser.choose("SciDocsRR", "Reranking", "")
    assert reranking.document == reranking.query != "d: "


@pytest.mark.parametrize("name", INSTRUCTION_TABLES)
def test_a_published_model_gets_the_instruction_of_its_paper_for_every_task(name: str) -> None:
    import mteb

    table = load_instruction_table(name)
    spec = INSTRUCT_SPEC.replace(instruction_template=table.template, instruction_table=name)
    encoder = TaskEncoder(lambda texts, prompt: np.zeros((len(texts), 1)), spec, "model", "1")
    differences, differences_without_table = [], []
    for task in mteb.get_tasks(tasks=[*table.by_task, "STS17", "STSBenchmark"], exclude_superseded=False):
        metadata = task.metadata
        expected = table.by_task.get(metadata.name, table.by_type.get(metadata.type))
        prompts = choose_prompts(encoder, metadata)
        if (prompts.instruction, prompts.query) != (expected, spec.build_prompt(expected)):
            differences.append(metadata.name)
        if get_task_instruction(metadata) != expected:
            differences_without_table.append(metadata.name)
    assert differences == []
    assert len(differences_without_table) > 1  # mteb's own instructions are others


def test_tables_belong_to_published_models_and_survive_training() -> None:
    kalm = "KaLM-embedding-multilingual-mini-instruct"
    names = ("e5-mistral-7b-instruct", f"{kalm}-v1.5", f"{kalm}-v2", "Qwen3-Embedding-0.6B", "GritLM-7B")
    layouts = [find_published_layout(name, None, {}) for name in names]
    tables = [layout and layout.read_spec_choices(None, "").get("instruction_table") for layout in layouts]
    assert tables == ["e5_mistral", "kalm", "kalm_v2", "qwen3_embedding", "gritlm"]
    base = EmbeddingSpec(instruction_table="kalm")
    assert base.add_source_prompts({"a": ("Find", "")}).instruction_table == "kalm"
    assert base.describe_vectors() == EmbeddingSpec().describe_vectors()  # the vectors do not depend on it


def test_scores_belong_to_the_tables_of_their_instructions() -> None:
    plain, table = PromptChooser(INSTRUCT_SPEC), PromptChooser(INSTRUCT_SPEC.replace(instruction_table="kalm"))
    option = PromptChooser(INSTRUCT_SPEC, InstructionTable(by_task={"SciFact": "x"}), "file.yaml")
    assert plain.compute_digest() == ""
    assert len({plain.compute_digest(), table.compute_digest(), option.compute_digest()}) == 3


def test_choice_of_prompts_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "jaxembed")
    for spec in (EmbeddingSpec(), EmbeddingSpec(prompts={"query": "q: "}), INSTRUCT_SPEC, INSTRUCT_SPEC):
        PromptChooser(spec).log_origins()
    PromptChooser(INSTRUCT_SPEC.replace(instruction_table="kalm"), InstructionTable(), "own.yaml").log_origins()
    PromptChooser(INSTRUCT_SPEC.replace(prompts={"STS": "Instruct: Find it\nQuery: "})).log_origins()
    assert [record.message for record in caplog.records] == [
        "queries get the prompt '', because no prompts are stored with the model; documents get ''",
        "queries get the stored prompt 'q: '; documents get ''",
        f"queries get mteb's instruction in {TEMPLATE!r}; documents get the stored prompt 'd: '",
        f"instructions come from own.yaml, then the table kalm; other tasks get mteb's instruction in {TEMPLATE!r}; documents "
        "get the stored prompt 'd: '",
        f"queries get the stored prompt of the task or of its type, or without one mteb's instruction in {TEMPLATE!r}; "
        "documents get ''",
    ]
