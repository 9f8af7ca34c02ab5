"""Whether Triton can build what a launch needs: found out before a loss depends on it.

Triton compiles a piece of C that talks to the GPU's driver, and keeps it, and all kernels, in a
folder on disk. A slim container may have no compiler, no Python headers or no such folder.
"""

from __future__ import annotations

import os
import shutil
import tempfile


def missing() -> str | None:
    """What Triton lacks on this machine, None where it has everything."""
    return _folder_missing() or _launcher_missing()


def _folder_missing() -> str | None:
    from triton import knobs

    try:
        os.makedirs(knobs.cache.dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=knobs.cache.dir):
            return None
    except OSError as error:
        return f"Triton cannot write to its cache, set TRITON_CACHE_DIR to a folder: {error}"


def _launcher_missing() -> str | None:
    """Builds and loads what every launch goes through, as the first launch would."""
    from triton.runtime import driver

    needs = "Triton cannot build its launcher, which takes a C compiler and Python's headers"
    try:
        utils = driver.active.utils
    except Exception as error:  # of the compiler, the linker, the loader or the search for them
        return f"{needs}: {error}"
    # an older Triton builds one for every new signature, and the compiler may have gone since
    if not hasattr(utils, "launch") and not _has_compiler():
        return f"{needs}: there is neither gcc nor clang, and CC is not set"
    return None


def _has_compiler() -> bool:
    return bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))
