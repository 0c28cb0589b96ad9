"""Settings of all tests: offline, eight simulated CPU devices, the highest matmul precision."""

# ruff: noqa: E402  (JAX reads the environment at import, so it is set first)
import contextlib
import gc
import os
import sys
import time
from pathlib import Path

MAX_PROGRAM_AGE_S = 7 * 24 * 3600

os.environ |= {"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false"}
# All but the first make compilation about five times faster.
XLA_FLAGS = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
)
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {XLA_FLAGS}".strip()

# Tests, the commands that they start, and later runs share a cache of compiled programs. A program is kept for some days.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    COMPILATION_CACHE = Path(__file__).parents[1] / ".pytest_cache" / "programs"
    COMPILATION_CACHE.mkdir(parents=True, exist_ok=True)
    for program in COMPILATION_CACHE.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another run removes it too
            if time.time() - program.stat().st_mtime > MAX_PROGRAM_AGE_S:
                program.unlink()
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": str(COMPILATION_CACHE), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"
    }  # fmt: skip

from collections.abc import Callable, Iterator

import hypothesis
import jax
import pytest
import torch
from jaxtyping import install_import_hook

# Check the shapes and dtypes in the signatures of these packages at every call. They must be imported after this.
SHAPE_CHECKED_PACKAGES = ["jaxembed.losses", "jaxembed.model"]
assert not [name for name in sys.modules if name.startswith(tuple(SHAPE_CHECKED_PACKAGES))]
install_import_hook(SHAPE_CHECKED_PACKAGES, "beartype.beartype")
torch.set_num_threads(1)  # more threads are slower on models this small
hypothesis.settings.register_profile("repeatable", derandomize=True, database=None, deadline=None, max_examples=40)
hypothesis.settings.load_profile("repeatable")
jax.config.update("jax_default_matmul_precision", "highest")

from helpers import tiny
from helpers.programs import share_train_steps
from helpers.runs import use_one_device
from jaxembed.config import field_lists

share_train_steps()
# Tracing allocates many objects. The collector should not walk through all imported modules again and again.
gc.freeze()
gc.set_threshold(50_000, 20, 50)

SLOWEST_FILES = (
    "test_processes", "test_crashes", "test_ray_cluster", "test_large_vocabulary", "test_layouts", "test_recipes",
    "test_token_runs", "test_sharded_step", "test_step", "test_gradcache", "test_docs", "test_train", "test_export",
    "test_stages", "test_onnx", "test_token_step", "test_objectives", "test_cpu", "test_parity",
    "test_synthesize_command", "test_evaluate_command", "test_kernels", "test_families", "test_exits", "test_browser",
    "test_earlier_run", "test_graded", "test_notebook", "test_lora", "test_merged_adapters", "test_graded_step",
    "test_adapters", "test_quantization", "test_published", "test_mined", "test_diagnosis", "test_pruning",
    "test_packing", "test_encoders", "test_peft", "test_submission", "test_mfu", "test_embedder", "test_planning",
    "test_dropout", "test_tokenizer_config", "test_scoring",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the slowest files first, so that parallel workers end at about the same time."""
    gc.freeze()  # all modules are imported
    items.sort(key=lambda item: SLOWEST_FILES.index(item.path.stem) if item.path.stem in SLOWEST_FILES else len(SLOWEST_FILES))


def pytest_runtest_setup() -> None:
    """Let every test see the messages that a process logs once."""
    field_lists._logged.clear()


@pytest.fixture(scope="module")
def one_device() -> Iterator[None]:
    """Use one device in a module whose tests are about something else: programs for several compile and run longer."""
    with pytest.MonkeyPatch.context() as patch:
        use_one_device(patch)
        yield


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from a family of `tiny.CONFIGS` to the folder of its tiny random model, which is written once."""
    folders: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in folders:
            folders[family] = tiny.write_folder(tmp_path_factory.mktemp("bases") / family, family)
        return folders[family]

    return folder
