"""FeatureCapture: what is captured, when it is refused, and that the model is left alone."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from affkd_kernels.features import FeatureCapture, Tap, _ignore, find_module, unwrap


class Block(nn.Module):
    """A layer, an activation that may work in place, and a dict output with a nested list."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.activation = nn.ReLU(inplace=inplace)
        self.outputs = Nested()
        self.classifier = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.activation(self.layer(x))
        return self.classifier(self.outputs(x)["states"][-1])


class Nested(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, object]:
        return {"states": [x, x + 1], "count": 2}


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def test_outputs_inputs_and_nested_outputs(x: torch.Tensor) -> None:
    model = Block()
    taps = {
        "layer": "layer",
        "state": Tap("outputs", index=("states", 0)),
        "pooled": Tap("classifier", io="input"),
        "logits": "",
    }
    with FeatureCapture(model, taps) as features:
        logits = model(x)
        taken = dict(features)
        assert list(taken) == list(taps) and len(features) == 4 and "layer" in features
    torch.testing.assert_close(taken["layer"], model.layer(x))
    assert torch.equal(taken["state"] + 1, taken["pooled"])
    assert torch.equal(taken["logits"], logits)
    taken["layer"].sum().backward()
    assert model.layer.weight.grad is not None


def test_each_pass_starts_anew(x: torch.Tensor) -> None:
    model = Block()
    with FeatureCapture(model, ["layer"]) as features:
        model(x)
        model(2 * x)
        torch.testing.assert_close(features["layer"], model.layer(2 * x))


def test_in_place_activation_does_not_reach_the_feature(x: torch.Tensor) -> None:
    model = Block(inplace=True)
    with FeatureCapture(model, ["layer"]) as features:
        model(x)
        feature = features["layer"]
    torch.testing.assert_close(feature, model.layer(x))
    assert feature.min() < 0


def test_input_of_an_in_place_module_is_taken_before_it_runs(x: torch.Tensor) -> None:
    model = Block(inplace=True)
    with FeatureCapture(model, {"z": Tap("activation", io="input")}) as features:
        model(x)
        assert features["z"].min() < 0


@pytest.mark.parametrize("grad", [True, False])
def test_a_change_in_place_that_was_not_copied_raises(x: torch.Tensor, grad: bool) -> None:
    model = Block(inplace=True)
    with FeatureCapture(model, ["layer"], clone=False) as features, torch.set_grad_enabled(grad):
        model(x)
        with pytest.raises(RuntimeError, match="'layer' was changed in place.*clone=True"):
            features["layer"]


def test_functional_change_in_place_is_found_too(x: torch.Tensor) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Flatten())
    model.forward = lambda x: nn.functional.relu_(model[0](x))  # type: ignore[method-assign]
    with FeatureCapture(model, ["0"]) as features:
        model(x)
        with pytest.raises(RuntimeError, match="changed in place"):
            features["0"]
    with FeatureCapture(model, ["0"], clone=True) as features:
        model(x)
        torch.testing.assert_close(features["0"], model[0](x))


def test_nothing_is_copied_without_need(x: torch.Tensor) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with FeatureCapture(model, {"out": ""}) as features:
        assert features._clone is False
        out = model(x)
        assert features["out"] is out


def test_inference_mode(x: torch.Tensor) -> None:
    model = Block(inplace=True)
    with FeatureCapture(model, ["layer"], clone=False) as features, torch.inference_mode():
        model(x)
        torch.testing.assert_close(features["layer"], model.layer(x))


@pytest.mark.parametrize("repeated", ["raise", "first", "last", "all"])
def test_a_module_called_twice(x: torch.Tensor, repeated: str) -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, layer)
    with FeatureCapture(model, ["0"], repeated=repeated) as features:
        model(x)
        first, last = layer(x), layer(layer(x))
        features.clear()
        model(x)
        if repeated == "raise":
            with pytest.raises(RuntimeError, match="ran 2 times.*repeated='first'"):
                features["0"]
        else:
            expected = {"first": first, "last": last, "all": [first, last]}[repeated]
            torch.testing.assert_close(features["0"], expected)


def test_recomputation_in_the_backward_does_not_disturb(x: torch.Tensor) -> None:
    class Checkpointed(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            run = torch.utils.checkpoint.checkpoint
            return self.classifier(run(self.layer, x, use_reentrant=False))

    model = Checkpointed()
    with FeatureCapture(model, ["layer"]) as features:
        for _ in range(2):
            loss = model(x).sum() + features["layer"].square().sum()
            loss.backward()


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")]
)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_are_looked_through(x: torch.Tensor, wrap: Callable, prefix: str) -> None:
    model = Block()
    wrapped = wrap(model)
    assert unwrap(wrapped) is model
    with FeatureCapture(wrapped, {"z": prefix + "layer"}) as features:
        wrapped(x)
        torch.testing.assert_close(features["z"], model.layer(x))


def test_distributed_wrapper(x: torch.Tensor, tmp_path) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(Block(inplace=True))
        with FeatureCapture(model, ["layer"]) as features:
            model(x)
            torch.testing.assert_close(features["layer"], unwrap(model).layer(x))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_model_with_an_in_place_activation(x: torch.Tensor, backend: str) -> None:
    torch.compiler.reset()
    model = Block(inplace=True)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with FeatureCapture(compiled, ["layer"]) as features:
        for scale in (1, 2):
            logits = compiled(scale * x)
            feature = features["layer"]
            torch.testing.assert_close(feature, model.layer(scale * x))
        (logits.sum() + feature.sum()).backward()
    assert model.layer.weight.grad is not None


