"""Grad-CAM (Selvaraju et al. 2017, https://arxiv.org/abs/1610.02391) of the network's errors on the test set.

python gradcam.py --n 10                 the ten errors of which it was most confident, and report.md
python gradcam.py --n 20 --seed 1        twenty at random
python gradcam.py --image cat.jpg        a picture of your own
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.transforms.functional import gaussian_blur

import data
import utils
from model import STAGES, ResNet18

MOST_IMAGES = 100  # of one picture
LAYERS = ("stem", *STAGES)
# Measured by insertion and deletion (Petsiuk et al. 2018, see README): on images that the network gets right
# layer4, the last (4x4 cells), is the most faithful; on its errors layer3 is as faithful, and finer (8x8).
LAYER, ERROR_LAYER = "layer4", "layer3"
BLUR_KERNEL, BLUR_SIGMA = [21, 21], [5.0, 5.0]  # pixels; it keeps colours and removes shapes
LEGEND = """The pinker a place, the more it speaks for the class; the line is at half of the full colour. \
"Blurred there" is that class's probability once the part inside the line is blurred: where a high one falls \
a lot, the network needed what the map marks; where it stays, other parts were enough."""
CHECKPOINT_KEYS = ("model", "settings", "classes", "mean", "std", "title", "name", "commands")


