"""Explain misclassified test images with Grad-CAM (Selvaraju et al. 2017, https://arxiv.org/abs/1610.02391).

python gradcam.py --n 10                 the ten most confident ones, and report.md
python gradcam.py --n 20 --seed 1        twenty at random
python gradcam.py --image cat.jpg        a picture of your own
"""

import os
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.transforms.functional import gaussian_blur

import data
import utils
from model import ResNet18

LAYERS = ("stem", "layer1", "layer2", "layer3", "layer4")
MARKED_SHARE = 0.2  # of the picture: the strongest fifth of a map is outlined, and is what is blurred
LEGEND = """Stronger pink means more evidence for the class named above, from the map's lowest value to its \
highest, so colors of two maps cannot be compared. The outline encloses the strongest fifth of the map. \
"Blurred" is the class's probability after that fifth is blurred: where it drops a lot, the network relied \
on details there."""


class GradCAM(nn.Module):
    """Which regions of an image are evidence for a class: heatmaps().

    The other methods are the usual interface with a hook; this program does not call them.

    model   has the modules normalize, feature (nn.Sequential of named stages) and classifier
    layer   the stage to explain; any name that is not in model.feature raises ValueError
    """

    def __init__(self, model: nn.Module, layer: str = "layer4"):
        super().__init__()
        names = [name for name, _ in model.feature.named_children()]
        end = names.index(layer) + 1
        self.features_conv = nn.Sequential(model.normalize, *model.feature[:end])
        self.classifier = nn.Sequential(*model.feature[end:], model.classifier)
        self.classes = model.classes
        self.gradients = None

    def activations_hook(self, grad):
        """Keeps the gradient (N, C, h, w) of the activations during a backward pass."""
        self.gradients = grad

    def forward(self, images):
        """Images (N, 3, H, W) in [0, 1] -> logits (N, classes); backward() then keeps the gradient."""
        activations = self.features_conv(images)
        if activations.requires_grad:
            activations.register_hook(self.activations_hook)
        return self.classifier(activations)

    def get_activations_gradient(self):
        """The gradient (N, C, h, w) of the last backward pass; None before the first."""
        return self.gradients

    def get_activations(self, images):
        """Images (N, 3, H, W) in [0, 1] -> activations (N, C, h, w) of the layer."""
        return self.features_conv(images)

    def heatmaps(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, H, W) in [0, 1] and N class indices -> maps (N, H, W) in [0, 1], equations 1 and 2.

        Each map is divided by its maximum, then enlarged. It is zero where nothing is evidence for the class.
        The network is left in evaluation mode.
        """
        self.eval()
        with torch.no_grad():  # nothing below the layer is differentiated
            activations = self.features_conv(images)  # (N, C, h, w)
        logits = self.classifier(activations.requires_grad_())  # (N, classes)
        # No image influences another, so the gradient of the sum contains that of each image's logit.
        chosen = logits.gather(1, labels[:, None]).sum()
        (self.gradients,) = torch.autograd.grad(chosen, activations)
        weights = self.gradients.mean((2, 3), keepdim=True)  # (N, C, 1, 1), equation 1
        maps = F.relu((weights * activations.detach()).sum(1, keepdim=True))  # (N, 1, h, w), equation 2
        peaks = maps.amax((2, 3), keepdim=True)
        maps = torch.where(peaks > 0, maps / peaks, 0)
        return F.interpolate(maps, images.shape[2:], mode="bilinear").squeeze(1).clamp(0, 1)


def load_model(path):
    """The network of a checkpoint, on the CPU, for evaluation; and the checkpoint. Raises RunError."""
    checkpoint = utils.load_checkpoint(Path(path), "name the checkpoint.pt of a run")
    if not checkpoint["epoch"]:
        raise utils.RunError(f"{path}: no epoch of this run is saved yet: use train.py --resume")
    settings = checkpoint["settings"]
    model = ResNet18(len(checkpoint["classes"]), settings["norm"], settings["width"])
    model.load_state_dict(checkpoint["model"])  # with the mean and standard deviation of the images
    return model.eval(), checkpoint


class Explanation(NamedTuple):
    """For N images and a class of each: maps (N, H, W) in [0, 1], their strongest fifth, its blur test."""

    maps: np.ndarray
    masks: np.ndarray  # (N, H, W) bool
    blurred: torch.Tensor  # (N,) probabilities of the class after that fifth is blurred
    control: torch.Tensor  # (N,) after the middle fifth is blurred instead

    def note(self, i):
        return f"blurred: {self.blurred[i]:.0%}" if self.masks[i].any() else "(empty map)"


def mark(maps):
    """Maps (N, H, W) -> masks (N, H, W), bool: the strongest fifth, without zeros and spikes."""
    values = maps.flatten(1)
    count = round(MARKED_SHARE * values.shape[1])  # 205 of 32x32
    strongest = values.argsort(dim=1, descending=True, stable=True)[:, :count]
    masks = torch.zeros_like(values).scatter(1, strongest, 1).view_as(maps)
    masks *= maps > 0
    # Drop what is less than 3 pixels wide, such as ridges of an enlarged map (morphological opening), unless
    # little is left: then the map is not smooth.
    eroded = -F.max_pool2d(-masks, 3, stride=1, padding=1)
    opened = F.max_pool2d(eroded, 3, stride=1, padding=1)
    is_most = opened.sum((1, 2), keepdim=True) > 0.9 * masks.sum((1, 2), keepdim=True)
    return torch.where(is_most, opened, masks).bool()


def explain(model, pictures, labels, layer, autocast) -> Explanation:
    """Maps of pictures (N, 32, 32, 3) uint8 for N class indices, and their blur test, under autocast."""
    device = next(model.parameters()).device
    images = data.to_input(torch.from_numpy(pictures).to(device))
    labels = labels.to(device)
    maps = GradCAM(model, layer).heatmaps(images, labels)
    # Is a map better than "the object is in the middle"? The control is the disc around the center.
    height, width = images.shape[2:]
    y = torch.arange(height) - (height - 1) / 2
    x = torch.arange(width) - (width - 1) / 2
    closeness = height * width - y[:, None] ** 2 - x**2  # the largest in the middle; all are positive
    masks = mark(maps)
    middle = mark(closeness.to(maps).expand_as(maps))
    soft = gaussian_blur(images, [21, 21], [5.0, 5.0])  # pixels; it keeps colors and removes shapes
    probabilities = []
    for region in (masks, middle):
        with torch.no_grad(), autocast:
            logits = model(torch.where(region[:, None], soft, images))
        probabilities.append(logits.float().softmax(1).gather(1, labels[:, None]).squeeze(1).cpu())
    return Explanation(maps.cpu().numpy(), masks.cpu().numpy(), *probabilities)


def choose_errors(logits, labels, n, seed=None):
    """Logits (N, classes), labels (N,) -> indices of n misclassified images or fewer.

    They are the most confident ones or, with a seed, random ones.
    """
    confidence, predicted = logits.softmax(1).max(1)
    errors = (predicted != labels).nonzero().squeeze(1)
    if seed is None:
        order = confidence[errors].argsort(descending=True, stable=True)
    else:
        order = torch.randperm(len(errors), generator=torch.Generator().manual_seed(seed))
    return errors[order[:n]]


def plot_heatmaps(pictures, titles, explanations, heading):
    """For each of N pictures itself, then its maps; titles: for each picture a list, one title a tile."""
    captions = []
    overlays = []
    for i, (name, *words) in enumerate(titles):
        captions.append(name)
        overlays.append(None)
        for text, explanation in zip(words, explanations, strict=True):
            captions.append(f"{text}\n{explanation.note(i)}")
            overlays.append((explanation.maps[i], explanation.masks[i]))
    tiles_per_image = 1 + len(explanations)
    tiles = pictures.repeat(tiles_per_image, axis=0)
    columns = tiles_per_image * min(2, len(pictures))
    return utils.plot_grid(tiles, captions, columns, f"{heading}\n{LEGEND}", overlays)


def explain_pictures(args, model, checkpoint, autocast):
    """Print the likeliest classes of a user's own pictures, explain two of each. Returns figures by name."""
    classes = checkpoint["classes"]
    pictures = np.stack([data.read_image(path) for path in args.image])  # as the network sees them: 32x32
    with autocast:
        logits = data.predict(model, pictures)
    probabilities, likeliest = logits.softmax(1).topk(min(3, len(classes)))  # (N, 3)
    titles = []
    for path, shares, labels in zip(args.image, probabilities, likeliest, strict=True):
        guesses = [f"{classes[label]}, {share:.0%}" for label, share in zip(labels, shares, strict=True)]
        print(f"{path}: {'; '.join(guesses)}")
        titles.append([Path(path).name, *guesses[:2]])
    explanations = [explain(model, pictures, column, args.layer, autocast) for column in likeliest[:, :2].T]
    heading = f"Grad-CAM ({args.layer}) of your pictures\n{checkpoint['facts']['title']}"
    return {"own.png": plot_heatmaps(pictures, titles, explanations, heading)}


