"""Grad-CAM (Selvaraju et al. 2017, https://arxiv.org/abs/1610.02391) of the network's errors on the test set.

python gradcam.py --n 10                 the ten errors of which it was most confident
python gradcam.py --n 20 --seed 1        twenty at random
"""

import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import data
import utils
from model import STAGES, WIDTH, ResNet18
from utils import Figure

LAYERS = ("stem", *STAGES)
COLOUR_MAP = "viridis"  # perceptually uniform: equal steps in value look equal, also in grey
HEATMAP_OPACITY = 0.6


class GradCAM(nn.Module):
    """Grad-CAM of a stage of a ResNet18: which places of an image speak for a class.

    layer: a name in model.feature, else ValueError. layer4 is the last convolution, but on 32x32 images it
    has only 4x4 cells; the default, layer3, has 8x8.
    """

    def __init__(self, model: ResNet18, layer: str = "layer3"):
        super().__init__()
        end = list(dict(model.feature.named_children())).index(layer) + 1
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

    @torch.inference_mode(False)
    def heatmaps(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Normalised images (N, 3, H, W) and N class indices -> maps (N, H, W) in [0, 1].

        Each map is divided by its maximum, then enlarged; it is zero everywhere where nothing speaks for the
        class. The network's modes, gradients and parameters stay as they are. Equations 1 and 2 of the paper.
        Raises ValueError when images, labels and network are not on one device.
        """
        places = {"images": images.device, "labels": labels.device, "network": next(self.parameters()).device}
        if len(set(places.values())) > 1:
            where = ", ".join(f"{name} on {device}" for name, device in places.items())
            raise ValueError(f"{where}: move all to one device, as by images.to(device)")
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        with torch.no_grad():
            activations = self.features_conv(images)  # (N, C, h, w)
        with torch.enable_grad():  # from here on only: nothing below the layer is differentiated
            activations.requires_grad_()
            logits = self.classifier(activations)  # (N, classes)
            # No image influences another, so the gradient of the sum holds that of each class logit.
            score = logits.gather(1, labels[:, None].clone()).sum()  # clone: see inference_mode
            (self.gradients,) = torch.autograd.grad(score, activations)
        for module, was_training in modes:
            module.training = was_training
        weights = self.gradients.mean((2, 3), keepdim=True)  # (N, C, 1, 1), equation 1
        maps = F.relu((weights * activations.detach()).sum(1, keepdim=True))  # (N, 1, h, w), equation 2
        peaks = maps.amax((2, 3), keepdim=True)
        maps = torch.where(peaks > 0, maps / peaks, 0)
        return F.interpolate(maps, images.shape[2:], mode="bilinear").squeeze(1).clamp(0, 1)


def load_model(path: str | Path) -> tuple[ResNet18, dict]:
    """The network of a checkpoint, on the CPU, for evaluation; and the checkpoint. Raises RunError."""
    checkpoint = utils.load_checkpoint(Path(path), "settings", "name", "classes", "mean", "std", "model")
    settings = {"width": WIDTH, **checkpoint["settings"]}
    model = ResNet18(len(checkpoint["classes"]), settings["norm"], settings["width"])
    try:
        model.load_state_dict(checkpoint["model"])
    except (RuntimeError, TypeError):
        raise utils.RunError(f"{path} is of another network: name another, or train again") from None
    return model.eval(), checkpoint


class Mistake(NamedTuple):
    """A misclassified test image (32, 32, 3) uint8."""

    index: int
    image: np.ndarray
    true: str
    predicted: str
    confidence: float


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


def plot_heatmaps(mistakes: list[Mistake], maps: np.ndarray, heading: str) -> Figure:
    """Each image beside its maps (n, 2, 32, 32) in [0, 1], for the predicted and for the true class."""
    groups = 1 if len(mistakes) == 1 else 2 if len(mistakes) <= 10 else 3  # images side by side
    rows = -(-len(mistakes) // groups)
    figure = Figure(figsize=(4.4 * groups + 0.9, 1.95 * rows + 0.9), layout="constrained")
    figure.suptitle(textwrap.fill(heading, int(11 * figure.get_figwidth())))
    # A group is the image, its two maps and a narrow gap.
    grid = figure.subplots(rows, 4 * groups, squeeze=False, width_ratios=[1, 1, 1, 0.1] * groups)
    for axis in grid.flat:
        axis.axis("off")
    for i, m in enumerate(mistakes):
        axes = grid[i // groups, 4 * (i % groups) :]
        axes[0].imshow(m.image)
        axes[1].set_title(f"true: {m.true}, predicted: {m.predicted} ({m.confidence:.0%})", fontsize=10)
        for axis, heatmap, name in zip(axes[1:3], maps[i], (m.predicted, m.true), strict=True):
            axis.imshow(m.image.mean(2), cmap="gray", vmin=0, vmax=255)
            shown = axis.imshow(heatmap, cmap=COLOUR_MAP, vmin=0, vmax=1, alpha=HEATMAP_OPACITY)
            text = f"for {name}" if heatmap.any() else f"for {name}:\nno positive evidence"
            axis.text(0.5, -0.04, text, transform=axis.transAxes, ha="center", va="top", fontsize=9)
    figure.colorbar(shown, ax=grid, label="share of the map's maximum", shrink=min(1, 3 / rows))
    return figure


def get_parser() -> utils.Parser:
    parser = utils.Parser("Show why the network errs.")
    add = parser.add_argument
    add("--n", type=utils.number(int, 1, 100), default=10, help="misclassified images to show")
    add("--checkpoint", type=Path, default=Path("outputs/checkpoint.pt"), help="what train.py wrote")
    add("--seed", type=utils.number(int, 0, 2**32 - 1), help="pick at random, else the most confident errors")
    add("--layer", choices=LAYERS, default="layer3", help="stage of the network to explain")
    add("--device", choices=utils.DEVICES, default="auto", help="where to compute")
    add("--data", help="folder of the images, or demo, else as in training")
    add("--output", type=Path, help="folder for the pictures, else that of the checkpoint")
    return parser


@utils.explained_errors()
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    device = utils.choose_device(args.device)
    model, checkpoint = load_model(args.checkpoint)
    model.to(device, memory_format=utils.memory_format(device))
    normalize = data.Normalize(checkpoint["mean"], checkpoint["std"]).to(device)
    root = args.data or checkpoint["settings"]["data"]
    test = data.load_split(root, "test")
    classes = checkpoint["classes"]
    if test.classes != classes:
        raise utils.RunError(f"{root} has not the classes {', '.join(classes)}: name another with --data")

    # Which errors?
    logits, labels = utils.predict(model, test, normalize, utils.choose_precision("auto", device))
    errors = int((logits.argmax(1) != labels).sum())
    share = f"{errors:,} of {len(labels):,} test images are misclassified ({errors / len(labels):.2%})"
    print(f"{test.name}: {share}")
    if errors == 0:
        return print("There is nothing to show.")
    if errors < args.n:
        print(f"Only {errors} of the {args.n} that --n asks for.")
    chosen = choose_errors(logits, labels, args.n, args.seed)
    confidence, predicted = logits[chosen].softmax(1).max(1)
    mistakes = [
        Mistake(i, test.images[i], classes[test.labels[i]], classes[p], c)
        for i, p, c in zip(chosen.tolist(), predicted.tolist(), confidence.tolist(), strict=True)
    ]
    print("test index  true        predicted   confidence")
    for m in mistakes:
        names = utils.pad(m.true, 12) + utils.pad(m.predicted, 12)
        print(f"{m.index:10}  {names}{m.confidence:10.1%}")

    # Why? Each image twice: for the predicted class and for the true one.
    images = normalize(torch.from_numpy(np.stack([m.image for m in mistakes])).to(device))
    pairs = torch.stack([predicted, labels[chosen]], 1).flatten().to(device)
    maps = GradCAM(model, args.layer).heatmaps(images.repeat_interleave(2, 0), pairs)
    maps = maps.unflatten(0, (-1, 2)).cpu().numpy()  # (n, 2, 32, 32)

    order = "most confident first" if args.seed is None else f"picked at random (seed {args.seed})"
    heading = f"misclassified test images of {test.name}, {model.name}, {order}"
    titles = [f"true: {m.true}\npredicted: {m.predicted}\n({m.confidence:.0%})" for m in mistakes]
    grid = utils.plot_grid([m.image for m in mistakes], titles, min(5, len(mistakes)), f"M{heading[1:]}")
    output = args.output or args.checkpoint.parent
    output.mkdir(parents=True, exist_ok=True)
    utils.save_figure(grid, output / "misclassified.png")
    figure = plot_heatmaps(mistakes, maps, f"Grad-CAM ({args.layer}) of {heading}")
    utils.save_figure(figure, output / "gradcam.png")
    print(f"Written to {output}: misclassified.png, gradcam.png")
    utils.show(output / "misclassified.png", output / "gradcam.png")


if __name__ == "__main__":
    utils.run(main)
