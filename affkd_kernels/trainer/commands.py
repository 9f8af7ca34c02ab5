"""The commands of ``affkd``: train, demo, list, describe, doctor."""

from __future__ import annotations

from collections.abc import Callable
from textwrap import shorten
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.table import Table

from affkd_kernels.presets import describe, list_presets
from affkd_kernels.published import Preset
from affkd_kernels.trainer.config import TrainConfig


def train_parser() -> ArgumentParser:
    parser = ArgumentParser(description="Train a student against a teacher.")
    parser.add_argument("-c", "--config", action="config", help="a recipe in YAML")
    parser.add_class_arguments(TrainConfig)
    parser.add_argument(
        "--import",
        type=str,
        action="append",
        default=[],
        metavar="MODULE",
        help="a module to import first, such as one that registers components; may be repeated",
    )
    parser.add_argument(
        "--resume",
        type=Literal["never", "auto"],
        default="never",
        help="auto continues the run in the folder `out` where there is one",
    )
    return parser


def demo_parser() -> ArgumentParser:
    parser = ArgumentParser(description="Distill a CNN into tiny students three ways; a table.")
    parser.add_argument("--out", type=str | None, default=None, help="folder of the report")
    parser.add_argument("--data", type=str, default="mnist5k", help="mnist5k or digits")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row, at least 1")
    parser.add_argument("--epochs", type=int, default=6, help="epochs of each student")
    parser.add_argument("--limit", type=int | None, default=None, help="fewer training images")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    return parser


def describe_parser() -> ArgumentParser:
    parser = ArgumentParser(description="Formula, source, weight and traps of a preset.")
    parser.add_argument("name", type=str, help="a name from `affkd list`")
    return parser


def run_train(options: Namespace) -> int:
    from affkd_kernels.trainer.loop import run
    from affkd_kernels.trainer.report import progress_line

    def show(record: dict[str, Any]) -> None:
        console.print(progress_line(record), markup=False, soft_wrap=True)

    console = Console()
    resume = options.pop("resume") == "auto"
    options.pop("config", None)
    imports = [*options.pop("imports"), *options.pop("import")]
    config = TrainConfig(imports=imports, **options)
    summary = run(config, resume, observe=show)
    last, best = summary["last"], summary["best"]
    console.print(
        f"accuracy {last['test_accuracy']:.1f} % (best {best['test_accuracy']:.1f} % after epoch "
        f"{best['epoch']}), 5-NN {last['neighbor_accuracy']:.1f} %, "
        f"{summary['seconds']:.1f} s, in {config.out}"
    )
    return 0


def run_demo(options: Namespace) -> int:
    from affkd_kernels.trainer.demo import demo

    return demo(**options.as_dict())


def run_list(options: Namespace) -> int:
    table = Table("preset", "affinity", "normalization", "loss", "weight (batch)", "source")
    for preset in map(describe, list_presets()):
        triple = preset.triple or ("triplet angle", "-", "-")
        table.add_row(
            preset.name, *triple, _weight(preset), shorten(preset.source, 44, placeholder=" ...")
        )
    # wide enough for every row: a pipe has no width, and a cut name could not be used
    Console(width=140).print(table)
    return 0


def _weight(preset: Preset) -> str:
    if preset.published_weight is None:
        return "-"
    batch = f" ({preset.published_batch})" if preset.published_batch else ""
    return f"{preset.published_weight:g}{batch}"


def run_describe(options: Namespace) -> int:
    print(describe(options.name))
    return 0


def run_doctor(options: Namespace) -> int:
    from affkd_kernels.trainer.doctor import doctor

    return doctor()


COMMANDS: dict[str, tuple[Callable[[], ArgumentParser], Callable[[Namespace], int], str]] = {
    "train": (train_parser, run_train, "train a student from a recipe and flags"),
    "demo": (demo_parser, run_demo, "train a teacher and tiny students, print the table"),
    "list": (ArgumentParser, run_list, "the published methods that come as presets"),
    "describe": (describe_parser, run_describe, "everything about one preset"),
    "doctor": (ArgumentParser, run_doctor, "versions, backends, and a check of each"),
}


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="affkd", description="Affinity-based knowledge distillation.")
    commands = parser.add_subcommands(dest="command", required=True)
    for name, (build, _, summary) in COMMANDS.items():
        commands.add_subcommand(name, build(), help=summary)
    return parser


def run_command(arguments: list[str] | None = None) -> int:
    """Parse the command line and run its command; the exit code."""
    parser = build_parser()
    parsed = parser.parse_args(arguments)
    command = parsed.command
    return COMMANDS[command][1](parser.instantiate(parsed)[command])
