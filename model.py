"""ResNet18 (He et al. 2015, https://arxiv.org/abs/1512.03385) in the form for 32x32 images.

python model.py                print the stages: output shape and parameters
"""

from functools import partial

import torch
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

WIDTH = 64  # channels of the first convolution, the stem
STAGES = {"layer1": (1, 1), "layer2": (2, 2), "layer3": (4, 2), "layer4": (8, 2)}  # times the width, stride
NORMS = {  # each is called with the number of channels
    "batch": nn.BatchNorm2d,  # Ioffe and Szegedy 2015
    "layer": partial(nn.GroupNorm, 1),  # Ba et al. 2016: each image for itself, over channels and positions
}


class StandardizedWeight(nn.Module):
    """Weight standardization (Qiao et al. 2019): every filter is used with mean zero and variance one."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:  # (channels, in_channels, H, W)
        # layer_norm does just this. Its usual eps, 1e-5, is too much for filters of a variance of 4e-5.
        return nn.functional.layer_norm(weight, weight.shape[1:], eps=1e-8)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions f and a shortcut around them: relu(f(x) + shortcut(x)), He et al. equation 2."""

    def __init__(self, in_channels: int, channels: int, stride: int, norm: str):
        super().__init__()
        # No bias: the normalisation that follows has one of its own.
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.norm1 = NORMS[norm](channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = NORMS[norm](channels)
        self.shortcut = nn.Sequential()  # the identity, while shapes agree
        if stride != 1 or in_channels != channels:
            projection = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, NORMS[norm](channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # (N, in_channels, H, W) -> (N, channels, H / stride, W / stride)
        # relu_ and += write over their input, which nothing needs any more: less memory, a little faster.
        out = self.norm1(self.conv1(x)).relu_()
        out = self.norm2(self.conv2(out))
        out += self.shortcut(x)
        return out.relu_()


class ResNet18(nn.Module):
    """ResNet18 whose stem keeps the 32x32 resolution (3x3 convolution, stride 1, no max-pool).

    images (N, 3, 32, 32), normalised -> logits (N, classes)

    feature     nn.Sequential of the stages stem, layer1, layer2, layer3, layer4
    classifier  global average pool, flatten, linear
    norm        a key of NORMS, any other raises KeyError; "layer" also standardises the convolutions' filters
    width       channels of the stem; 64 is ResNet18, with 11,173,962 parameters for ten classes
    """

    def __init__(self, classes: int = 10, norm: str = "batch", width: int = WIDTH):
        super().__init__()
        self.name = "ResNet18" if width == WIDTH else f"ResNet18 of width {width}"
        self.classes = classes
        self.feature = nn.Sequential()
        stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.feature.add_module("stem", nn.Sequential(stem, NORMS[norm](width), nn.ReLU(inplace=True)))
        channels = width
        for stage, (multiple, stride) in STAGES.items():
            first = BasicBlock(channels, multiple * width, stride, norm)
            channels = multiple * width
            second = BasicBlock(channels, channels, 1, norm)
            self.feature.add_module(stage, nn.Sequential(first, second))
        linear = nn.Linear(channels, classes)
        self.classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)
        if norm == "layer":
            # After a ReLU no channel is negative, so the sum that a filter makes of them has a large part
            # that is the same for every image. Batch normalisation subtracts it, channel by channel; layer
            # normalisation cannot, and learns slowly. A filter of mean zero hardly lets it arise.
            for convolution in [m for m in self.feature.modules() if isinstance(m, nn.Conv2d)]:
                register_parametrization(convolution, "weight", StandardizedWeight())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.feature(x))


def count_parameters(module: nn.Module) -> int:
    """Number of trained values in a module."""
    return sum(p.numel() for p in module.parameters())


@torch.no_grad()
def summary(model: ResNet18) -> str:
    """A table with a line per stage: its name, the shape of its output for one image, its parameters."""
    lines = [model.name, f"{'stage':12}{'output shape':>18}{'parameters':>14}"]
    x = torch.zeros(1, 3, 32, 32)
    for name, stage in [*model.feature.named_children(), ("classifier", model.classifier)]:
        x = stage(x)
        shape = " x ".join(str(size) for size in x.shape[1:])
        lines.append(f"{name:12}{shape:>18}{count_parameters(stage):>14,}")
    lines.append(f"{'total':12}{'':>18}{count_parameters(model):>14,}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(summary(ResNet18().eval()))
