"""Rematerialization policies: which named values of a layer are kept for the backward pass.

Values of a layer have names (`jax.ad_checkpoint.checkpoint_name`). A policy selects the ones to keep; the others are
recomputed. The input of a layer is always kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax

ATTENTION_OUTPUT = "attention_output"
MATMUL_OUTPUT = "matmul_output"
NAMED_OUTPUTS = (ATTENTION_OUTPUT, MATMUL_OUTPUT)

# By the values of `model.remat_policy`. None keeps nothing.
REMAT_POLICIES: Mapping[str, Callable[..., Any] | None] = MappingProxyType(
    {
        "nothing": None,
        "attention": jax.checkpoint_policies.save_only_these_names(ATTENTION_OUTPUT),
        "matmuls": jax.checkpoint_policies.save_only_these_names(*NAMED_OUTPUTS),
        "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=NAMED_OUTPUTS,
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }
)
