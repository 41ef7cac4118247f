"""Mistakes that can be seen before an engine is started, which takes half a minute to say so itself."""

from __future__ import annotations

import ctypes
import os
import socket

from relay_serving.errors import ModelNotFoundError, PortUnavailableError, SystemLibraryError

CPU_LIBRARY = "libnuma.so.1"  # vLLM's CPU kernels are linked with it, and its wheel does not bring it


def check_model(model: str | None) -> None:
    """A path that is not there is not a hub id: say so before the hub is asked for it. Raises ModelNotFoundError."""
    if model is None or os.path.exists(model) or "://" in model:
        return
    looks_like_a_path = model.startswith((".", "/", "~")) or model.count("/") > 1
    if looks_like_a_path:
        raise ModelNotFoundError(
            f"no model folder at {model!r}; check the path, or leave it out for the embedded model"
        )


def check_port(host: str, port: int) -> None:
    """Raises PortUnavailableError; the empty host is every interface."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise PortUnavailableError(
                f"cannot listen on {host or '0.0.0.0'}:{port}: {error.strerror or error}; "
                "stop what is using it or pass another --port (or --host)"
            ) from error


def check_library(name: str) -> None:
    """A system library vLLM cannot do without; it would only warn, and fail later. Raises SystemLibraryError."""
    try:
        ctypes.CDLL(name)
    except OSError as error:
        raise SystemLibraryError(
            f"vLLM's CPU kernels need the system library {name}, which does not load ({error}); "
            "install it (Debian, Ubuntu: apt-get install libnuma1; Fedora: dnf install numactl-libs)"
        ) from error
