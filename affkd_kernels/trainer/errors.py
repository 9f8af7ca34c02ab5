"""What a user can do something about, and the one place where a broken file becomes a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class FileContentError(ValueError):
    """A file that is there, but does not hold what it should. The message begins with its path."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path}: {problem}")


class MissingDataError(FileNotFoundError):
    """A data set's files, or the package that ships it, are not there."""


class FolderInUseError(OSError):
    """Another process trains in the run folder."""


@contextmanager
def reading(path: Path, expected: str, reason: bool = True) -> Iterator[None]:
    """Turn any failure over the content of ``path`` into a ``FileContentError``.

    A file that cannot be opened keeps its own error, which names the path already. ``reason=False``
    leaves out what the reader said: of a binary file that is no help to anybody, and torch's words
    over a file that it will not unpickle advise to load it unsafely.
    """
    try:
        yield
    except (FileContentError, FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    # a damaged file fails in as many ways as it has bytes
    except Exception as error:
        told = f" ({' '.join(str(error).split())[:200]})" if reason else ""
        raise FileContentError(path, f"not {expected}{told}") from error
