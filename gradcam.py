"""Grad-CAM (Selvaraju et al. 2017, https://arxiv.org/abs/1610.02391) of the network's errors on the test set.

python gradcam.py --n 10                 the ten errors of which it was most confident, and report.md
python gradcam.py --n 20 --seed 1        twenty at random
python gradcam.py --image cat.jpg        a picture of your own
"""

import csv
import itertools
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

import data
import utils
from model import STAGES, WIDTH, ResNet18, summary
from utils import Figure

LAYERS = ("stem", *STAGES)
# Measured by insertion and deletion (Petsiuk et al. 2018, see README): on images that the network gets right
# layer4, the last convolution, finds most truly what it saw; on its errors layer3 is as true, and finer.
LAYER, ERROR_LAYER = "layer4", "layer3"

# For the report.
RUN_FILES = ("augmentations.png", "curves.png", "confusion.png", "history.csv")  # beside the checkpoint
AUGMENTATIONS = {  # of data.augmentations: name, purpose
    "crop": ("RandomCrop", "moves the object by a few pixels, so that its place is no clue"),
    "flip": ("HorizontalFlip", "shows each object from its other side, too"),
    "rotate": ("Rotate", "turns the image a little, as a camera is rarely level"),
    "cutout": ("CutOut", "hides a square, so that the network must use more than one clue"),
}
LEGEND = "The pinker a place, the more it speaks for the class; the line is at half of the maximum."
HOW_TO_READ = f"""for what the network said and for what is true: the activations of that stage are summed,
each channel weighted by the mean gradient of the class's score, and what is positive is kept. {LEGEND} Each
map has a scale of its own, so two of them do not tell which class had more evidence. A cell of a map has seen
much of the image around it: a pink place beside the object may still speak of the object."""
NORM_NAMES = {
    "batch": "batch normalisation (Ioffe and Szegedy 2015, arXiv:1502.03167)",
    "layer": "layer normalisation (Ba et al. 2016, arXiv:1607.06450)",
}
REFERENCES = """* K. He et al.: Deep Residual Learning, 2015, https://arxiv.org/abs/1512.03385
* R. Selvaraju et al.: Grad-CAM, 2017, https://arxiv.org/abs/1610.02391
* T. DeVries, G. Taylor: Cutout, 2017, https://arxiv.org/abs/1708.04552
* PyTorch: https://pytorch.org, with ReduceLROnPlateau; albumentations: https://albumentations.ai"""


class GradCAM(nn.Module):
    """Grad-CAM of a stage of a ResNet18: which places of an image speak for a class.

    layer: a name in model.feature, else ValueError. Of 32x32 images layer4 has 4x4 cells, layer3 8x8.
    """

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
    settings = {"width": WIDTH, **checkpoint["settings"]}  # an older version had neither width nor title
    model = ResNet18(len(checkpoint["classes"]), settings["norm"], settings["width"])
    try:
        model.load_state_dict(checkpoint["model"])
    except (RuntimeError, TypeError):
        raise utils.RunError(f"{path} is of another network: name another, or train again") from None
    return model.eval(), {"title": model.name, **checkpoint}


def explain(model: ResNet18, layer: str, images: np.ndarray, labels: torch.Tensor, normalize) -> np.ndarray:
    """Images (n, 32, 32, 3) uint8 and k classes for each (n, k) -> maps (n, k, 32, 32) in [0, 1]."""
    device = next(model.parameters()).device
    k = labels.shape[1]
    repeated = normalize(torch.from_numpy(images).to(device)).repeat_interleave(k, 0)
    maps = GradCAM(model, layer).heatmaps(repeated, labels.flatten().to(device))
    return maps.unflatten(0, (-1, k)).cpu().numpy()


class Mistake(NamedTuple):
    """A misclassified test image (32, 32, 3) uint8."""

    index: int
    image: np.ndarray
    true: str
    predicted: str
    confidence: float

    @property
    def said(self) -> str:
        return f"said {self.predicted}, {self.confidence:.0%}"


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


def plot_heatmaps(images: list, maps: np.ndarray, titles: list[tuple], heading: str) -> Figure:
    """Tiles for each of n images: as it is, then under its maps (n, k, 32, 32); and 1 + k titles for each."""
    k = maps.shape[1]
    tiles = [image for image in images for _ in range(1 + k)]
    over_tiles = [heatmap for of_image in maps for heatmap in (None, *of_image)]
    texts = [title for of_image in titles for title in of_image]
    columns = (1 + k) * min(2, len(images))
    return utils.plot_grid(tiles, texts, columns, f"{heading}\n{LEGEND}", over_tiles)


