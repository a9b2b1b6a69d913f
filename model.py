"""ResNet18 (He et al. 2015, https://arxiv.org/abs/1512.03385) in the form for 32x32 images.

python model.py                print the stages: output shape and parameters
"""

from collections import OrderedDict
from functools import partial

import torch
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

WIDTH = 64  # channels of the first convolution
NORMS = {  # each is called with the number of channels
    "batch": nn.BatchNorm2d,  # Ioffe and Szegedy 2015
    "layer": partial(nn.GroupNorm, 1),  # Ba et al. 2016: each image separately, over channels and positions
}


class Normalize(nn.Module):
    """(images - mean) / std, channel by channel, for images (N, 3, H, W) in [0, 1]."""

    def __init__(self, mean, std):
        super().__init__()
        # Buffers are saved with the weights, so the network always gets the statistics it was trained with.
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, 3, 1, 1))

    def forward(self, images):
        return (images - self.mean) / self.std


class StandardizedWeight(nn.Module):
    """Weight standardization (Qiao et al. 2019): gives every filter mean 0 and variance 1."""

    def forward(self, weight):  # (channels, in_channels, H, W)
        # layer_norm does this, but its default eps, 1e-5, is too large beside variances of 7e-5.
        return nn.functional.layer_norm(weight, weight.shape[1:], eps=1e-8)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions f and a shortcut around them: relu(f(x) + shortcut(x)), He et al. equation 2."""

    def __init__(self, in_channels, channels, stride, norm):
        super().__init__()
        # No bias: the normalization that follows has its own.
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.norm1 = NORMS[norm](channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = NORMS[norm](channels)
        self.shortcut = nn.Sequential()  # the identity, if the shapes match
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False),
                NORMS[norm](channels),
            )

    def forward(self, x):
        # (N, in_channels, H, W) -> (N, channels, H / stride, W / stride)
        # relu_ and += overwrite their input, which is not needed again: less memory, a little faster.
        out = self.norm1(self.conv1(x)).relu_()
        out = self.norm2(self.conv2(out))
        out += self.shortcut(x)
        return out.relu_()


def make_stage(in_channels, channels, stride, norm):
    """Two blocks. The first changes the number of channels and divides height and width by the stride."""
    return nn.Sequential(
        BasicBlock(in_channels, channels, stride, norm),
        BasicBlock(channels, channels, 1, norm),
    )


class ResNet18(nn.Module):
    """ResNet18 whose first convolution keeps the resolution of 32x32 (3x3, stride 1, no max-pool).

    images (N, 3, 32, 32) in [0, 1] -> logits (N, classes)

    normalize   the images, with the mean and std of each channel; by default they stay as they are
    feature     nn.Sequential of the stages stem, layer1, layer2, layer3, layer4
    classifier  global average pool, flatten, linear
    norm        a key of NORMS, any other raises KeyError; "layer" also standardizes the convolution filters
    width       channels of the stem; 64 is ResNet18, with 11,173,962 parameters for ten classes
    """

    def __init__(self, classes=10, norm="batch", width=WIDTH, mean=(0, 0, 0), std=(1, 1, 1)):
        super().__init__()
        self.name = "ResNet18" if width == WIDTH else f"ResNet18 of width {width}"
        self.classes = classes
        self.normalize = Normalize(mean, std)
        stem = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False),
            NORMS[norm](width),
            nn.ReLU(inplace=True),
        )
        stages = OrderedDict(
            stem=stem,  # (N, width, 32, 32)
            layer1=make_stage(width, width, 1, norm),  # (N, width, 32, 32)
            layer2=make_stage(width, 2 * width, 2, norm),  # (N, 2 width, 16, 16)
            layer3=make_stage(2 * width, 4 * width, 2, norm),  # (N, 4 width, 8, 8)
            layer4=make_stage(4 * width, 8 * width, 2, norm),  # (N, 8 width, 4, 4)
        )
        self.feature = nn.Sequential(stages)
        self.classifier = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8 * width, classes),
        )
        if norm == "layer":
            # After a ReLU no channel is negative, so a large part of what a filter adds up from them is the
            # same for every image. Batch normalization subtracts that part in each channel; layer
            # normalization cannot, and learns slowly. In a filter of mean 0 it nearly cancels out.
            for module in list(self.feature.modules()):
                if isinstance(module, nn.Conv2d):
                    register_parametrization(module, "weight", StandardizedWeight())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.feature(self.normalize(images)))


def count_parameters(module):
    """Number of parameters in a module."""
    return sum(parameter.numel() for parameter in module.parameters())


@torch.no_grad()
def summary(model):
    """A table of a model on the CPU, in eval mode: each stage, its output for one image, its parameters."""
    lines = [model.name, f"{'stage':12}{'output shape':>18}{'parameters':>14}"]
    stages = dict(model.feature.named_children())
    stages["classifier"] = model.classifier
    x = torch.zeros(1, 3, 32, 32)
    for name, stage in stages.items():
        x = stage(x)
        shape = " x ".join(str(size) for size in x.shape[1:])
        lines.append(f"{name:12}{shape:>18}{count_parameters(stage):>14,}")
    lines.append(f"{'total':12}{'':>18}{count_parameters(model):>14,}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(summary(ResNet18().eval()))
