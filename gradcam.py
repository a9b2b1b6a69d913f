"""Grad-CAM (Selvaraju et al. 2017, https://arxiv.org/abs/1610.02391) of the network's errors on the test set.

python gradcam.py --n 10                 the ten errors of which it was most confident
python gradcam.py --n 20 --seed 1        twenty at random
"""

import argparse
import textwrap
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

import data
import utils
from model import STAGES, ResNet18

LAYERS = ("stem", *STAGES)
COLOUR_MAP = "viridis"  # perceptually uniform: equal steps in value look equal, also in grey
HEATMAP_OPACITY = 0.6
EVAL_BATCH = 500  # images


class GradCAM(nn.Module):
    """Grad-CAM of a stage of a ResNet18: which places of an image speak for a class.

    layer: a name of model.feature; any other raises ValueError. layer4 is the last convolution, but on 32x32
    images it has only 4x4 cells; the default, layer3, has 8x8.
    """

    def __init__(self, model: ResNet18, layer: str = "layer3"):
        super().__init__()
        names = [name for name, _ in model.feature.named_children()]
        if layer not in names:
            raise ValueError(f"layer is {layer!r}, but must be one of {', '.join(names)}")
        end = names.index(layer) + 1
        self.features_conv = model.feature[:end]
        self.classifier = nn.Sequential(*model.feature[end:], model.classifier)
        self.classes = model.classes
        self.gradients = None

    def activations_hook(self, grad: torch.Tensor) -> None:
        """Keeps the gradient (N, C, h, w) of the activations during a backward pass."""
        self.gradients = grad

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, 32, 32) -> logits (N, classes); their backward() fills get_activations_gradient()."""
        activations = self.features_conv(x)
        if activations.requires_grad:
            activations.register_hook(self.activations_hook)
        return self.classifier(activations)

    def get_activations_gradient(self) -> torch.Tensor | None:
        """The gradient (N, C, h, w) of the last backward pass; None before the first."""
        return self.gradients

    def get_activations(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, 32, 32) -> activations (N, C, h, w) of the layer."""
        return self.features_conv(x)

    def heatmaps(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Normalised images (N, 3, H, W) and N class indices -> maps (N, H, W) in [0, 1].

        Each map is divided by its maximum, then enlarged; it is zero everywhere where nothing speaks for the
        class. The network's modes, gradients and parameters stay as they are. Equations 1 and 2 of the paper.
        """
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            with torch.no_grad():
                activations = self.features_conv(images)  # (N, C, h, w)
            with torch.enable_grad():  # from here on only: nothing below the layer is differentiated
                activations.requires_grad_()
                logits = self.classifier(activations)  # (N, classes)
                # No image influences another, so the gradient of the sum holds that of each class logit.
                score = logits.gather(1, labels[:, None]).sum()
                (self.gradients,) = torch.autograd.grad(score, activations)
        finally:
            for module, training in modes:
                module.training = training
        weights = self.gradients.mean((2, 3), keepdim=True)  # (N, C, 1, 1), equation 1
        maps = F.relu((weights * activations.detach()).sum(1, keepdim=True))  # (N, 1, h, w), equation 2
        peaks = maps.amax((2, 3), keepdim=True)
        maps = torch.where(peaks > 0, maps / peaks, 0)
        return F.interpolate(maps, images.shape[2:], mode="bilinear").squeeze(1).clamp(0, 1)


def choose_errors(logits: torch.Tensor, labels: torch.Tensor, n: int, seed: int | None) -> torch.Tensor:
    """Indices of at most n misclassified images, the most confident first, or with a seed drawn at random.

    logits (N, classes), labels (N,) -> (n or fewer,)
    """
    confidence, predicted = logits.softmax(1).max(1)
    errors = (predicted != labels).nonzero().squeeze(1)
    if seed is None:
        order = confidence[errors].argsort(descending=True, stable=True)
    else:
        order = torch.randperm(len(errors), generator=torch.Generator().manual_seed(seed))
    return errors[order[:n]]


def plot_images(images: np.ndarray, titles: list[str], heading: str) -> Figure:
    """The images (n, 32, 32, 3) in a grid of five columns, each under its title."""
    columns = min(5, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(max(2.1 * columns, 4), 2.7 * rows + 0.6), layout="constrained")
    figure.suptitle(textwrap.fill(heading, int(11 * figure.get_figwidth())))
    for axis in figure.subplots(rows, columns, squeeze=False).flat:
        axis.axis("off")
    for axis, image, title in zip(figure.axes, images, titles, strict=False):
        axis.imshow(image)
        axis.set_title(title.replace(", ", "\n").replace(" (", "\n("), fontsize=10)
    return figure


def plot_heatmaps(
    images: np.ndarray, maps: np.ndarray, names: list, titles: list[str], heading: str
) -> Figure:
    """Images (n, 32, 32, 3) uint8, each beside its maps (n, 2, 32, 32) in [0, 1] for its two `names`."""
    groups = 1 if len(images) == 1 else 2 if len(images) <= 10 else 3  # images side by side
    rows = -(-len(images) // groups)
    figure = Figure(figsize=(4.4 * groups + 0.9, 1.95 * rows + 0.9), layout="constrained")
    figure.suptitle(textwrap.fill(heading, int(11 * figure.get_figwidth())))
    # A group is the image, its two maps and a narrow gap.
    grid = figure.subplots(rows, 4 * groups, squeeze=False, width_ratios=[1, 1, 1, 0.1] * groups)
    for axis in grid.flat:
        axis.axis("off")
    for i, (image, title) in enumerate(zip(images, titles, strict=True)):
        row, column = i // groups, 4 * (i % groups)
        axes = grid[row, column : column + 3]
        axes[0].imshow(image)
        axes[1].set_title(title, fontsize=10)
        for axis, heatmap, name in zip(axes[1:], maps[i], names[i], strict=True):
            axis.imshow(image.mean(2), cmap="gray", vmin=0, vmax=255)
            shown = axis.imshow(heatmap, cmap=COLOUR_MAP, vmin=0, vmax=1, alpha=HEATMAP_OPACITY)
            text = f"for {name}" if heatmap.any() else f"for {name}:\nno positive evidence"
            axis.text(0.5, -0.04, text, transform=axis.transAxes, ha="center", va="top", fontsize=9)
    figure.colorbar(shown, ax=grid, label="share of the map's maximum", shrink=min(1, 3 / rows))
    return figure


def get_parser() -> argparse.ArgumentParser:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(
        description="Show with Grad-CAM why the network errs.", formatter_class=formatter
    )
    count = utils.number(int, 1, 100, "a whole number from 1 to 100")
    seed = utils.number(int, 0, 2**32 - 1, "a whole number from 0 to 4294967295")
    add = parser.add_argument
    add("--n", type=count, default=10, help="misclassified images to show")
    add("--checkpoint", type=Path, default=Path("outputs/checkpoint.pt"), help="what train.py wrote")
    add("--seed", type=seed, help="pick at random from this seed, else the most confident errors")
    add("--layer", choices=LAYERS, default="layer3", help="stage of the network to explain")
    add("--device", choices=["auto", *utils.DEVICES], default="auto", help="where to compute")
    add("--data", help="folder of the images, or demo, else as in training")
    add("--output", type=Path, help="folder for the pictures, else that of the checkpoint")
    return parser


def predict_all(model: ResNet18, images: np.ndarray, stats: tuple, device: torch.device) -> torch.Tensor:
    """Logits (N, classes) on the CPU of all images (N, 32, 32, 3) uint8, with a progress line."""
    progress, batches = utils.Progress(), torch.from_numpy(images).split(EVAL_BATCH)

    def normalized():
        for i, batch in enumerate(batches):
            progress.show(f"evaluating the test set: {i / len(batches):4.0%}")
            yield data.normalize(batch.to(device), *stats)

    logits = utils.predict(model, normalized(), utils.choose_precision("auto", device)).cpu()
    progress.show("")
    return logits


def main() -> None:
    args = get_parser().parse_args()
    device = utils.choose_device(args.device)
    checkpoint = utils.load_checkpoint(args.checkpoint, "checkpoint")
    output = args.output or args.checkpoint.parent
    utils.make_folder(output)
    name, classes, stats = checkpoint["name"], checkpoint["classes"], (checkpoint["mean"], checkpoint["std"])
    model = ResNet18(len(classes), checkpoint["norm"]).to(device, memory_format=torch.channels_last)
    utils.load_weights(model, checkpoint, args.checkpoint)
    test = data.load_split(args.data or checkpoint["data"], "test")
    if test.classes != classes:
        raise utils.RunError(
            f"the checkpoint has the classes {', '.join(classes)}; the data has others: see --data"
        )

    # Which errors?
    logits, labels = predict_all(model, test.images, stats, device), torch.from_numpy(test.labels)
    chosen = choose_errors(logits, labels, args.n, args.seed)
    errors = int((logits.argmax(1) != labels).sum())
    print(f"{name}: {errors:,} of {len(labels):,} test images are misclassified ({errors / len(labels):.2%})")
    if errors == 0:
        return print("There is nothing to show.")
    if errors < args.n:
        print(f"Only {errors} of the {args.n} that --n asks for.")
    confidences, predicted = logits[chosen].softmax(1).max(1)
    names = [(classes[p], classes[t]) for p, t in zip(predicted, labels[chosen], strict=True)]
    print("test index  true        predicted   confidence")
    for index, (guess, truth), confidence in zip(chosen.tolist(), names, confidences.tolist(), strict=True):
        print(f"{index:10}  {truth:12}{guess:12}{confidence:10.1%}")

    # Why? Each image twice: for the predicted class and for the true one.
    # numpy(): an array takes a tensor of one index for a number, and its answer would lack the first axis.
    images = test.images[chosen.numpy()]
    pairs = torch.stack([predicted, labels[chosen]], 1).flatten().to(device)
    twice = data.normalize(torch.from_numpy(images).to(device), *stats).repeat_interleave(2, 0)
    maps = GradCAM(model, args.layer).heatmaps(twice, pairs).unflatten(0, (-1, 2)).cpu().numpy()

    titles = [f"true: {t}, predicted: {p} ({c:.0%})" for (p, t), c in zip(names, confidences, strict=True)]
    order = "most confident first" if args.seed is None else f"picked at random (seed {args.seed})"
    heading = f"test images of {name}, {order}"
    figure = plot_images(images, titles, f"Misclassified {heading}")
    utils.save_figure(figure, output / "misclassified.png")
    figure = plot_heatmaps(images, maps, names, titles, f"Grad-CAM ({args.layer}) of misclassified {heading}")
    utils.save_figure(figure, output / "gradcam.png")
    print(f"Written to {output}: misclassified.png, gradcam.png")


if __name__ == "__main__":
    utils.run(main)
