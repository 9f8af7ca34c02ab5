"""The demo: one CNN teacher, tiny students, three amounts of labels, and an honest table."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from affkd_kernels.trainer.balance import balanced_terms
from affkd_kernels.trainer.config import (
    FEATURES,
    DataConfig,
    OptimizerConfig,
    TeacherConfig,
    TrainConfig,
)
from affkd_kernels.trainer.data import ImageData, load_data
from affkd_kernels.trainer.evaluate import evaluate
from affkd_kernels.trainer.loop import Record, Run
from affkd_kernels.trainer.methods import COLUMNS, LABELS_PER_CLASS, METHODS, NONE, Method
from affkd_kernels.trainer.networks import Teacher, load_teacher
from affkd_kernels.trainer.objective import build_relation, distillation
from affkd_kernels.trainer.report import (
    Result,
    append_result,
    markdown_table,
    plot,
    progress_line,
    read_results,
    rich_table,
)
from affkd_kernels.trainer.run import build_objective, run, teacher_run
from affkd_kernels.trainer.run_folder import RunFolder, environment
from affkd_kernels.trainer.step import initial_student


def demo(
    out: str | None = None,
    data: str = "mnist5k",
    seeds: int = 3,
    epochs: int = 6,
    limit: int | None = None,
    threads: int = 1,
) -> int:
    """Run the whole comparison; 0 when complete, 130 when interrupted. Both leave a report.

    One thread by default: networks this small gain little from more, and the figures then repeat
    to the bit whatever the number of cores.
    """
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    folder = Path(out or time.strftime("runs/demo-%Y%m%d-%H%M%S"))
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"the demo's folder {folder} is not empty; choose another with --out")
    config = TrainConfig(
        data=DataConfig(data, limit=limit),
        optimizer=OptimizerConfig(epochs=epochs),
        teacher=TeacherConfig(epochs=epochs),
        threads=threads,
        eval_every=epochs,
        log_every=10**9,
    )
    comparison = Comparison(folder, config, seeds)
    try:
        comparison.run()
    except KeyboardInterrupt:
        comparison.console.print("interrupted: the report holds what was finished")
        return 130
    finally:
        comparison.write_report()
    return 0


class Comparison:
    """Every method in every setting for every seed, with one teacher and one rule for weights."""

    def __init__(self, folder: Path, config: TrainConfig, seeds: int) -> None:
        self.folder = folder
        self.config = config
        self.seeds = seeds
        self.console = Console()
        self.results = folder / "results.jsonl"
        self.teacher_score = "not trained"
        self.weights: dict[str, float] = {}
        self._started = time.perf_counter()

    def run(self) -> None:
        self.console.print(f"demo on {self.config.data.name}, in {self.folder}")
        data = load_data(self.config.data)
        teacher = self._train_teacher(data)
        methods = [self._balance(method, data, teacher) for method in METHODS]
        times = {m.name: loss_milliseconds(m, self.config, data, teacher) for m in methods}
        # seeds outermost: an interrupted demo has whole tables of fewer seeds
        plan = list(self._plan(methods))
        for index, (seed, setting, method) in enumerate(plan, start=1):
            result = self._train_student(data, teacher, method, setting, seed, times[method.name])
            append_result(self.results, result)
            self.console.print(
                f"[{index}/{len(plan)}] {describe_result(result)}", markup=False, soft_wrap=True
            )

    def _plan(self, methods: list[Method]) -> Iterator[tuple[int, str, Method]]:
        for seed in range(self.seeds):
            for setting in LABELS_PER_CLASS:
                for method in methods:
                    if method.possible(setting):
                        yield seed, setting, method

    def _train_teacher(self, data: ImageData) -> Teacher:
        out = self.folder / "teacher"
        config = teacher_run(replace(self.config, eval_every=1), out)
        summary = run(config, observe=self._show_teacher)
        self.teacher_score = f"{summary['last']['test_accuracy']:.1f} %"
        # with the checkpoint in it each student's config.yaml is a recipe for that student
        checkpoint = out / "last.pt"
        named = replace(self.config.teacher, checkpoint=str(checkpoint))
        self.config = replace(self.config, teacher=named)
        return load_teacher(named, checkpoint, [FEATURES], data)

    def _show_teacher(self, record: Record) -> None:
        line = progress_line({"teacher": True, **record})
        self.console.print(line, markup=False, soft_wrap=True)

    def _balance(self, method: Method, data: ImageData, teacher: Teacher) -> Method:
        if not method.terms:
            return method
        terms = balanced_terms(method.terms, self.config, data, teacher)
        self.weights |= {name: term.weight or 0.0 for name, term in terms.items()}
        return replace(method, terms=terms)

    def _train_student(
        self,
        data: ImageData,
        teacher: Teacher,
        method: Method,
        setting: str,
        seed: int,
        milliseconds: float | None,
    ) -> Result:
        name = f"{setting}-{method.name}-seed{seed}".replace(" ", "_").replace("_+_", "+")
        config = replace(
            self.config,
            out=str(self.folder / "students" / name),
            seed=seed,
            data=replace(self.config.data, labels_per_class=LABELS_PER_CLASS[setting]),
            supervision=method.supervision(setting),
            terms=method.terms,
        )
        scores, seconds = self._fit(config, data, teacher, method)
        head_is_trained = method.kd or setting != NONE
        return Result(
            setting,
            method.name,
            seed,
            scores["test_accuracy"] if head_is_trained and method.trained else None,
            scores["neighbor_accuracy"],
            seconds,
            milliseconds,
        )

    def _fit(
        self, config: TrainConfig, data: ImageData, teacher: Teacher, method: Method
    ) -> tuple[dict[str, float], float]:
        if not method.trained:
            return evaluate(initial_student(config, data), data), 0.0
        objective = build_objective(config)
        with RunFolder.create(Path(config.out), config.to_dict()) as folder:
            summary = Run(config, folder, data, objective, teacher, lambda record: None).fit()
        return summary["last"], summary["seconds"]

    def write_report(self) -> None:
        order = [method.name for method in METHODS]
        results = sorted(read_results(self.results), key=lambda r: order.index(r.method))
        if not results:
            return
        self.console.print(rich_table(results, COLUMNS, self.seeds))
        files = ["report.md", "results.jsonl", *self._plot(results)]
        seconds = time.perf_counter() - self._started
        (self.folder / "report.md").write_text(self._page(results, seconds, "plot.png" in files))
        self.console.print(f"{seconds:.0f} s; {self.folder}: {', '.join(files)}", soft_wrap=True)

    def _plot(self, results: list[Result]) -> list[str]:
        """Draw the plot; the names of the files that came of it."""
        try:
            plot(results, COLUMNS, self.folder / "plot.png")
        except ImportError:
            self.console.print("no plot: it needs matplotlib, as in affkd-kernels[demo]")
            return []
        return ["plot.png"]

    def _page(self, results: list[Result], seconds: float, plotted: bool) -> str:
        planned = len(list(self._plan(list(METHODS))))
        weights = ", ".join(f"{name} {weight:.4g}" for name, weight in self.weights.items())
        machine = environment()
        return PAGE.format(
            data=self.config.data.name,
            teacher=self.teacher_score,
            plot="![the same figures with their spread](plot.png)\n\n" if plotted else "",
            limit=self._limit_text(),
            table=markdown_table(results, COLUMNS, self.seeds),
            finished=len(results),
            planned=planned,
            epochs=self.config.optimizer.epochs,
            weights=weights,
            seconds=seconds,
            torch=machine["packages"]["torch"],
            threads=machine["threads"],
            platform=machine["platform"],
        )

    def _limit_text(self) -> str:
        limit = self.config.data.limit
        return "" if limit is None else f", on the first {limit} training images only"


PAGE = """# Distilling into a tiny student: {data}

