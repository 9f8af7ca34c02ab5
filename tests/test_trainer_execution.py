"""Ways to execute a run: half precision, parts of a batch, compiled, channels last, TensorBoard."""

from __future__ import annotations

import sys
import types
from dataclasses import replace

import pytest
import torch
from torch import nn
from trainer_runs import ignore, records, small, total_losses

from affkd_kernels.trainer.config import (
    DataConfig,
    SupervisionConfig,
    TeacherConfig,
    TermConfig,
)
from affkd_kernels.trainer.data import load_data
from affkd_kernels.trainer.data.tiny import write_tiny_cifar
from affkd_kernels.trainer.loop import Run
from affkd_kernels.trainer.models import MODELS, Classifier
from affkd_kernels.trainer.networks import ObservedNetwork, Teacher
from affkd_kernels.trainer.precision import Precision
from affkd_kernels.trainer.run import build_objective, run
from affkd_kernels.trainer.run_folder import RunFolder, load_checkpoint
from affkd_kernels.trainer.step import batch_order, initial_student, own_part, step_losses


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_trains_nearly_the_same_and_keeps_float32_weights(tmp_path, precision):
    config = small(tmp_path / "whole", supervision=SupervisionConfig(kd=1.0))
    run(config, observe=ignore)
    checkpoint = str(tmp_path / "whole/teacher/last.pt")
    teacher = TeacherConfig(checkpoint=checkpoint)
    out = tmp_path / precision
    run(replace(config, out=str(out), precision=precision, teacher=teacher), observe=ignore)
    whole, half = total_losses(tmp_path / "whole"), total_losses(out)
    assert half != whole and half == pytest.approx(whole, rel=0.02)
    state = load_checkpoint(out / "last.pt")
    assert all(v.dtype == torch.float32 for k, v in state["weights"].items() if "num" not in k)
    assert bool(state["scaler"]) == (precision == "float16")


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_the_network_computes_in_the_precision_that_is_asked_for(precision):
    model = MODELS["cnn_student"](1, 10)
    network = ObservedNetwork(model, ["features"], Precision(precision))
    outputs = network(torch.randn(4, 1, 8, 8))
    assert outputs.features["features"].dtype == getattr(torch, precision)
    assert outputs.logits.dtype == torch.float32


def test_a_scaled_step_that_overflows_is_left_out_and_the_scale_falls(tmp_path):
    config = small(tmp_path / "run", precision="float16", loss=TermConfig())
    data = load_data(config.data)
    folder = RunFolder.create(tmp_path / "run", config.to_dict())
    training = Run(config, folder, data, build_objective(config), observe=ignore)
    before = [p.clone() for p in training.model.parameters()]
    # the largest finite scale: every gradient becomes infinite
    training.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    network = ObservedNetwork(training.model, [], training.precision)
    training._take_step(network, next(training.order.epoch()))
    assert all(torch.equal(a, b) for a, b in zip(before, training.model.parameters(), strict=True))
    assert training.scaler.get_scale() == 2.0**126


@pytest.mark.parametrize("labels", [None, 3])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(labels):
    """Of cross-entropy and KD; the network has no normalization that would see the parts."""
    config = small(
        "unused",
        data=DataConfig("digits", limit=128, batch_size=50, labels_per_class=labels),
        supervision=SupervisionConfig(cross_entropy=0.7, kd=0.3),
        loss=TermConfig(),
    )
    data = load_data(config.data)
    torch.manual_seed(0)
    teacher = Teacher(plain(1, 10), [], data.train_images)
    student = plain(1, 10)
    network = ObservedNetwork(student, [])
    batch = next(batch_order(config, data).epoch())
    found = []
    for count in (1, 4):
        student.zero_grad()
        terms = []
        for index in range(count):
            part, shares = own_part(batch, index, count)
            total, named = step_losses(
                build_objective(config), network, teacher, data, part, shares=shares
            )
            total.backward()
            terms.append(named)
        gradient = torch.cat([p.grad.flatten() for p in student.parameters()])
        found.append((gradient, {n: sum(t[n] for t in terms) for n in terms[0]}))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def plain(channels, classes):
    features = nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, 16), nn.Tanh())
    return Classifier(features, nn.Linear(16, classes))


def test_a_run_in_parts_learns_and_resumes_to_the_bit(tmp_path):
    config = small(tmp_path / "whole", accumulate=3, checkpoint_every=1)
    run(config, observe=ignore)
    assert len(total_losses(tmp_path / "whole")) == 4

    def interrupt(record):
        if record["kind"] == "train" and record["step"] == 2 and not record.get("teacher"):
            raise KeyboardInterrupt

    cut = replace(config, out=str(tmp_path / "cut"))
    with pytest.raises(KeyboardInterrupt):
        run(cut, observe=interrupt)
    run(cut, resume=True, observe=ignore)
    assert total_losses(tmp_path / "cut") == total_losses(tmp_path / "whole")


