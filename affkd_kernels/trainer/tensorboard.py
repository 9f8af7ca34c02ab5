"""The records of a run for TensorBoard, which is imported only where it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Observer = Callable[[dict[str, Any]], None]
PLACE = ("epoch", "step", "seconds")


@contextmanager
def writing(folder: Path, observe: Observer) -> Iterator[Observer]:
    """An observer that writes every number of a record into ``folder`` and passes it on."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(f"tensorboard: true needs the package tensorboard ({error})") from error

    with SummaryWriter(str(folder / "tensorboard")) as writer:

        def write(record: dict[str, Any]) -> None:
            for name, value in _numbers(record):
                writer.add_scalar(f"{record['kind']}/{name}", value, record["step"])
            observe(record)

        yield write


def _numbers(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _numbers(value)
        elif isinstance(value, (int, float)) and name not in PLACE:
            yield name, value
