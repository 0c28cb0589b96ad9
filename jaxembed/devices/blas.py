"""Large float32 products on CPUs by numpy's BLAS, which takes about four fifths of the time of XLA's own.

XLA calls back into this process, by its foreign function interface (xla/ffi/api/c_api.h, version 0), with pointers to the
operands and the result, so nothing is copied. Programs refer to the functions by name and are cached as others are.
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

from jaxembed.devices.mesh import target_platform

LEAST = 1 << 28  # operations of a product that is worth the way through Python
QUIET = 1.0  # seconds without a product after which no program is under way


class _Version(ctypes.Structure):
    _fields_ = (("size", ctypes.c_size_t), ("extension", ctypes.c_void_p), ("major", ctypes.c_int), ("minor", ctypes.c_int))


class _Metadata(ctypes.Structure):
    _fields_ = (("size", ctypes.c_size_t), ("version", _Version), ("traits", ctypes.c_uint32))


class _Extension(ctypes.Structure):
    """Its presence asks a function for its version, and for nothing else."""

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


class _Call(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_size_t), ("extension", ctypes.POINTER(_Extension)), ("api", ctypes.c_void_p),
        ("context", ctypes.c_void_p), ("stage", ctypes.c_int), ("operands", _Buffers), ("results", _Buffers),
    )  # fmt: skip


_Function = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_Call))


def _matrix(buffer: Any) -> np.ndarray:
    rows, columns = buffer.contents.shape[:2]
    numbers = (ctypes.c_float * (rows * columns)).from_address(buffer.contents.data)
    return np.frombuffer(numbers, np.float32).reshape(rows, columns)


class _Calls:
    """When the last call ended; infinite while one runs. `turn`: two at once, each on every core, would take twice as long."""

    ended = -math.inf
    turn = threading.Lock()


def _multiplier(first: Callable[[np.ndarray], np.ndarray], second: Callable[[np.ndarray], np.ndarray]) -> Any:
    def multiply(call: Any) -> None:
        if call.contents.extension:
            version = call.contents.extension.contents.metadata.contents.version
            version.major, version.minor = 0, 1
            return
        a, b = (_matrix(call.contents.operands.buffers[i]) for i in range(2))
        made = _matrix(call.contents.results.buffers[0])
        with _Calls.turn:
            _Calls.ended = math.inf
            try:
                np.matmul(first(a), second(b), out=made)
            except BaseException:  # ctypes prints it and goes on: nobody must take what is there for a product
                made.fill(np.nan)
                raise
            finally:
                _Calls.ended = time.monotonic()

    return _Function(multiply)


def _whole(x: np.ndarray) -> np.ndarray:
    return x


# By which operand is transposed; they live as long as XLA may call them.
_FUNCTIONS = {
    "": _multiplier(_whole, _whole),
    "first": _multiplier(np.transpose, _whole),
    "second": _multiplier(_whole, np.transpose),
}


def _register() -> None:
    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.restype, capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    for transposed, function in _FUNCTIONS.items():
        address = ctypes.cast(function, ctypes.c_void_p)
        jax.ffi.register_ffi_target(_name(transposed), capsule(address, None, None), platform="cpu")


def _name(transposed: str) -> str:
    return f"jaxembed_product_{transposed}"


_register()


@atexit.register
def _wait() -> None:
    """A program that was left alone, as by an error, still calls; it would wait for an interpreter that has ended for ever."""
    while time.monotonic() - _Calls.ended < QUIET:
        time.sleep(0.02)


def multiplies(x: jax.Array, kernel: jax.Array) -> bool:
    """Whether `product` is for these: large matrices of float32, on a CPU that is not split into several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    plain = x.ndim == 2 and x.dtype == kernel.dtype == np.float32 and target_platform() == "cpu"
    return plain and (mesh.empty or mesh.size == 1) and 2 * x.size * kernel.shape[1] >= LEAST


def _by_blas(transposed: str, a: jax.Array, b: jax.Array) -> jax.Array:
    rows = a.shape[1] if transposed == "first" else a.shape[0]
    columns = b.shape[0] if transposed == "second" else b.shape[1]
    made = jax.ffi.ffi_call(_name(transposed), jax.ShapeDtypeStruct((rows, columns), np.float32))(a, b)
    assert isinstance(made, jax.Array)
    return made


@jax.custom_vjp
def product(x: Float32[Array, "t i"], kernel: Float32[Array, "i o"]) -> Float32[Array, "t o"]:
    """x @ kernel."""
    return _by_blas("", x, kernel)


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return product(x, kernel), (x, kernel)


def _backward(kept: tuple[jax.Array, jax.Array], of_y: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    return _by_blas("second", of_y, kernel), _by_blas("first", x, of_y)


product.defvjp(_forward, _backward)