{finished} of {planned} students; the teacher reaches {teacher}. Test accuracy in percent, mean and
standard deviation over the seeds.

{table}
{plot}- All students have the same network and {epochs} epochs{limit}; a seed decides the initial
  weights, the order and which images keep their label.
- "10 labels a class": cross-entropy sees at most 100 labeled images, the other terms every image.
  "no labels": the row's distillation term alone, so a head is trained by KD only.
- "head": accuracy of the student's own classifier. "5-NN": the five nearest
  training images in feature space vote, with all labels, whatever the student was trained with.
- KD: 0.1 x cross-entropy + 0.9 x KL at temperature 4. Relational terms: one rule for all weights,
  none tuned. At the initial weights the gradient at the features is as large as that of
  cross-entropy (median of up to 8 batches, seed 0); RKD's two keep the published proportion of 25
  to 50. As `affkd_kernels.preset` takes them: {weights}.
- The table is of {epochs} epochs and says nothing of longer training.
- "loss, ms": forward and backward of the distillation term, down to the features of one batch.
- {seconds:.0f} s in all with torch {torch}, CPU threads: {threads}, {platform}.
"""


def describe_result(result: Result) -> str:
    head = "" if result.accuracy is None else f"accuracy {result.accuracy:.1f} %, "
    return (
        f"{result.setting}, {result.method}, seed {result.seed}: "
        f"{head}5-NN {result.neighbor_accuracy:.1f} %, {result.seconds:.1f} s"
    )


def loss_milliseconds(
    method: Method, config: TrainConfig, data: ImageData, teacher: Teacher
) -> float | None:
    """Median time of the distillation term, forward and backward down to the features."""
    if not (method.kd or method.terms):
        return None
    student = initial_student(config, data)
    rows = torch.arange(min(config.data.batch_size, len(data.train_labels)))
    images = data.train_images[rows]
    features = student.features(images).detach().requires_grad_()
    logits = student.head(features).detach().requires_grad_()
    target = teacher(rows, images)
    relation = build_relation(method.terms) if method.terms else None

    def step() -> None:
        if relation is None:
            distillation(logits, target.logits, 4.0).backward()
        else:
            relation({FEATURES: features}, target.features)[0].backward()

    return 1e3 * statistics.median(_timed(step) for _ in range(50))


def _timed(step: Callable[[], None]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started