def tell_blurring(before, explanation):
    """What blurring did on average to the probabilities (N,) of the predicted class, in a sentence."""
    marked = torch.from_numpy(explanation.masks.any((1, 2)))  # an empty map marks nothing
    if not marked.any():
        return "All maps are empty."
    return (
        f"The predicted class's mean probability is {before[marked].mean():.0%}; "
        f"with the outlined fifth blurred, {explanation.blurred[marked].mean():.0%}; "
        f"with the middle fifth blurred instead, {explanation.control[marked].mean():.0%}."
    )


def explain_errors(args, test, model, checkpoint, autocast):
    """Print misclassified images and explain them. Returns figures by name, and words for the report."""
    # Which images?
    with autocast:
        logits = data.predict(model, test.images)
    labels = torch.from_numpy(test.labels)
    probabilities = logits.softmax(1)
    confidence, predicted = probabilities.max(1)
    chosen = choose_errors(logits, labels, args.n, args.seed)
    shown = f"{(predicted != labels).sum():,} of {len(labels):,} test images are misclassified"
    if len(chosen):
        order = "most confident first" if args.seed is None else f"chosen at random (seed {args.seed})"
        shown = f"{shown}; {len(chosen)} shown, {order}"
    print(f"{test.name}: {shown}")
    if not len(chosen):
        return {}, {"shown": shown}

    # Where did it look? Each image for the predicted class and for the true one.
    pictures = test.images[chosen.numpy()]
    for_predicted = explain(model, pictures, predicted[chosen], args.layer, autocast)
    for_true = explain(model, pictures, labels[chosen], args.layer, autocast)
    rows = []
    titles = []
    for place, i in enumerate(chosen.tolist()):
        file = test.files[i] if test.files else f"test image {i}"
        guess = f"{test.classes[predicted[i]]}, {confidence[i]:.0%}"
        truth = f"{test.classes[labels[i]]}, {probabilities[i, labels[i]]:.0%}"
        rows.append([file, guess, truth, for_predicted.note(place)])
        titles.append([Path(file).name, f"predicted {guess}", f"true {truth}"])
        print("{:20} predicted {:18} true {:18} {}".format(*rows[-1]))
    blurring = tell_blurring(confidence[chosen], for_predicted)
    print(blurring)

    # Pictures and report
    heading = f"{shown}\n{checkpoint['facts']['title']}"
    captions = ["\n".join(words) for words in titles]
    grid = utils.plot_grid(pictures, captions, min(5, len(titles)), heading)
    explanations = [for_predicted, for_true]
    heatmaps = plot_heatmaps(pictures, titles, explanations, f"Grad-CAM ({args.layer}): {heading}")
    words = {
        "shown": shown,
        "rows": rows,
        "layer": args.layer,
        "legend": LEGEND,
        "blurring": blurring,
    }
    return {"misclassified.png": grid, "gradcam.png": heatmaps}, words