def test_an_augmented_run_repeats_and_resumes_to_the_bit(tmp_path):
    write_tiny_cifar(tmp_path / "data", train=120, test=50)
    data = DataConfig(
        "cifar100", root=str(tmp_path / "data"), verify=False, crop_padding=4, flip=True
    )
    config = small(
        tmp_path / "first",
        data=data,
        teacher=TeacherConfig(epochs=1),
        checkpoint_every=1,
        supervision=SupervisionConfig(kd=1.0),
        deterministic=True,
    )
    run(config, observe=ignore)

    def interrupt(record):
        if record["kind"] == "train" and record["step"] == 2 and not record.get("teacher"):
            raise KeyboardInterrupt

    again = replace(config, out=str(tmp_path / "again"))
    with pytest.raises(KeyboardInterrupt):
        run(again, observe=interrupt)
    run(again, resume=True, observe=ignore)
    plainly = replace(config, out=str(tmp_path / "plain"), data=replace(data, flip=False))
    run(plainly, observe=ignore)
    losses = {name: total_losses(tmp_path / name) for name in ("first", "again", "plain")}
    assert losses["first"] == losses["again"] != losses["plain"]
    states = [load_checkpoint(tmp_path / name / "last.pt") for name in ("first", "again")]
    for name, value in states[0]["weights"].items():
        assert torch.equal(value, states[1]["weights"][name]), name


@pytest.fixture(autouse=True)
def _undo_determinism():
    yield
    torch.use_deterministic_algorithms(False)


def test_determinism_is_what_was_asked_for(tmp_path):
    for deterministic in (True, False):
        config = small(tmp_path / str(deterministic), deterministic=deterministic)
        run(replace(config, loss=TermConfig()), observe=ignore)
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert torch.backends.cudnn.benchmark != deterministic


def test_channels_last_computes_the_same(tmp_path):
    for channels_last in (False, True):
        config = small(tmp_path / str(channels_last), channels_last=channels_last)
        run(replace(config, loss=TermConfig()), observe=ignore)
    losses = [total_losses(tmp_path / name) for name in ("False", "True")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    model = initial_student(config, load_data(config.data))
    model.to(memory_format=torch.channels_last)
    assert model.features.maps[4].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
def test_a_compiled_student_computes_the_same(tmp_path):
    for compiled in (False, True):
        run(small(tmp_path / str(compiled), compile=compiled, teacher=frozen(tmp_path)),
            observe=ignore)  # fmt: skip
    losses = [total_losses(tmp_path / name) for name in ("False", "True")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def frozen(folder):
    """A teacher that is trained once for all runs of a test."""
    out = folder / "teacher"
    config = small(out, student="cnn_teacher", loss=TermConfig())
    run(config, resume=True, observe=ignore)
    return TeacherConfig(checkpoint=str(out / "last.pt"))


def test_a_run_tells_what_it_costs(tmp_path):
    cost = run(small(tmp_path / "run"), observe=ignore)["cost"]
    assert cost["relation_milliseconds"] > 0 and 0 < cost["step_milliseconds"] < 1e4
    assert cost["peak_memory_mib"] > 10
    alone = run(small(tmp_path / "alone", loss=TermConfig()), observe=ignore)
    assert alone["cost"]["relation_milliseconds"] is None


def test_tensorboard_gets_every_number_at_its_step(tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder):
            self.folder = folder

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            written.append("closed")

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

    module = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    seen = []
    run(small(tmp_path / "run", loss=TermConfig(), tensorboard=True), observe=seen.append)
    assert written[-1] == "closed" and len(seen) == 5
    (score,) = (w for w in written if w[0] == "evaluation/test_accuracy")
    assert score[1:] == (seen[-1]["test_accuracy"], 4)
    assert [w[2] for w in written if w[0] == "train/cross_entropy"] == [1, 2, 3, 4]


def test_tensorboard_reads_back_what_a_run_recorded(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(small(tmp_path / "run", loss=TermConfig(), tensorboard=True), observe=ignore)
    events = reader.EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    read = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    trained = [r for r in records(tmp_path / "run") if r["kind"] == "train"]
    (evaluated,) = (r for r in records(tmp_path / "run") if r["kind"] == "evaluation")
    expected = {
        "train/rate": {r["step"]: r["rate"] for r in trained},
        "train/total": {r["step"]: r["total"] for r in trained},
        "train/cross_entropy": {r["step"]: r["terms"]["cross_entropy"] for r in trained},
    }
    for name in ("test_loss", "test_accuracy", "neighbor_accuracy"):
        expected[f"evaluation/{name}"] = {evaluated["step"]: evaluated[name]}
    assert len(trained) == 4 and read.keys() == expected.keys()
    for tag, values in expected.items():
        # the files hold float32
        assert read[tag] == pytest.approx(values, rel=1e-6), tag


def test_without_tensorboard_the_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="needs the package tensorboard"):
        run(small(tmp_path / "run", loss=TermConfig(), tensorboard=True), observe=ignore)
