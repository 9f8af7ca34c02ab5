"""The commands of ``affkd``: what each takes and which part of the trainer it calls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.table import Table

from affkd_kernels.presets import describe, list_presets
from affkd_kernels.published import Preset
from affkd_kernels.trainer.config import TrainConfig


def train_parser(description: str = "Train a student against a teacher.") -> ArgumentParser:
    parser = ArgumentParser(description=description)
    parser.add_argument(
        "-c",
        "--config",
        action="config",
        help="a recipe in YAML; of several, a later one changes what it names",
    )
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


def teacher_parser() -> ArgumentParser:
    return train_parser("Train the teacher of a recipe alone, to share it among runs.")


def eval_parser() -> ArgumentParser:
    parser = ArgumentParser(description="Accuracy, neighbors, retrieval, similarity to the teacher")
    parser.add_argument("run", type=str, help="a run folder")
    parser.add_argument("--checkpoint", type=Literal["last", "best"], default="last")
    parser.add_argument("--root", type=str | None, default=None, help="where the data set lies now")
    parser.add_argument("--device", type=str, default="cpu", help="cpu, cuda, ...")
    return parser


def grid_parser() -> ArgumentParser:
    from affkd_kernels.trainer.grid.config import GridConfig

    parser = ArgumentParser(description="Train every combination of a study; it can be continued.")
    parser.add_argument("-c", "--config", action="config", help="the study in YAML")
    parser.add_class_arguments(GridConfig)
    return parser


def report_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="All finished runs below a folder in one table, or what a study shows."
    )
    parser.add_argument("runs", type=str, help="a folder of run folders, at any depth, or a grid's")
    return parser


def tiny_parser() -> ArgumentParser:
    parser = ArgumentParser(description="Write a tiny data set in CIFAR's own format.")
    parser.add_argument("root", type=str, help="folder to write it into: the data.root of a run")
    parser.add_argument("--name", type=Literal["cifar10", "cifar100"], default="cifar100")
    parser.add_argument("--train", type=int, default=500, help="training images")
    parser.add_argument("--test", type=int, default=200, help="test images")
    parser.add_argument("--seed", type=int, default=0, help="decides the images")
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
    return _train(*configuration(options))


def run_teacher(options: Namespace) -> int:
    from affkd_kernels.trainer.run import teacher_run

    config, resume = configuration(options)
    return _train(teacher_run(config, Path(config.out)), resume)


def configuration(options: Namespace) -> tuple[TrainConfig, bool]:
    """The run that recipes and flags ask for together, and whether to resume it."""
    options.pop("config", None)
    resume = options.pop("resume") == "auto"
    imports = [*options.pop("imports"), *options.pop("import")]
    return TrainConfig(imports=imports, **options), resume


def _train(config: TrainConfig, resume: bool) -> int:
    from affkd_kernels.trainer.processes import is_main
    from affkd_kernels.trainer.report import progress_line
    from affkd_kernels.trainer.run import run

    def show(record: dict[str, Any]) -> None:
        console.print(progress_line(record), markup=False, soft_wrap=True)

    console = Console(quiet=not is_main())
    summary = run(config, resume, observe=show)
    last, best, cost = summary["last"], summary["best"], summary["cost"]
    console.print(
        f"accuracy {last['test_accuracy']:.1f} % (best {best['test_accuracy']:.1f} % after epoch "
        f"{best['epoch']}), 5-NN {last['neighbor_accuracy']:.1f} %, "
        f"{summary['seconds']:.1f} s, in {config.out}",
        soft_wrap=True,
    )
    if cost["step_milliseconds"] is not None:
        console.print(cost_line(cost), soft_wrap=True)
    return 0


def cost_line(cost: dict[str, float | None]) -> str:
    """What a run took, as a line to read."""
    named = {
        "step_milliseconds": "{:.2f} ms a step",
        "relation_milliseconds": "{:.2f} ms of it the relational terms",
        "peak_memory_mib": "at most {:.0f} MiB",
    }
    return ", ".join(text.format(cost[n]) for n, text in named.items() if cost[n] is not None)


def run_eval(options: Namespace) -> int:
    from affkd_kernels.trainer.assess import assess

    scores = assess(Path(options.run), options.checkpoint, options.root, options.device)
    names = {"top1": "top-1", "top5": "top-5", "neighbors": "5-NN", "retrieval": "retrieval mAP"}
    figures = [f"{text} {scores[n]:.1f} %" for n, text in names.items() if n in scores]
    if "cka" in scores:
        figures.append(f"CKA to the teacher {scores['cka']:.3f}")
    print(", ".join(figures))
    return 0


def run_grid(options: Namespace) -> int:
    from affkd_kernels.trainer.grid.config import GridConfig
    from affkd_kernels.trainer.grid.run import Grid

    options.pop("config", None)
    console = Console()
    grid = Grid(
        GridConfig(**options), lambda text: console.print(text, markup=False, soft_wrap=True)
    )
    rows = grid.run()
    failed = sum(row["failure"] is not None for row in rows)
    console.print(f"{len(rows)} runs, {failed} failed, in {grid.folder / 'results.csv'}")
    return 1 if failed else 0


def run_report(options: Namespace) -> int:
    from affkd_kernels.trainer.runs import report_runs
    from affkd_kernels.trainer.study.report import is_study, report_study

    folder = Path(options.runs)
    if not is_study(folder):
        print(report_runs(folder))
        return 0
    # a pipe has no width, and a figure that is cut is none
    console = Console(width=140)
    console.print(str(report_study(folder, console)), markup=False, soft_wrap=True)
    return 0


def run_tiny(options: Namespace) -> int:
    from affkd_kernels.trainer.data.tiny import write_tiny_cifar

    root = Path(options.root)
    folder = write_tiny_cifar(root, options.name, options.train, options.test, options.seed)
    print(f"{folder}; --data.name {options.name} --data.root {root} --data.verify false takes it")
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
    "teacher": (teacher_parser, run_teacher, "train the teacher of a recipe alone"),
    "eval": (eval_parser, run_eval, "every score of a finished run"),
    "grid": (grid_parser, run_grid, "train every combination of a study"),
    "report": (report_parser, run_report, "all runs of a folder in one table; what a grid shows"),
    "tiny": (tiny_parser, run_tiny, "write a tiny data set in CIFAR's format"),
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