def explain_pictures(paths: list[str], model, checkpoint: dict, layer: str, normalize, precision) -> Figure:
    """Prints the most likely classes of a user's own pictures, explains the first two. Raises RunError."""
    images = np.stack([data.read_image(path) for path in paths])  # as the network sees them: 32x32
    split = data.Split(images, np.zeros(len(paths), int), checkpoint["classes"], "own pictures")
    logits, _ = utils.predict(model, split, normalize, precision)
    probabilities, labels = logits.softmax(1).topk(min(3, model.classes))
    titles = []
    for path, row, of_row in zip(paths, probabilities.tolist(), labels.tolist(), strict=True):
        pairs = zip(row, of_row, strict=True)
        named = [f"{checkpoint['classes'][label]}, {share:.0%}" for share, label in pairs]
        print(f"{path}: {'; '.join(named)}")
        titles.append((f"{Path(path).name}\n(then {named[2]})" if named[2:] else Path(path).name, *named[:2]))
    maps = explain(model, layer, images, labels[:, :2], normalize)
    heading = f"Grad-CAM ({layer}) of own pictures\n{checkpoint['title']}"
    return plot_heatmaps(list(images), maps, titles, heading)


def escape(text: str) -> str:
    """Markdown that shows the text as it is, whatever the name of a class holds."""
    return re.sub(r"([\\`*_\[\]<>|$~&#])", r"\\\1", str(text))


