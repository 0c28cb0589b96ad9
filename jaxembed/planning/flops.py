"""Floating-point operations of the products in a traced function: all of them, loops as often as they run.

XLA's own count takes the body of a loop once, so this one walks the jaxpr. Elementwise work is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any


def product_flops(jaxpr: Any) -> int:
    """Two a multiplication and addition, over all devices; a branch counts as the longest, an endless loop once.

    What nobody takes is not counted: XLA leaves it out.
    """
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    used = {id(variable) for part in (*(equation.invars for equation in inner.eqns), inner.outvars) for variable in part}
    return sum(_of_equation(equation) for equation in inner.eqns if any(id(made) in used for made in equation.outvars))


def _of_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2 * equation.outvars[0].aval.size * math.prod(equation.invars[0].aval.shape[i] for i in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        outputs = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        return 2 * equation.outvars[0].aval.size * kernel.size // outputs
    if name == "ffi_call":  # a product by BLAS (`model/blas.py`), the only such call
        a, b, made = (variable.aval.size for variable in (*equation.invars, *equation.outvars))
        return 2 * made * math.isqrt(a * b // made)
    inner = [product_flops(jaxpr) for jaxpr in _jaxprs(params)]
    if name == "cond":
        return max(inner)
    if name == "shard_map":  # its shapes are those of a part
        return sum(inner) * math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    if name == "pallas_call":  # a kernel's are those of a block; one that skips blocks is counted as if it did not
        return sum(inner) * math.prod(params["grid_mapping"].grid)
    return sum(inner) * (params["length"] if name == "scan" else 1)


def _jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if hasattr(getattr(one, "jaxpr", one), "eqns"):
                yield one