class GradCAM(nn.Module):
    """Which places of an image speak for a class: heatmaps(). The rest is the usual interface with a hook."""

    def __init__(self, model: ResNet18, layer: str = LAYER):
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

    @torch.enable_grad()
    def heatmaps(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Normalised images (N, 3, H, W) and N class indices -> maps (N, H, W) in [0, 1], equations 1 and 2.

        Each map is divided by its maximum, then enlarged; it is zero where nothing speaks for the class.
        """
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        with torch.no_grad():  # nothing below the layer is differentiated
            activations = self.features_conv(images)  # (N, C, h, w)
        logits = self.classifier(activations.requires_grad_())  # (N, classes)
        # No image influences another, so the gradient of the sum holds that of each class logit.
        score = logits.gather(1, labels[:, None]).sum()
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
    checkpoint = utils.load_checkpoint(Path(path), CHECKPOINT_KEYS, "name the checkpoint.pt of a run")
    settings = checkpoint["settings"]
    model = ResNet18(len(checkpoint["classes"]), settings["norm"], settings["width"])
    model.load_state_dict(checkpoint["model"])
    return model.eval(), checkpoint


def explain(model: ResNet18, layer: str, images, asked: torch.Tensor, normalize, precision) -> tuple:
    """Images (n, 32, 32, 3) uint8, k classes of each (n, k) -> maps (n, k, 32, 32), their test (2, n, k)."""
    device, (n, k) = next(model.parameters()).device, asked.shape
    repeated = normalize(torch.from_numpy(images).to(device)).repeat_interleave(k, 0)  # (n * k, 3, 32, 32)
    asked = asked.flatten().to(device)
    maps = GradCAM(model, layer).heatmaps(repeated, asked)
    inside = (maps >= utils.MARKED)[:, None]  # (n * k, 1, 32, 32)
    moved = inside.roll((inside.shape[2] // 2, inside.shape[3] // 2), (2, 3))  # past an edge it comes back in
    # The test: each class's probability with the marked part blurred, and with such a part elsewhere.
    blurry, probabilities = gaussian_blur(repeated, BLUR_KERNEL, BLUR_SIGMA), []
    for part in (inside, moved):
        with torch.no_grad(), utils.autocast(device, precision):
            logits = model(torch.where(part, blurry, repeated)).float()
        probabilities.append(logits.softmax(1).gather(1, asked[:, None]).view(n, k))
    return maps.view(n, k, *maps.shape[1:]).cpu().numpy(), torch.stack(probabilities).cpu()


def choose_errors(logits: torch.Tensor, labels: torch.Tensor, n: int, seed: int | None) -> torch.Tensor:
    """Logits (N, classes), labels (N,) -> indices of n errors or fewer, the surest or by a seed."""
    confidence, predicted = logits.softmax(1).max(1)
    errors = (predicted != labels).nonzero().squeeze(1)
    if seed is None:
        order = confidence[errors].argsort(descending=True, stable=True)
    else:
        order = torch.randperm(len(errors), generator=torch.Generator().manual_seed(seed))
    return errors[order[:n]]


def plot_heatmaps(images, maps: np.ndarray, titles: list[tuple], blurred, heading: str) -> utils.Figure:
    """Each of n images as it is, then under its maps (n, k, 32, 32), with their test, `blurred` (n, k)."""
    tiles, texts, over_tiles = [], [], []
    for image, of_image, (name, *words), shares in zip(images, maps, titles, blurred, strict=True):
        tiles += [image] * (1 + len(words))
        texts.append(name)
        over_tiles += [None, *of_image]
        for word, heatmap, share in zip(words, of_image, shares, strict=True):
            note = f"blurred there: {share:.0%}" if heatmap.any() else "(nothing speaks for it)"
            texts.append(f"{word}\n{note}")
    columns = len(tiles) // len(images) * min(2, len(images))
    return utils.plot_grid(tiles, texts, columns, f"{heading}\n{LEGEND}", over_tiles)


def explain_pictures(args, model, checkpoint: dict, normalize, precision) -> utils.Figure:
    """Print the likeliest classes of a user's own pictures and explain two of each. Raises RunError."""
    images = np.stack([data.read_image(path) for path in args.image])  # as the network sees them: 32x32
    split = data.Split(images, np.zeros(len(images), np.int64), checkpoint["classes"], "own pictures")
    logits, _ = utils.predict(model, split, normalize, precision)
    probabilities, labels = logits.softmax(1).topk(min(3, model.classes))
    titles = []
    for path, shares, of_image in zip(args.image, probabilities, labels, strict=True):
        named = [f"{split.classes[i]}, {share:.0%}" for i, share in zip(of_image, shares, strict=True)]
        print(f"{path}: {'; '.join(named)}")
        titles.append((Path(path).name, *named[:2]))
    maps, (marked, _) = explain(model, args.layer, images, labels[:, :2], normalize, precision)
    heading = f"Grad-CAM ({args.layer}) of own pictures\n{checkpoint['title']}"
    return plot_heatmaps(images, maps, titles, marked, heading)


def tell_blurring(maps: np.ndarray, before, marked, elsewhere) -> str:
    """What blurring did on average to the probabilities (n,) of the predicted class, in a sentence."""
    there = torch.from_numpy(maps.any((1, 2)))  # a map of zeros marks nothing
    if not there.any():
        return "No map marks anything."
    before, marked, elsewhere = (f"{shares[there].mean():.0%}" for shares in (before, marked, elsewhere))
    blurring = f"Blurring the marked parts takes the predicted class from {before} to {marked} on average"
    return f"{blurring}; parts of the same form elsewhere, to {elsewhere}."


def explain_errors(args, test: data.Split, model, checkpoint: dict, normalize, precision) -> tuple:
    """Print the network's errors and explain some. Returns figures by name, and a report if the run ended."""
    # Which errors?
    logits, labels = utils.predict(model, test, normalize, precision)
    predicted, chosen = logits.argmax(1), choose_errors(logits, labels, args.n, args.seed)
    order = "most confident first" if args.seed is None else f"picked at random (seed {args.seed})"
    shown = f"{int((predicted != labels).sum()):,} of {len(labels):,} test images are misclassified"
    shown += f"; {len(chosen)} shown, {order}" if len(chosen) else ""
    print(f"{test.name}: {shown}")
    rows, titles, figures, blurring = [], [], {}, ""

    # Why? Each image twice: for the predicted class and for the true one.
    if len(chosen):
        images, asked = test.images[chosen.numpy()], torch.stack([predicted, labels], 1)[chosen]
        before = logits[chosen].softmax(1).gather(1, asked)  # (n, 2)
        maps, (marked, elsewhere) = explain(model, args.layer, images, asked, normalize, precision)
        for i, index in enumerate(chosen.tolist()):
            (said, true), (sure, right) = (test.classes[label] for label in asked[i]), before[i]
            file = test.files[index] if test.files else f"test image {index}"
            blurred = f"{marked[i, 0]:.1%}" if maps[i, 0].any() else "no map"
            rows.append((file, true, said, f"{sure:.1%}", blurred))
            print("{:20} is {:16} said {:16} {:>6}; blurred there {:>6}".format(*rows[-1]))
            titles.append((Path(file).name, f"said {said}, {sure:.0%}", f"is {true}, {right:.0%}"))
        blurring = tell_blurring(maps[:, 0], before[:, 0], marked[:, 0], elsewhere[:, 0])
        print(blurring)
        heading = f"{shown}\n{checkpoint['title']}"
        grid = utils.plot_grid(images, ["\n".join(words) for words in titles], min(5, len(rows)), heading)
        heatmaps = plot_heatmaps(images, maps, titles, marked, f"Grad-CAM ({args.layer}): {heading}")
        figures = {"misclassified.png": grid, "gradcam.png": heatmaps}
    if "confusion" not in checkpoint:
        print("There is no report, as the run has not ended.")
        return figures, ""
    return figures, utils.make_report(checkpoint, rows, shown, args.layer, LEGEND, blurring)


def get_parser() -> argparse.ArgumentParser:
    formatter, about = argparse.ArgumentDefaultsHelpFormatter, "Show why the network errs."
    parser = argparse.ArgumentParser(description=about, formatter_class=formatter, allow_abbrev=False)
    add = parser.add_argument
    add("--n", type=utils.number(int, 1, MOST_IMAGES), default=10, help="misclassified images to show")
    add("--image", nargs="+", type=os.path.expanduser, help="explain these files instead, 100 at most")
    add("--checkpoint", type=utils.path, default=Path("outputs/checkpoint.pt"), help="what train.py wrote")
    add("--seed", type=utils.number(int, 0, 2**32 - 1), help="pick at random, else the most confident errors")
    add("--layer", choices=LAYERS, help=f"stage to explain, else {ERROR_LAYER}; for --image {LAYER}")
    add("--device", choices=utils.DEVICES, default="auto", help="where to compute")
    add("--data", type=os.path.expanduser, help="folder of the images, or demo, else as in training")
    add("--output", type=utils.path, help="folder for what is written, else that of the checkpoint")
    return parser


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = get_parser().parse_args(argv)
    if args.image and len(args.image) > MOST_IMAGES:
        get_parser().error(f"--image: {len(args.image)} files are more than {MOST_IMAGES}")
    args.layer = args.layer or (LAYER if args.image else ERROR_LAYER)
    model, checkpoint = load_model(args.checkpoint)
    device, wanted = utils.choose_device(args.device), checkpoint["settings"]["precision"]
    wanted = "auto" if wanted == "fp16" and device.type != "cuda" else wanted
    precision = utils.choose_precision(wanted, device)  # that of the run, so that the errors are the same
    model.to(device, memory_format=utils.memory_format(device))
    normalize = data.Normalize(checkpoint["mean"], checkpoint["std"]).to(device)
    # A link may stand anywhere; the run is where it leads to.
    run = (args.checkpoint.resolve() if args.checkpoint.is_symlink() else args.checkpoint).parent
    output = args.output or run
    if output.resolve() != run.resolve() and any(output.glob("*.pt")):
        raise utils.RunError(f"{output} holds another run, whose pictures must stay: name another --output")
    if args.image:
        figures, report = {"own.png": explain_pictures(args, model, checkpoint, normalize, precision)}, ""
    else:
        test = data.load_split(args.data or checkpoint["settings"]["data"], "test")
        if test.classes != checkpoint["classes"]:
            names = ", ".join(checkpoint["classes"])
            raise utils.RunError(f"{test.name} does not have the classes {names}: name another --data")
        checkpoint["commands"].append(shlex.join(["python", "gradcam.py", *argv]))
        figures, report = explain_errors(args, test, model, checkpoint, normalize, precision)
    output.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        utils.save_figure(figure, output / name)
    written = [output / name for name in figures]
    utils.show(*written)
    if report:
        written.append(utils.write_report(run, output, report))
    print(f"Written to {output}: {', '.join(path.name for path in written)}")


if __name__ == "__main__":
    utils.run(main)
