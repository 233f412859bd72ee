"""An XLA FFI handler, by ctypes, that does nothing: its results keep what their buffers held before.

It shows that a test's poison would be seen. The structs are those of ``xla/ffi/api/c_api.h``, as far as they are used.
"""

from __future__ import annotations

import ctypes
import functools

import jax

TARGET = "jax_int4mm_tests_untouched_results"

_METADATA_EXTENSION = 1
_API_VERSION = (0, 1)


class _ApiVersion(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension_start", ctypes.c_void_p),
        ("major_version", ctypes.c_int),
        ("minor_version", ctypes.c_int),
    )


class _Metadata(ctypes.Structure):
    _fields_ = (("struct_size", ctypes.c_size_t), ("api_version", _ApiVersion))


class _Extension(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("next", ctypes.c_void_p),
        ("metadata", ctypes.POINTER(_Metadata)),  # Of a metadata extension.
    )


class _CallFrame(ctypes.Structure):
    _fields_ = (("struct_size", ctypes.c_size_t), ("extension_start", ctypes.POINTER(_Extension)))


@ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_CallFrame))
def _handler(call_frame: ctypes._Pointer[_CallFrame]) -> None:
    # Registration asks which version of the API the handler was built for; every other call is a call.
    extension = call_frame.contents.extension_start
    if extension and extension.contents.type == _METADATA_EXTENSION:
        version = extension.contents.metadata.contents.api_version
        version.major_version, version.minor_version = _API_VERSION


@functools.cache
def register() -> str:
    """Register the handler for CPUs and NVIDIA GPUs, once, and return its custom-call target."""
    for platform in ("cpu", "CUDA"):
        jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(_handler), platform=platform)
    return TARGET
