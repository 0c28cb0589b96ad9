"""Count the floating-point operations of the matmuls in a traced function.

XLA's own count takes the body of a loop once. So this one walks the jaxpr, and counts the body of a loop once per iteration.
Elementwise operations are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from jax.interpreters.partial_eval import dce_jaxpr


def count_matmul_flops(jaxpr: Any) -> int:
    """Count the FLOPs of all matmuls in a jaxpr, over all devices. A multiplication with its addition counts as two.

    The longest branch of a conditional is counted, and a loop without a known number of iterations once. Equations
    with unused results are not counted, because XLA removes them.
    """
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    live, _ = dce_jaxpr(inner, [True] * len(inner.outvars))
    return _count_jaxpr_flops(live)


def _count_jaxpr_flops(jaxpr: Any) -> int:
    return sum(map(_count_equation_flops, getattr(jaxpr, "jaxpr", jaxpr).eqns))


def _count_equation_flops(equation: Any) -> int:
    """Count the FLOPs of an equation, and of the jaxprs that it contains."""
    name, params = equation.primitive.name, equation.params
    # Matmuls.
    if name == "dot_general":
        (contracted_axes, _), _ = params["dimension_numbers"]
        return 2 * equation.outvars[0].aval.size * math.prod(equation.invars[0].aval.shape[i] for i in contracted_axes)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        output_channels = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        return 2 * equation.outvars[0].aval.size * kernel.size // output_channels
    if name == "ffi_call":  # a matmul by BLAS (`jaxembed.devices.blas`), the only such call
        # [m, k] x [k, n] = [m, n]: the sizes a, b, y give k = sqrt(a b / y).
        a, b, y = (variable.aval.size for variable in (*equation.invars, *equation.outvars))
        return 2 * y * math.isqrt(a * b // y)
    # Equations that contain other jaxprs.
    inner_flops = [_count_jaxpr_flops(jaxpr) for jaxpr in _iter_inner_jaxprs(params)]
    if name == "cond":
        return max(inner_flops)
    if name == "shard_map":  # its shapes are those of one shard
        return sum(inner_flops) * math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    if name == "pallas_call":  # its shapes are those of one block; blocks that a kernel skips are counted too
        return sum(inner_flops) * math.prod(params["grid_mapping"].grid)
    return sum(inner_flops) * (params["length"] if name == "scan" else 1)


def _iter_inner_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(getattr(item, "jaxpr", item), "eqns"):
                yield item
