"""The ``affkd`` command's entry: exit codes, and every failure as one line.

| exit code | |
|---|---|
| 0 | success |
| 1 | the run failed: a loss became inf or NaN, a backend is wrong |
| 2 | something that was given is wrong: a flag, a name, a file, a folder, a missing package |
| 3 | the data set, or the package that ships it, is missing |
| 130 | Ctrl-C |
"""

from __future__ import annotations

import sys

from affkd_kernels.trainer.errors import MissingDataError

EXTRA = "train"
# what the extra brings and the command cannot start without
EXTRA_MODULES = ("jsonargparse", "rich", "yaml", "numpy")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code says how it went."""
    try:
        # here, so that a plain install gets the sentence below instead of a traceback
        from affkd_kernels.trainer.commands import run_command

        return run_command(arguments)
    except KeyboardInterrupt:
        return _tell("interrupted", 130)
    except MissingDataError as error:
        return _tell(str(error), 3)
    except ModuleNotFoundError as error:
        return _tell(_missing_module(error), 2)
    except (ValueError, TypeError, OSError, ImportError) as error:
        return _tell(str(error), 2)
    except RuntimeError as error:
        return _tell(str(error), 1)


def _missing_module(error: ModuleNotFoundError) -> str:
    package = (error.name or "").split(".")[0]
    if package not in EXTRA_MODULES:
        return str(error)
    return f'affkd needs the package {package!r}: pip install "affkd-kernels[{EXTRA}]" brings it'


def _tell(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
