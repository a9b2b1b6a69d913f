"""ResNet18 (He et al. 2015, https://arxiv.org/abs/1512.03385) in the form for 32x32 images.

python model.py        print the stages: output shape and parameters
"""

import torch
from torch import nn

STEM_CHANNELS = 64  # of the first convolution
STAGES = {"layer1": (64, 1), "layer2": (128, 2), "layer3": (256, 2), "layer4": (512, 2)}  # channels, stride
NORMS = ("batch", "layer")


def norm_layer(norm: str, channels: int) -> nn.Module:
    """Batch normalisation (Ioffe and Szegedy 2015), or layer normalisation (Ba et al. 2016) of each image.

    GroupNorm with one group takes mean and variance over channels and positions, then scales each channel.
    """
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.GroupNorm(1, channels)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut around them: relu(f(x) + shortcut(x)), He et al. equations 1 and 2.

    (N, in_channels, H, W) -> (N, channels, H / stride, W / stride)
    """

    def __init__(self, in_channels: int, channels: int, stride: int, norm: str):
        super().__init__()
        # No bias: the normalisation that follows has one of its own.
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.norm1 = norm_layer(norm, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = norm_layer(norm, channels)
        self.shortcut = nn.Sequential()  # the identity, while shapes agree
        if stride != 1 or in_channels != channels:
            projection = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, norm_layer(norm, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
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
    classes     number of classes, 11,173,962 parameters for ten
    norm        "batch" or "layer"; anything else raises ValueError
    """

    def __init__(self, classes: int = 10, norm: str = "batch"):
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm is {norm!r}, but must be one of {', '.join(NORMS)}")
        self.classes = classes
        self.feature = nn.Sequential()
        in_channels = STEM_CHANNELS
        stem = nn.Conv2d(3, in_channels, 3, padding=1, bias=False)
        relu = nn.ReLU(inplace=True)
        self.feature.add_module("stem", nn.Sequential(stem, norm_layer(norm, in_channels), relu))
        for name, (channels, stride) in STAGES.items():
            first = BasicBlock(in_channels, channels, stride, norm)
            second = BasicBlock(channels, channels, 1, norm)
            self.feature.add_module(name, nn.Sequential(first, second))
            in_channels = channels
        self.classifier = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_channels, classes)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.feature(x))


def count_parameters(module: nn.Module) -> int:
    """Number of trained values in a module."""
    return sum(p.numel() for p in module.parameters())


@torch.no_grad()
def summary(model: ResNet18) -> str:
    """A table with a line a stage: its name, the shape of what it puts out for one image, its parameters."""
    lines = [f"{'stage':12}{'output shape':>18}{'parameters':>14}"]
    x = torch.zeros(1, 3, 32, 32)
    for name, stage in [*model.feature.named_children(), ("classifier", model.classifier)]:
        x = stage(x)
        shape = " x ".join(str(size) for size in x.shape[1:])
        lines.append(f"{name:12}{shape:>18}{count_parameters(stage):>14,}")
    lines.append(f"{'total':12}{'':>18}{count_parameters(model):>14,}")
    return "\n".join(lines)


def main() -> None:
    print(summary(ResNet18().eval()))


if __name__ == "__main__":
    main()