def get_parser():
    parser, add = utils.make_parser("Explain misclassified images with Grad-CAM.")
    add("--n", 10, "misclassified images to show", type=utils.number(int, 1, 100))
    add("--image", None, "explain these files instead", unset="none", nargs="+", type=os.path.expanduser)
    add("--checkpoint", Path("outputs/checkpoint.pt"), "checkpoint.pt of a run", type=utils.path)
    add(
        "--seed",
        None,
        "seed for a random choice",
        unset="the most confident",
        type=utils.number(int, 0, 2**32 - 1),
    )
    add("--layer", "layer4", "stage to explain", choices=LAYERS)
    add("--device", "auto", "where to compute", choices=utils.DEVICES)
    add("--data", None, "folder of the images, or demo", unset="as in training", type=os.path.expanduser)
    add("--output", None, "output folder", unset="that of the checkpoint", type=utils.path)
    return parser


@utils.default_style
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = get_parser()
    args = parser.parse_args(argv)
    if args.image and len(args.image) > 100:
        parser.error(f"--image: {len(args.image)} files are more than 100")
    model, checkpoint = load_model(args.checkpoint)
    folder = args.checkpoint.resolve().parent
    output = args.output or folder
    if output.resolve() != folder and any(output.glob("*.pt")):
        raise utils.RunError(f"{output} holds another run, whose pictures must stay: name another --output")
    device = utils.choose_device(args.device)
    model.to(device, memory_format=utils.memory_format(device))
    precision = checkpoint["settings"]["precision"]  # that of the run
    if device.type != "cuda" and precision == "fp16":
        precision = "auto"
    autocast = utils.autocast(device, utils.choose_precision(precision, device))

    report = ""
    if args.image:
        figures = explain_pictures(args, model, checkpoint, autocast)
    else:
        test = data.load_split(args.data or checkpoint["settings"]["data"], "test")
        if test.classes != checkpoint["classes"]:
            raise utils.RunError(f"{test.name} does not have the classes of the run: name another --data")
        figures, words = explain_errors(args, test, model, checkpoint, autocast)
        if not checkpoint["result"]:
            print("No report: this file has no test result; checkpoint.pt gets it when the training ends.")
        elif np.bincount(test.labels).tolist() != checkpoint["facts"]["counts"]["test"]:
            print("No report, because these are not the test images of the run.")
        else:
            checkpoint["commands"].append(shlex.join(["python", "gradcam.py", *argv]))
            report = utils.make_report(checkpoint, words)
    output.mkdir(parents=True, exist_ok=True)
    written = [output / name for name in figures]
    for path, figure in zip(written, figures.values(), strict=True):
        utils.save_figure(figure, path)
    utils.show(*written)
    if report:
        written.append(utils.write_report(folder, output, report))
    print(f"Written to {output}: {', '.join(path.name for path in written)}")


if __name__ == "__main__":
    utils.run(main)
