"""Source code of small Python packages."""

from __future__ import annotations

import random


def make_function(name: str, docstring: str, seed: int) -> str:
    """Return the source of a function. Each seed gives a different body."""
    rng = random.Random(seed)
    lines = [f"    v{rng.randrange(10**6)} = w{rng.randrange(10**6)}({rng.randrange(10**6)})" for _ in range(6)]
    return f'def {name}(x):\n    """{docstring}"""\n' + "\n".join(lines) + "\n    return x\n\n"


def make_module(first: int, last: int) -> str:
    """Return the source of a module with the functions f{first} to f{last - 1}."""
    return "".join(make_function(f"f{i}", f"Does the thing of number {i}.", i) for i in range(first, last))
