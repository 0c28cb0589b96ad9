"""Every test runs offline, on eight simulated CPU devices, at the highest matmul precision."""

# ruff: noqa: E402  (what JAX reads from the environment is set before anything imports it)
import atexit
import os
import shutil
import sys
import tempfile

os.environ |= {"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false"}
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"  # the latter compiles faster
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()

# What one test compiles, the others (and the commands that they start) need not: in a place that ends with the session.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    COMPILED = tempfile.mkdtemp(prefix="jaxembed-tests-")
    atexit.register(shutil.rmtree, COMPILED, ignore_errors=True)
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": COMPILED, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}

from collections.abc import Callable
from pathlib import Path

import hypothesis
import jax
import pytest
import torch
from jaxtyping import install_import_hook

# The shapes and dtypes in the signatures of these packages are checked at every call; so they come in after this.
CHECKED = ["jaxembed.losses", "jaxembed.model"]
assert not [name for name in sys.modules if name.startswith(tuple(CHECKED))]
install_import_hook(CHECKED, "beartype.beartype")
torch.set_num_threads(1)  # more only wait for each other on models as small as these
hypothesis.settings.register_profile("repeatable", derandomize=True, database=None, deadline=None, max_examples=40)
hypothesis.settings.load_profile("repeatable")
jax.config.update("jax_default_matmul_precision", "highest")

from helpers import tiny

LONGEST = (
    "test_crashes", "test_processes", "test_train", "test_stages", "test_sharded_step", "test_planning", "test_kernels",
    "test_layouts", "test_step", "test_gradcache", "test_peft",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, so that workers end together."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a family of `tiny.CONFIGS` to the folder of its tiny random model, made once."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tiny.folder(tmp_path_factory.mktemp("bases") / family, family)
        return made[family]

    return folder
