"""Compute large float32 matmuls on CPUs with numpy's BLAS, which takes about four fifths of the time of XLA.

XLA calls back into this process through its foreign function interface (xla/ffi/api/c_api.h, version 0). It passes pointers to
the operands and the result, so nothing is copied. Compiled programs refer to the functions by name and are cached like others.

`jaxembed.devices.cpu` documents the switch that turns this off.
"""

from __future__ import annotations

import atexit
import ctypes
import math
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float32

from jaxembed.devices.cpu import is_tuned
from jaxembed.devices.mesh import get_target_platform

MIN_FLOPS = 1 << 28  # matmuls above this size are worth the call through Python
IDLE_S = 1.0  # without a call for this long, no program is running
API_VERSION = (0, 1)  # major and minor version of the interface that the structures below describe


# The structures of c_api.h, up to the last field that is read here.
class _Version(ctypes.Structure):
    _fields_ = (("size", ctypes.c_size_t), ("extension", ctypes.c_void_p), ("major", ctypes.c_int), ("minor", ctypes.c_int))


class _Metadata(ctypes.Structure):
    _fields_ = (("size", ctypes.c_size_t), ("version", _Version), ("traits", ctypes.c_uint32))


class _Extension(ctypes.Structure):
    """A call with an extension only requests the version of the function."""

    _fields_ = (
        ("size", ctypes.c_size_t), ("type", ctypes.c_int), ("next", ctypes.c_void_p),
        ("metadata", ctypes.POINTER(_Metadata)),
    )  # fmt: skip


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_size_t), ("extension", ctypes.c_void_p), ("dtype", ctypes.c_int), ("data", ctypes.c_void_p),
        ("rank", ctypes.c_int64), ("shape", ctypes.POINTER(ctypes.c_int64)),
    )  # fmt: skip


class _Buffers(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_size_t), ("extension", ctypes.c_void_p), ("count", ctypes.c_int64), ("types", ctypes.c_void_p),
        ("buffers", ctypes.POINTER(ctypes.POINTER(_Buffer))),
    )  # fmt: skip


class _CallFrame(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_size_t), ("extension", ctypes.POINTER(_Extension)), ("api", ctypes.c_void_p),
        ("context", ctypes.c_void_p), ("stage", ctypes.c_int), ("operands", _Buffers), ("results", _Buffers),
    )  # fmt: skip


_Handler = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_CallFrame))


def _as_matrix(buffer: Any) -> np.ndarray:
    """Return a numpy view of an XLA buffer."""
    rows, columns = buffer.contents.shape[:2]
    data = (ctypes.c_float * (rows * columns)).from_address(buffer.contents.data)
    return np.frombuffer(data, np.float32).reshape(rows, columns)


class _CallState:
    """State that all calls from XLA share.

    Attributes:
        last_end: When the last call ended (`time.monotonic`); infinite while one runs.
        lock: Held during a call: two calls at once, each on all cores, would take twice as long.
    """

    last_end = -math.inf
    lock = threading.Lock()


def _make_handler(view_a: Callable[[np.ndarray], np.ndarray], view_b: Callable[[np.ndarray], np.ndarray]) -> Any:
    """Build the function that XLA calls: it multiplies the given views of its two operands."""

    def multiply(frame: Any) -> None:
        if frame.contents.extension:
            version = frame.contents.extension.contents.metadata.contents.version
            version.major, version.minor = API_VERSION
            return
        a, b = (_as_matrix(frame.contents.operands.buffers[i]) for i in range(2))
        result = _as_matrix(frame.contents.results.buffers[0])
        with _CallState.lock:
            _CallState.last_end = math.inf
            try:
                np.matmul(view_a(a), view_b(b), out=result)
            except BaseException:  # ctypes prints the error and continues: XLA must not use an unfinished result
                result.fill(np.nan)
                raise
            finally:
                _CallState.last_end = time.monotonic()

    return _Handler(multiply)


def _identity(x: np.ndarray) -> np.ndarray:
    return x


# By the operand that is transposed: none, the first, or the second. XLA may call the handlers until the process ends.
_HANDLERS = {
    "": _make_handler(_identity, _identity),
    "first": _make_handler(np.transpose, _identity),
    "second": _make_handler(_identity, np.transpose),
}


def _register_handlers() -> None:
    """Make the handlers known to XLA under their names."""
    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.restype, capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    for transposed_operand, handler in _HANDLERS.items():
        address = ctypes.cast(handler, ctypes.c_void_p)
        jax.ffi.register_ffi_target(_name_target(transposed_operand), capsule(address, None, None), platform="cpu")


def _name_target(transposed_operand: str) -> str:
    """Return the name under which compiled programs call a handler: a key of `_HANDLERS` with a prefix."""
    return f"jaxembed_matmul_{transposed_operand}"


_register_handlers()


@atexit.register
def _wait_until_idle() -> None:
    """Wait for programs that still run at exit, such as after an error.

    Their next call would wait forever for an interpreter that has ended.
    """
    while time.monotonic() - _CallState.last_end < IDLE_S:
        time.sleep(0.02)


def is_worthwhile(x: jax.Array, kernel: jax.Array) -> bool:
    """Return whether `matmul` should compute `x @ kernel`: large float32 matrices on a CPU that is a single device."""
    return x.dtype == kernel.dtype == np.float32 and is_large_on_one_cpu(x, kernel)


def is_large_on_one_cpu(x: jax.Array, kernel: jax.Array) -> bool:
    """Return whether `x @ kernel` is a large matmul of matrices on a CPU that is a single device and is tuned."""
    mesh = jax.sharding.get_abstract_mesh()
    is_one_cpu = is_tuned(get_target_platform()) and (mesh.empty or mesh.size == 1)
    return x.ndim == 2 and is_one_cpu and 2 * x.size * kernel.shape[1] >= MIN_FLOPS


def _call_blas(transposed_operand: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the matmul of a and b, one of which may be transposed (a key of `_HANDLERS`)."""
    rows = a.shape[1] if transposed_operand == "first" else a.shape[0]
    columns = b.shape[0] if transposed_operand == "second" else b.shape[1]
    y = jax.ffi.ffi_call(_name_target(transposed_operand), jax.ShapeDtypeStruct((rows, columns), np.float32))(a, b)
    assert isinstance(y, jax.Array)
    return y


@jax.custom_vjp
def matmul(x: Float32[Array, "t i"], kernel: Float32[Array, "i o"]) -> Float32[Array, "t o"]:
    """Compute `x @ kernel` and its gradients with BLAS."""
    return _call_blas("", x, kernel)


def _matmul_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return matmul(x, kernel), (x, kernel)


def _matmul_backward(residuals: tuple[jax.Array, jax.Array], y_grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    return _call_blas("second", y_grad, kernel), _call_blas("first", x, y_grad)


matmul.defvjp(_matmul_forward, _matmul_backward)
