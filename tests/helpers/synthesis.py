"""A recipe that `helpers.llm_server` answers."""

from __future__ import annotations

from typing import Any

RECIPE: dict[str, Any] = {
    "name": "test",
    "tasks": [
        {
            "name": "search",
            "steps": [
                {
                    "name": "tasks", "kind": "ask", "requests": 30, "prompt": "Write a list of tasks in {domain}.",
                    "values": {"domain": ["law", "medicine"]}, "answer": {"type": "list"}, "unique": "near",
                },
                {
                    "name": "example", "kind": "ask",
                    "prompt": 'Task: {tasks.item}\nWrite JSON in {language}:\n"query": short\n"document": {words} words\n'
                    '"wrong": no',
                    "values": {"language": ["English"], "words": {"50": 0.9, "100": 0.1}},
                    "answer": {
                        "type": "object",
                        "fields": {"query": {"language": "{language}"}, "document": {"language": "{language}"}, "wrong": {}},
                    },
                },
            ],
            "row": {
                "prompt": "{tasks.item}", "query": "{example.query}", "pos": ["{example.document}"], "neg": ["{example.wrong}"]
            },
        }
    ],
}  # fmt: skip
