"""The networks of the CIFAR benchmark: their size, their stages by name, other libraries' ones."""

from __future__ import annotations

import pytest
import torch

from affkd_kernels.features import FeatureCapture
from affkd_kernels.trainer.models import MODELS, STAGES_OF, build_model

# parameters at 100 classes, counted in the code of the published comparison (RepDistiller)
PUBLISHED_PARAMETERS = {
    "resnet8": 83_892,
    "resnet14": 181_108,
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet44": 667_188,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "resnet50": 23_705_252,
    "wrn_16_1": 180_916,
    "wrn_16_2": 703_284,
    "wrn_40_1": 569_780,
    "wrn_40_2": 2_255_156,
    "vgg8": 3_965_028,
    "vgg13": 9_462_180,
    "mobilenet_v2_half": 812_836,
    "shufflenet_v1": 949_258,
    "shufflenet_v2": 1_355_528,
}
# a network of each kind, small enough to run
KINDS = (
    *("cnn_student", "resnet8", "resnet8x4", "wrn_16_1", "vgg8"),
    *("mobilenet_v2_half", "shufflenet_v1", "shufflenet_v2"),
)
LAST_MAPS = {
    "resnet8": (64, 8),
    "resnet8x4": (256, 8),
    "wrn_16_1": (64, 8),
    "vgg8": (512, 4),
    "mobilenet_v2_half": (160, 2),
    "shufflenet_v1": (960, 4),
    "shufflenet_v2": (464, 4),
}


# what the published comparison takes of a network besides its stem: channels and side
STAGES = {
    "resnet8": [(16, 32), (32, 16), (64, 8)],
    "resnet8x4": [(64, 32), (128, 16), (256, 8)],
    "resnet50": [(256, 32), (512, 16), (1024, 8), (2048, 4)],
    "wrn_16_1": [(16, 32), (32, 16), (64, 8)],
    "vgg8": [(128, 16), (256, 8), (512, 4), (512, 4)],
    "mobilenet_v2_half": [(12, 16), (16, 8), (48, 4), (160, 2)],
    "shufflenet_v1": [(240, 16), (480, 8), (960, 4)],
    "shufflenet_v2": [(116, 16), (232, 8), (464, 4)],
}


def test_every_benchmark_network_is_counted():
    assert PUBLISHED_PARAMETERS.keys() == MODELS.keys() - {"cnn_student", "cnn_teacher"}


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_parameter_counts_are_the_published_ones(name):
    with torch.device("meta"):
        model = MODELS[name](3, 100)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED_PARAMETERS[name]


@pytest.mark.parametrize("name", KINDS)
def test_a_model_depends_on_its_seed_alone(name):
    before = torch.get_rng_state()
    first, again, other = (build_model(name, 3, 7, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    weights = [model.state_dict() for model in (first, again, other)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not torch.equal(
        weights[0]["head.weight" if name != "cnn_student" else "head.1.weight"],
        weights[2]["head.weight" if name != "cnn_student" else "head.1.weight"],
    )


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 64, 48)])
def test_a_model_takes_gray_images_and_other_sizes(name, shape):
    model = build_model(name, shape[0], 7, seed=0)
    assert model(torch.randn(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize("name", LAST_MAPS)
def test_stages_and_pooled_features_are_captured_by_name(name):
    model = build_model(name, 3, 10, seed=0).eval()
    stages = [path for path, _ in model.features.maps.named_children()]
    assert stages[-1].startswith("stage")
    paths = [*(f"features.maps.{stage}" for stage in stages), "features.maps", "features"]
    with FeatureCapture(model, paths) as features, torch.no_grad():
        logits = model(torch.randn(2, 3, 32, 32))
        channels, side = LAST_MAPS[name]
        assert features["features.maps"].shape == (2, channels, side, side)
        assert torch.equal(features["features.maps"], features[f"features.maps.{stages[-1]}"])
        sides = [features[path].shape[2] for path in paths[:-2]]
        assert sides == sorted(sides, reverse=True)
        torch.testing.assert_close(model.head(features["features"]), logits)


@pytest.mark.parametrize("name", STAGES)
def test_stages_are_those_of_the_published_comparison(name):
    model = build_model(name, 3, 10, seed=0).eval()
    with FeatureCapture(model, STAGES_OF[name]) as features, torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
        found = [tuple(features[path].shape[1:3]) for path in STAGES_OF[name]]
    assert found == STAGES[name]


def test_every_benchmark_network_has_stages():
    assert STAGES_OF.keys() == MODELS.keys() - {"cnn_student", "cnn_teacher"}


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "shufflenet_v2"])
def test_every_weight_takes_part(name):
    model = build_model(name, 3, 10, seed=0)
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), path


def test_shuffled_channels_reach_every_group():
    from affkd_kernels.trainer.models.base import shuffle_channels

    maps = torch.arange(6.0).reshape(1, 6, 1, 1)
    assert shuffle_channels(maps, 3).flatten().tolist() == [0, 2, 4, 1, 3, 5]
    assert torch.equal(shuffle_channels(maps, 1), maps)


@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x0_5", "mobilenet_v3_small"])
def test_a_torchvision_network_has_features_and_a_head(name):
    from torchvision import models

    model = build_model(f"torchvision:{name}", 3, 10, seed=0).eval()
    assert sum(p.numel() for p in model.parameters()) == sum(
        p.numel() for p in models.get_model(name, num_classes=10).parameters()
    )
    images = torch.randn(2, 3, 64, 64)
    with FeatureCapture(model, ["features"]) as features, torch.no_grad():
        logits = model(images)
        assert logits.shape == (2, 10) and features["features"].ndim == 2
        assert torch.equal(model.head(features["features"]), logits)


def test_a_timm_network_has_features_and_a_head():
    pytest.importorskip("timm")
    model = build_model("timm:resnet18", 1, 10, seed=0).eval()
    images = torch.randn(2, 1, 64, 64)
    with FeatureCapture(model, ["features", "features.layer3"]) as features, torch.no_grad():
        assert model(images).shape == (2, 10)
        assert features["features"].shape == (2, 512) and features["features.layer3"].ndim == 4
    with pytest.raises(ValueError, match="'timm:no_such', which timm does not have"):
        build_model("timm:no_such", 3, 10, seed=0)


@pytest.mark.parametrize(
    ("name", "channels", "message"),
    [
        ("resnet", 3, "'resnet'.*cnn_student, cnn_teacher.*torchvision:NAME, timm:NAME"),
        ("keras:resnet", 3, "model is 'keras:resnet'; valid are"),
        ("torchvision:resnet", 3, "torchvision.models does not have"),
        ("torchvision:resnet18", 1, "takes images of 3 channels, got 1"),
        ("torchvision:squeezenet1_0", 3, "no linear layer"),
    ],
)
def test_a_network_that_is_not_there_is_named_with_the_valid_ones(name, channels, message):
    with pytest.raises(ValueError, match=message):
        build_model(name, channels, 10, seed=0)