def table(*rows: tuple) -> str:
    """A Markdown table; the first row is its head."""
    lines = [f"| {' | '.join(escape(cell) for cell in row)} |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def highlights(run: dict, history: list[dict]) -> str:
    rows = [("", "this run")]
    if "test_accuracy" in run:
        rows += [
            ("test accuracy", f"{run['test_accuracy']:.2%}"),
            ("averaged with the mirrored image (test-time augmentation)", f"{run['mirrored_accuracy']:.2%}"),
            ("training time", utils.clock(run["training_seconds"])),
        ]
    rows.append(("validation accuracy", f"{run['val_accuracy']:.2%} in epoch {run['epoch']}, which is kept"))
    if history:
        rows.append(("epochs", f"{len(history)} of {run['settings']['epochs']}"))
    rows += [(name, run[name]) for name in ("images", "hardware", "parameters", "versions")]
    return table(*rows, ("seed", run["settings"]["seed"]))


def techniques(run: dict, layer: str) -> str:
    mean, std = (" ".join(f"{value:.4f}" for value in run[name]) for name in ("mean", "std"))
    plateau = ", ".join(f"{name} {run['plateau'][name]:g}" for name in ("factor", "patience", "threshold"))
    smoothing = run["settings"]["label_smoothing"]
    return table(
        ("technique", "what it does", "in this run"),
        *((*AUGMENTATIONS.get(name, (name, "")), used) for name, used in run["augmentation"].items()),
        ("normalised images", "each channel has mean 0 and standard deviation 1", f"from {mean} and {std}"),
        ("label smoothing", "asks for less than full certainty", f"share {smoothing:g}"),
        ("SGD", "steps against the gradient of a batch, with momentum", run["optimizer"]),
        ("averaging", "validates, tests and keeps the moving average of the weights (EMA)", run["average"]),
        ("ReduceLROnPlateau", "cuts the rate when the validation loss stops falling", plateau),
        ("Grad-CAM", "shows which places of an image speak for a class", layer),
    )


def class_results(run: dict) -> list[str]:
    """The accuracy of each class, and the five most frequent confusions in words."""
    classes, confusion = run["classes"], torch.tensor(run["confusion"])
    rows = zip(classes, (f"{accuracy:.2%}" for accuracy in run["class_accuracy"]), strict=True)
    errors, lines = confusion.clone().fill_diagonal_(0).flatten(), []
    for i in errors.argsort(descending=True, stable=True)[:5].tolist():
        true, said = divmod(i, len(classes))
        if errors[i]:
            named = f"{escape(classes[true])} taken for {escape(classes[said])}"
            lines.append(f"* {named}: {errors[i]} of {confusion[true].sum():,}")
    most = ["The most frequent confusions:", "\n".join(lines)] if lines else []
    return [table(("class", "test accuracy"), *rows), *most]


def training_log(history: list[dict]) -> str:
    losses = ("training loss", "training accuracy", "validation loss", "validation accuracy")
    rows = [("epoch", "learning rate", *losses, "time")]
    form = "{lr:.3g} {train_loss:.4f} {train_accuracy:.2%} {val_loss:.4f} {val_accuracy:.2%}"
    for row in history:
        values = {name: float(value) for name, value in row.items()}
        rows.append((row["epoch"], *form.format(**values).split(), utils.clock(values["seconds"])))
    return table(*rows)


def make_report(run: dict, history: list, commands: str, mistakes: list, share, layer, ending="") -> str:
    """The write-up as Markdown, from a checkpoint and the rows of history.csv, all of them strings.

    It states nothing that the run has not left: without a test, say, the figures of the test are missing.
    """
    settings, classes = run["settings"], run["classes"]
    model = ResNet18(len(classes), settings["norm"], settings["width"]).eval()
    standardised = is_parametrized(model.feature.stem[0])
    filters = " and standardised filters (Qiao et al. 2019, arXiv:1903.10520)" if standardised else ""
    tested = "test_accuracy" in run
    page = [
        f"# {escape(run['title'])}",
        "## Highlights",
        highlights(run, history),
        f"```\n{commands}\n```",
        "## About the model",
        f"{model.name} (He et al. 2015), with {NORM_NAMES[settings['norm']]}{filters}, is eight "
        "residual blocks in four stages. In each, two 3x3 convolutions learn what must be added to their "
        "input, which a shortcut carries past them. A linear layer turns the averages of the last "
        f"activations into a score for each of the {len(classes)} classes.",
        f"```\n{summary(model)}\n```",
        "## Techniques used",
        techniques(run, layer),
        "![What the augmentations do to images of this run](augmentations.png)",
        "## Graphs",
        "![Loss, accuracy and learning rate](curves.png)",
        *(["![Confusion matrix of the test set](confusion.png)", *class_results(run)] if tested else []),
        *(["## Training log", training_log(history)] if history else []),
        "## Images",
        f"{share}.",
    ]
    if tested:
        confusion = torch.tensor(run["confusion"])
        errors = f"{confusion.sum() - confusion.trace():,}"
        if share.split()[0] != errors:  # as on another device, where a few images fall the other way
            page.append(f"(Counted anew for these pictures; in the test after the training it was {errors}.)")
    if mistakes:
        page += [
            table(
                ("test image", "true class", "predicted class", "confidence"),
                *((m.index, m.true, m.predicted, f"{m.confidence:.1%}") for m in mistakes),
            ),
            f"![Misclassified test images](misclassified{ending}.png)",
            f"Where did the network look? Grad-CAM of {layer}, {HOW_TO_READ}",
            f"![The same images under their heatmaps](gradcam{ending}.png)",
        ]
    return "\n\n".join([*page, "## References", REFERENCES]) + "\n"


def free_ending(output: Path) -> str:
    """The ending of the names of report and pictures: "", or where a report was edited "-2" and so on."""
    for ending in itertools.chain([""], (f"-{number}" for number in itertools.count(2))):
        report = output / f"report{ending}.md"
        if not report.exists() or utils.is_unedited(report):
            return ending


def write_report(args, checkpoint, output: Path, ending: str, mistakes, share, layer) -> list[str]:
    """Write the report, with the run's files beside it. Returns its name. Raises RunError."""
    run = args.checkpoint.parent
    for name in RUN_FILES:
        if output != run and (run / name).exists():
            utils.write(output / name, (run / name).read_bytes())
    if "command" not in checkpoint:  # of an older version, which did not note what is needed
        return []
    rows = (run / "history.csv").read_text().splitlines() if (run / "history.csv").exists() else []
    flags = {"n": args.n, "seed": args.seed, "layer": args.layer}
    again = "".join(f" --{name} {value}" for name, value in flags.items() if value is not None)
    commands = f"{checkpoint['command']}\npython gradcam.py{again}"
    text = make_report(checkpoint, list(csv.DictReader(rows)), commands, mistakes, share, layer, ending)
    there = {path.name for path in output.iterdir()}
    text = re.sub(r"!\[.*\]\((.*)\)\n\n", lambda link: link[0] if link[1] in there else "", text)
    utils.write(output / f"report{ending}.md", utils.seal(text.encode()) + b"\n" + text.encode())
    return [f"report{ending}.md"]


def get_parser() -> utils.Parser:
    parser = utils.Parser("Show why the network errs.")
    add = parser.add_argument
    add("--n", type=utils.number(int, 1, 100), default=10, help="misclassified images to show, 1 to 100")
    add("--image", nargs="+", help="explain these files instead; --n, --seed and --data then do nothing")
    add("--checkpoint", type=Path, default=Path("outputs/checkpoint.pt"), help="what train.py wrote")
    add("--seed", type=utils.number(int, 0, 2**32 - 1), help="pick at random, else the most confident errors")
    add("--layer", choices=LAYERS, help=f"stage to explain, else {ERROR_LAYER}; for --image {LAYER}")
    add("--device", choices=utils.DEVICES, default="auto", help="where to compute")
    add("--data", help="folder of the images, or demo, else as in training")
    add("--output", type=Path, help="folder for what is written, else that of the checkpoint")
    return parser


def explain_errors(args, model, checkpoint: dict, output: Path, normalize, precision) -> None:
    """Draw the network's errors on the test set, and write the report. Raises RunError."""
    root, classes = args.data or checkpoint["settings"]["data"], checkpoint["classes"]
    test = data.load_split(root, "test")
    if test.classes != classes:
        raise utils.RunError(f"{root} has not the classes {', '.join(classes)}: name another with --data")

    # Which errors?
    logits, labels = utils.predict(model, test, normalize, precision)
    errors = int((logits.argmax(1) != labels).sum())
    share = f"{errors:,} of {len(labels):,} test images are misclassified ({errors / len(labels):.2%})"
    print(f"{test.name}: {share}")
    chosen = choose_errors(logits, labels, args.n, args.seed)
    confidence, predicted = logits[chosen].softmax(1).max(1)
    mistakes = [
        Mistake(i, test.images[i], classes[test.labels[i]], classes[p], c)
        for i, p, c in zip(chosen.tolist(), predicted.tolist(), confidence.tolist(), strict=True)
    ]
    if errors < args.n:
        print(f"Only {errors} of the {args.n} that --n asks for." if errors else "There is nothing to show.")
    width = 2 + max(10, *map(len, classes))
    if mistakes:
        print(f"test index  {'true':{width}}{'predicted':{width}}confidence")
    for m in mistakes:
        print(f"{m.index:10}  {utils.pad(m.true, width)}{utils.pad(m.predicted, width)}{m.confidence:10.1%}")

    # Why? Each image twice: for the predicted class and for the true one.
    utils.make_folder(output)
    order = "most confident first" if args.seed is None else f"picked at random (seed {args.seed})"
    heading = f"misclassified test images of {test.name}, {order}\n{checkpoint['title']}"
    layer, pictures, ending = args.layer or ERROR_LAYER, [], free_ending(output)
    if mistakes:
        images = [m.image for m in mistakes]
        titles = [f"test image {m.index}\n{m.said}\nis {m.true}" for m in mistakes]
        grid = utils.plot_grid(images, titles, min(5, len(mistakes)), f"M{heading[1:]}")
        maps = explain(model, layer, np.stack(images), torch.stack([predicted, labels[chosen]], 1), normalize)
        titles = [(f"test image {m.index}", m.said, f"is {m.true}") for m in mistakes]
        heatmaps = plot_heatmaps(images, maps, titles, f"Grad-CAM ({layer}) of {heading}")
        pictures = [output / f"misclassified{ending}.png", output / f"gradcam{ending}.png"]
        # Both are drawn before one is written, so that a stop hardly ever leaves one new and one old.
        for path, content in zip(pictures, [utils.render(grid), utils.render(heatmaps)], strict=True):
            utils.write(path, content)
        share += f"; shown here: {len(mistakes)}, {order}"

    written = [path.name for path in pictures]
    written += write_report(args, checkpoint, output, ending, mistakes, share, layer)
    print(f"Written to {output}: {', '.join(written)}")
    utils.show(*pictures)


@utils.explained_errors()
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    device = utils.choose_device(args.device)
    precision = utils.choose_precision("auto", device)
    model, checkpoint = load_model(args.checkpoint)
    model.to(device, memory_format=utils.memory_format(device))
    normalize = data.Normalize(checkpoint["mean"], checkpoint["std"]).to(device)
    output = args.output or args.checkpoint.parent
    if output.resolve() != args.checkpoint.parent.resolve() and any(output.glob("*.pt")):
        raise utils.RunError(f"{output} holds another run, whose pictures must stay: name another --output")
    if not args.image:
        return explain_errors(args, model, checkpoint, output, normalize, precision)
    figure = explain_pictures(args.image, model, checkpoint, args.layer or LAYER, normalize, precision)
    utils.make_folder(output)
    utils.save_figure(figure, output / "own.png")
    print(f"Written to {output}: own.png")
    utils.show(output / "own.png")


if __name__ == "__main__":
    utils.run(main)