def reload(model: nn.Module) -> nn.Module:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


def test_removal_leaves_the_model_as_it_was(x: torch.Tensor) -> None:
    model = Block()
    capture = FeatureCapture(model, ["layer"])
    model(x)
    capture.remove()
    torch.testing.assert_close(reload(model)(x), copy.deepcopy(model)(x))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    model(x)
    with pytest.raises(RuntimeError, match="'layer' is gone: the capture is closed"):
        capture["layer"]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, reload])
def test_copies_made_meanwhile_do_not_write_to_the_capture(
    x: torch.Tensor, duplicate: Callable
) -> None:
    model = Block()
    with FeatureCapture(model, ["layer"]) as features:
        twin = duplicate(model)
        # a working hook would keep the whole capture, and every feature, alive in the copy
        assert set(twin.layer._forward_hooks.values()) == {_ignore}
        model(x)
        kept = features["layer"]
        twin(3 * x)
        assert features["layer"] is kept


@pytest.mark.parametrize(
    ("taps", "options", "error", "message"),
    [
        (["layr"], {}, ValueError, "got 'layr'; close to it: layer"),
        (["zzzzzz"], {}, ValueError, "known: layer, activation, outputs, classifier"),
        ("layer", {}, TypeError, "got the string 'layer'"),
        ({"a": Tap("layer", io="inputs")}, {}, ValueError, r"taps\['a'\]: io must be.*'inputs'"),
        (["layer"], {"clone": "yes"}, ValueError, "clone must be True, False or 'auto', got 'yes'"),
        (["layer"], {"repeated": "both"}, ValueError, "repeated must be one of .* got 'both'"),
    ],
)
def test_bad_arguments(taps: object, options: dict, error: type, message: str) -> None:
    model = Block()
    with pytest.raises(error, match=message):
        FeatureCapture(model, taps, **options)
    assert not model.layer._forward_hooks and not model._forward_pre_hooks


@pytest.mark.parametrize(
    ("tap", "error", "message"),
    [
        (Tap("outputs"), TypeError, "a dict with keys .'states', 'count'.; choose one with Tap"),
        (Tap("outputs", index="state"), ValueError, "index 'state' does not fit.*keys"),
        (Tap("outputs", index=("states", 2)), ValueError, "a list of 2"),
        (Tap("outputs", index="count"), TypeError, "must be a tensor, got a int"),
    ],
)
def test_bad_index(x: torch.Tensor, tap: Tap, error: type, message: str) -> None:
    model = Block()
    with FeatureCapture(model, {"a": tap}), pytest.raises(error, match=message):
        model(x)


def test_unknown_name_suggests(x: torch.Tensor) -> None:
    with FeatureCapture(Block(), ["layer"]) as features, pytest.raises(KeyError, match="layer"):
        features["layers"]


def test_reading_after_the_with_says_that_it_is_too_late(x: torch.Tensor) -> None:
    model = Block()
    with FeatureCapture(model, ["layer"]) as features:
        with pytest.raises(RuntimeError, match="no forward pass has gone through 'layer'"):
            features["layer"]
        model(x)
    with pytest.raises(RuntimeError, match="the capture is closed; read features inside"):
        features["layer"]


def test_an_input_given_by_keyword_is_told_as_such(x: torch.Tensor) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.forward = lambda x: model[0](input=x)  # type: ignore[method-assign]
    with (
        FeatureCapture(model, {"z": Tap("0", io="input")}),
        pytest.raises(ValueError, match=r"taps\['z'\]: '0' was called with keyword arguments only"),
    ):
        model(x)


def test_a_compiled_part_on_the_way_is_looked_through(x: torch.Tensor) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))
    inner = model[0][0]
    model[0] = torch.compile(model[0], backend="eager")
    for path in ("0.0", "0._orig_mod.0"):
        with FeatureCapture(model, {"f": path}) as features:
            model(x)
            torch.testing.assert_close(features["f"], inner(x))
    assert find_module(model, "0") is model[0]


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.body, x, use_reentrant=self.reentrant)


def test_a_feature_without_a_graph_in_a_part_that_trains_is_an_error(x: torch.Tensor) -> None:
    model = Checkpointed(reentrant=True)
    with (
        FeatureCapture(model, ["body.0"]),
        pytest.raises(RuntimeError, match="'body.0' is training but ran without a graph"),
    ):
        model(x.requires_grad_())


@pytest.mark.parametrize("freeze", [nn.Module.eval, lambda m: m.requires_grad_(False)])
def test_a_frozen_part_may_run_without_a_graph(x: torch.Tensor, freeze) -> None:
    model = Checkpointed(reentrant=True)
    freeze(model.body)
    with FeatureCapture(model, ["body.0"]) as features:
        model(x.requires_grad_())
        assert not features["body.0"].requires_grad


def test_checkpointing_without_reentry_keeps_the_graph(x: torch.Tensor) -> None:
    model = Checkpointed(reentrant=False)
    with FeatureCapture(model, ["body.0"]) as features:
        model(x)
        features["body.0"].sum().backward()
    assert model.body[0].weight.grad is not None
