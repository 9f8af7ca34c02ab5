"""MobileNetV2: Sandler et al., Inverted Residuals and Linear Bottlenecks, CVPR 2018."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from affkd_kernels.trainer.models.base import Classifier, normalized_convolution, pooled_classifier

# table 2 of the paper: expansion, filters at width 1, blocks, stride; stage 2 has stride 1 here,
# because the images are small
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
LAST = 1280


class InvertedResidual(nn.Module):
    """Widen by 1 x 1, filter each channel by 3 x 3, narrow by 1 x 1 without a ReLU behind it."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.branch = nn.Sequential(
            normalized_convolution(inputs, width, kernel=1),
            nn.ReLU6(),
            normalized_convolution(width, width, stride=stride, groups=width),
            nn.ReLU6(),
            normalized_convolution(width, outputs, kernel=1),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, maps: Tensor) -> Tensor:
        narrowed = self.branch(maps)
        return maps + narrowed if self.residual else narrowed


def mobilenet_v2_half(channels: int, classes: int) -> Classifier:
    """MobileNetV2 of width 0.5 for 32 x 32 images.

    The last 1 x 1 convolution has 1280 filters at every width below 1.
    """
    inputs = 16
    stem = nn.Sequential(normalized_convolution(channels, inputs, stride=2), nn.ReLU6())
    parts: OrderedDict[str, nn.Module] = OrderedDict(stem=stem)
    for stage, (expansion, filters, depth, stride) in enumerate(STAGES, start=1):
        outputs = filters // 2
        blocks = [InvertedResidual(inputs, outputs, stride, expansion)]
        blocks += [InvertedResidual(outputs, outputs, 1, expansion) for _ in range(depth - 1)]
        parts[f"stage{stage}"] = nn.Sequential(*blocks)
        inputs = outputs
    last = nn.Sequential(normalized_convolution(inputs, LAST, kernel=1), nn.ReLU6())
    return pooled_classifier(parts, LAST, classes, last)
