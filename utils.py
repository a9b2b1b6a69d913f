"""What is not learning, and may be skipped: errors, device, files, terminal, history, pictures, report."""

import argparse
import hashlib
import io
import math
import os
import re
import shlex
import shutil
import sys
import textwrap
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch

if "IPython" not in sys.modules:
    os.environ.pop("MPLBACKEND", None)  # by a notebook that started this process: it may not exist here
import matplotlib.style
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, MaxNLocator, PercentFormatter

DEVICES = ("auto", "cuda", "mps", "cpu")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
IN_NOTEBOOK = "ipykernel" in sys.modules
EVAL_BATCH = 500  # images; without gradients more of them fit at once
TILE = 1.6  # inches an image is wide in a figure, room for 23 characters
PINK, HEAT_OPACITY = (1, 0, 0.65), 0.65  # no grass, sky or skin has this colour; the photo shows through
MARKED = 0.5  # of a heatmap: places of so much or more are inside the line, and are what is blurred
COUNTS_FIT, NAMES_FIT = 30, 100  # classes in the confusion matrix; with more they could not be read
# Of all pictures, whatever a notebook or a matplotlibrc has set: in a dark style black would be on black.
own_style = matplotlib.style.context(["default", {"text.parse_math": False}], after_reset=True)


# -------------------- errors
class RunError(Exception):
    """The program cannot go on; the message says why and what to do."""


def run(main: Callable[[], None]) -> None:
    """Call main() for the command line: a RunError, a fault of a file or a stop becomes one line."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # So that a log file shows each epoch when it ends, and no name of a class stops the program.
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped")
    except (RunError, OSError) as error:
        sys.exit(f"error: {error}")


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a number from low to high, both included."""

    def parse(text: str) -> float:
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low:g} to {high:.10g}")
        return kind(text)

    parse.__name__ = kind.__name__  # argparse: "invalid int value: 'x'"
    return parse


def path(text: str) -> Path:
    """An argparse type. The shell leaves the ~ in --output=~/run as it is; Path.expanduser fails for ~$x."""
    return Path(os.path.expanduser(text))


# -------------------- device and precision
def choose_device(name: str) -> torch.device:
    """Take CUDA, then MPS, then the CPU for "auto". Raises RunError when the device is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = max(there, key=there.get)  # the first that is there
    if not there[name]:
        raise RunError(f"--device {name}: PyTorch finds none on this machine; try --device cpu")
    return torch.device(name)


def memory_format(device: torch.device) -> torch.memory_format:
    """Channels last, the fastest for convolutions; on MPS it is slow and was wrong (PyTorch issue 175189)."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """For "auto" bfloat16 where it is fast, float16 on older CUDA GPUs, else float32. Raises RunError."""
    if name == "fp16" and device.type != "cuda":
        raise RunError("--precision fp16 needs a GPU with CUDA: choose auto, fp32 or bf16")
    if name != "auto":
        return PRECISIONS[name]
    if device.type == "cuda":
        # A T4 only emulates bfloat16, slowly; the plain is_bf16_supported() says True there.
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    # Without one of these two, bfloat16 on a CPU is many times slower than float32.
    if hasattr(torch.cpu, "get_capabilities"):  # since PyTorch 2.11
        has = [torch.cpu.get_capabilities().get(name) for name in ("amx_bf16", "avx512_bf16")]
    else:
        names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        has = [getattr(torch.cpu, name, bool)() for name in names]
    return torch.bfloat16 if device.type == "cpu" and any(has) else torch.float32


def autocast(device: torch.device, precision: torch.dtype):
    """For a forward pass. In float32 nothing is entered: an autocast that is off still warns on MPS."""
    return nullcontext() if precision == torch.float32 else torch.autocast(device.type, precision)


@torch.no_grad()
def predict(model: torch.nn.Module, split, normalize, precision: torch.dtype) -> tuple:
    """In evaluation mode: logits (N, classes) float32 and labels (N,) of a data.Split, both on the CPU."""
    device = next(model.parameters()).device
    model.eval()
    logits = []
    for images in progress(torch.from_numpy(split.images).split(EVAL_BATCH), "evaluating"):
        with autocast(device, precision):
            logits.append(model(normalize(images.to(device))).float())
    return torch.cat(logits).cpu(), torch.from_numpy(split.labels)


# -------------------- files
def write(path: Path, content: bytes, needed: bool = True) -> None:
    """Replace a file whole or not at all. Raises RunError, or prints a line when the file is not `needed`."""
    temporary = path.with_name(f"{path.name}.tmp")
    for seconds in (0, 1, 2, 3) if needed else (0,):  # a virus scanner may hold a file for a moment
        time.sleep(seconds)
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                with suppress(OSError):  # some network drives cannot
                    os.fsync(file.fileno())  # on the disk before it takes the place of the old one
            return os.replace(temporary, path)
        except OSError as error:
            message = f"{path} cannot be written ({error.strerror})"
    if needed:
        raise RunError(f"{message}: free some space, or name another folder")
    print(f"{message}: the run goes on without it")


@own_style
def save_figure(figure: Figure, path: Path, needed: bool = True) -> None:
    """Write a Figure as PNG. Raises RunError, or says so in a line when it is not `needed`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
    write(path, buffer.getvalue(), needed)


def save_checkpoint(state: dict, path: Path) -> None:
    """Save numbers, strings, lists, dicts and tensors only, so that loading needs to run no code."""
    buffer = io.BytesIO()  # torch.save straight to a full disk ends the process
    torch.save(state, buffer)
    write(path, buffer.getbuffer())


def load_checkpoint(path: Path, keys: tuple, remedy: str) -> dict:
    """The saved dict, with tensors on the CPU. Raises RunError, with a remedy, unless it has these keys."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums in the file
            if archive.testzip():
                raise zipfile.BadZipFile("wrong checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)  # never runs code from the file
        [state[key] for key in keys]  # KeyError where the file is of another kind
    except FileNotFoundError:
        raise RunError(f"there is no file {path}: run train.py first, or name another folder") from None
    except Exception as error:  # a damaged file makes torch.load raise one of a dozen types
        reason = str(error).partition("\n")[0][:80]
        raise RunError(f"{path} is damaged or of another kind ({reason}): {remedy}") from None
    return state


# -------------------- terminal and notebook
def clock(seconds: float) -> str:
    """3725.4 -> "1:02:05"."""
    return str(timedelta(seconds=round(seconds)))


def progress(batches, what: str) -> Iterator:
    """Yield each of the batches; on a terminal or in a notebook a line shows how far they are."""
    # Standard output may be anything that can write: a window of IDLE, a file, None.
    watched = IN_NOTEBOOK or isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.isatty()
    start = shown = time.perf_counter()
    for done, batch in enumerate(batches, 1):
        yield batch
        now = time.perf_counter()
        if watched and (now - shown > 0.5 or done == len(batches)):
            shown = now
            left = clock((now - start) * (len(batches) - done) / done)
            line = f"{what}: {done / len(batches):4.0%}, {left} left" if done < len(batches) else ""
            print(f"{line:79}"[: shutil.get_terminal_size().columns - 1], end="\r", flush=True)


def show(*paths: Path) -> None:
    """In a notebook the pictures stand below the cell."""
    if IN_NOTEBOOK:
        from IPython.display import Image, display

        display(*[Image(filename=path) for path in paths if path.exists()])


# -------------------- history
def best_epoch(history: list[dict]) -> dict:
    """The first row with the highest validation accuracy; among equals the one with the lowest loss."""
    return max(history, key=lambda row: (row["val_accuracy"], -row["val_loss"]))


def find_cuts(history: list[dict]) -> list[int]:
    """The epochs after which the plateau cut the learning rate."""
    return [row["epoch"] for row, after in zip(history, history[1:], strict=False) if after["lr"] < row["lr"]]


# -------------------- pictures
@own_style
def plot_curves(history: list[dict], title: str) -> Figure:
    """Loss, accuracy (in [0, 1]) and learning rate of each epoch; dotted lines where the plateau cut it."""
    columns = {name: [row[name] for row in history] for name in history[0]}
    epochs, best = columns["epoch"], best_epoch(history)
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    figure.suptitle(title)
    loss, accuracy, rate = figure.subplots(1, 3)
    for axis, name in ((loss, "loss"), (accuracy, "accuracy")):
        axis.plot(epochs, columns[f"train_{name}"], "o--", markersize=3, label="training (augmented)")
        axis.plot(epochs, columns[f"val_{name}"], "s-", markersize=3, label="validation")
    label = "best: epoch {epoch}, {val_accuracy:.2%}".format(**best)
    accuracy.plot(best["epoch"], best["val_accuracy"], "k*", markersize=12, label=label)
    accuracy.yaxis.set_major_formatter(PercentFormatter(1))
    rate.step(epochs, columns["lr"], "k.-", where="mid", label="learning rate")
    rate.set(yscale="log", ylim=(min(columns["lr"]) / 2, max(columns["lr"]) * 2))
    rate.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter="")
    for axis, name in ((loss, "loss (cross-entropy)"), (accuracy, "accuracy"), (rate, "learning rate")):
        for i, epoch in enumerate(find_cuts(history)):
            axis.axvline(epoch + 0.5, color="grey", ls=":", label="_" if i else "cut by the plateau")
        axis.set(title=name, xlabel="epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(alpha=0.3)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize=9)
    return figure


@own_style
def plot_confusion(confusion: torch.Tensor, classes: list[str], title: str) -> Figure:
    """Counts (true class, predicted class), and the accuracy of each class."""
    shares = (confusion / confusion.sum(1, keepdim=True)).numpy()
    side = min(max(7.5, 0.16 * len(classes)), 16)  # inches
    figure = Figure(figsize=(side + 1.5, side + 0.5), layout="constrained")
    figure.suptitle(title)
    axis = figure.subplots()
    # The root makes an error of one percent visible beside a diagonal of 95.
    image = axis.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1))
    figure.colorbar(image, label="share of the true class", format=PercentFormatter(1), shrink=0.8)
    axis.set(xlabel="predicted class", ylabel="true class and its accuracy")
    size, ticks = min(10, 45 * side / len(classes)), range(len(classes))  # points
    if len(classes) <= NAMES_FIT:
        names = [textwrap.fill(name, 20) for name in classes]
        rows = [f"{name}  {share:.1%}" for name, share in zip(names, shares.diagonal(), strict=True)]
        axis.set_yticks(ticks, rows, fontsize=size)
        axis.set_xticks(ticks, names, fontsize=size, rotation=45, ha="right", rotation_mode="anchor")
    for true, said in confusion.nonzero().tolist() if len(classes) <= COUNTS_FIT else []:
        colour, count = "white" if shares[true, said] > 0.3 else "black", int(confusion[true, said])
        axis.text(said, true, count, ha="center", va="center", color=colour, fontsize=0.9 * size)
    return figure


@own_style
def plot_grid(images, titles: list[str], columns: int, heading: str, maps: list | None = None) -> Figure:
    """Rows of images (H, W, 3) uint8, each under its title and, in pink, its map (H, W) in [0, 1] or None."""
    titles = ["\n".join(textwrap.fill(line, 23) for line in title.split("\n")) for title in titles]
    rows, lines = -(-len(images) // columns), 1 + max(title.count("\n") for title in titles)
    width = max(TILE * columns, 4.8)  # inches
    heading = "\n".join(textwrap.fill(line, int(13 * width)) for line in heading.split("\n"))
    height = (TILE + 0.1 + 0.15 * lines) * rows + 0.2 * (heading.count("\n") + 2)
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(heading, fontsize=10)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.axis("off")
    for axis, image, title, heat in zip(axes, images, titles, maps or [None] * len(images), strict=False):
        axis.set_title(title, fontsize=8.5)
        axis.imshow(image, interpolation="nearest")  # pixels look like pixels
        if heat is not None and heat.any():
            pink = np.dstack([np.full((*heat.shape, 3), PINK), HEAT_OPACITY * heat])
            axis.imshow(pink, interpolation="bilinear")
            # With zeros around it, just within the edge at -0.5, the line is closed along the edge.
            places = [np.clip(range(-1, size + 1), -0.4, size - 0.6) for size in heat.shape[::-1]]
            line = axis.contour(*places, np.pad(heat, 1), levels=[MARKED], colors="white", linewidths=1)
            line.set_path_effects([withStroke(linewidth=2, foreground="black")])
    return figure


# -------------------- report
DATA_IN_WORDS = {  # by the name of the data set; any other is a folder of the user's own
    "CIFAR-10": "CIFAR-10 (Krizhevsky 2009) holds 60,000 photographs of 32x32 pixels in ten classes.",
    "demo": "The demo: shapes in ten classes, drawn on noisy ground, of random place, size and colour.",
}
# A line is a paragraph, a heading, a picture, a row; one that begins with ? is left out without errors.
REPORT = """# {title}
Name and date: ____________________
## Highlights
{data} Validation images, set aside from the training images, decided when the learning rate was cut and \
which epoch was kept. The test images had no part in that.
| | this run |
| --- | --- |
| test accuracy | {test_accuracy:.2%} |
| validation accuracy | {val_accuracy:.2%} in epoch {best} |
| training time | {time} |
| {facts} |
{commands}
## About the model
ResNet18 (He et al. 2015) is eight residual blocks in four stages. In each, two 3x3 convolutions with \
{settings[norm]} normalisation learn what must be added to their input, which a shortcut carries past them. \
A linear layer turns the averages of the last activations into a score for each class.
{summary}
## Techniques used
| technique | what it does | in this run |
| --- | --- | --- |
| {augmentations} |
| normalised images | gives each channel mean 0 and deviation 1 | means, deviations before: {channels} |
| label smoothing | asks for less than full certainty | a share of {label_smoothing} |
| SGD | steps against the gradient, with Nesterov momentum | {settings[batch_size]} images a step, \
momentum {momentum}, weight decay {weight_decay}, a rate of up to {top}, a warm-up of {warmup_steps} steps |
| averaging (EMA) | smooths: the mean of the weights is validated, tested and kept | of about an epoch |
| ReduceLROnPlateau | cuts the rate when the validation loss stalls | factor {factor}, \
patience {settings[patience]}, threshold {threshold:.0%}; {cuts} |
| Grad-CAM | shows what speaks for a class (layer3: on errors as faithful as layer4, and finer) | {layer} |
![What the augmentations do to images of this run](augmentations.png)
## Graphs
![Loss, accuracy and learning rate](curves.png)
![Confusion matrix of the test set](confusion.png)
{classes}
## Training log
{log}
## Images
{shown}.
?{errors}
?![Misclassified test images](misclassified.png)
?Where did the network look? Grad-CAM sums the activations of a stage, each channel weighted by the mean \
gradient of the class's score, and keeps what is positive. It is drawn for the predicted and the true class. \
{legend} Each map has its own scale, so colours cannot be compared between maps. Pink beside an object may \
still be due to the object: each cell of a map sees much of the image.
?{blurring}
?![The same images under their heatmaps](gradcam.png)
## Discussion
* The best epoch was {best}. Had the training converged, or would more epochs help? What shows it?
Answer:
?* Are all classes predicted? The most frequent errors: {confusions}. What have these classes in common?
?Answer:
?* For which of the images did the network need what its map marks, for which not? What does that tell?
?Answer:
## References
* K. He et al.: Deep Residual Learning, 2015, https://arxiv.org/abs/1512.03385
* R. Selvaraju et al.: Grad-CAM, 2017, https://arxiv.org/abs/1610.02391
* T. DeVries, G. Taylor: Cutout, 2017, https://arxiv.org/abs/1708.04552
* Normalisation: S. Ioffe, C. Szegedy, 2015, https://arxiv.org/abs/1502.03167 (batch); J. Ba et al., 2016, \
https://arxiv.org/abs/1607.06450, and S. Qiao et al., 2019, https://arxiv.org/abs/1903.10520 (layer)
* Averaged weights: A. Tarvainen, H. Valpola, 2017, https://arxiv.org/abs/1703.01780
* Label smoothing: C. Szegedy et al., 2015, https://arxiv.org/abs/1512.00567
* A. Krizhevsky: CIFAR-10, 2009, https://www.cs.toronto.edu/~kriz/cifar.html
* PyTorch, with ReduceLROnPlateau: https://pytorch.org; albumentations: https://albumentations.ai"""


def plain(value: float) -> str:
    """Two significant digits and no exponent: 0.000081."""
    return np.format_float_positional(value, 2, fractional=False, trim="-")


def table(head: str, rows) -> str:
    """A table in Markdown; `head` has the names of its columns between commas."""
    lines = [head.split(", "), ["---"] * len(head.split(", ")), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def tell_cuts(run: dict) -> str:
    """What became of the learning rate, in words."""
    cuts, rates = find_cuts(run["history"]), [plain(row["lr"]) for row in run["history"]]
    if (steps := run["steps_per_epoch"] * len(rates)) < run["warmup_steps"]:
        return f"never used: in {steps} steps the rate only rose, to {rates[-1]}"
    after = f"cut after epoch {', '.join(map(str, cuts))}, from {plain(run['settings']['lr'])} to {rates[-1]}"
    return after if cuts else "never cut"


def make_report(run: dict, errors: list[tuple], shown: str, layer: str, legend: str, blurring: str) -> str:
    """The write-up as Markdown, from the checkpoint of a finished run and a row for each error shown."""
    classes, confusion, settings = run["classes"], torch.tensor(run["confusion"]), run["settings"]
    accuracy, wrong = confusion.diagonal() / confusion.sum(1), confusion.clone().fill_diagonal_(0)
    most = [divmod(int(i), len(classes)) for i in wrong.flatten().argsort(descending=True, stable=True)[:5]]
    confusions = [f"{classes[t]} for {classes[s]} ({wrong[t, s]})" for t, s in most if wrong[t, s]]
    form = "{epoch} {train_loss:.3f} {train_accuracy:.1%} {val_loss:.3f} {val_accuracy:.2%}"
    log = [(*form.format(**row).split(), plain(row["lr"]), clock(row["seconds"])) for row in run["history"]]
    own = f"{run['name']}: the author's own images, in {len(classes)} classes, resized to 32x32 pixels."
    lines = [line.removeprefix("?") for line in REPORT.split("\n") if errors or line[0] != "?"]
    # Of an absolute path only the last name: the rest is nobody's business.
    parts = [[re.sub(r"^(--\S+?=)?/.*/(?=.)", r"\1", w) for w in shlex.split(c)] for c in run["commands"]]
    commands = "\n".join(map(shlex.join, parts))
    words = {
        "data": DATA_IN_WORDS.get(run["name"], own),
        "best": f"{run['epoch']} of {len(run['history'])}",
        "time": clock(run["training_seconds"]),
        "facts": " |\n| ".join(f"{name} | {fact}" for name, fact in run["facts"].items()),
        "commands": f"```\n{commands}\n```",
        "summary": f"```\n{run['summary']}\n```",
        "augmentations": " |\n| ".join(run["augmentation"]) or "augmentation | | none",
        "channels": " ".join(f"{value:.4f}" for value in (*run["mean"], *run["std"])),
        **{name: plain(settings[name]) for name in ("weight_decay", "label_smoothing", "factor")},
        "top": plain(max(row["lr"] for row in run["history"])),
        "cuts": tell_cuts(run),
        "classes": table("class, test accuracy", zip(classes, map("{:.2%}".format, accuracy), strict=True)),
        "log": table("epoch, training loss, accuracy, validation loss, accuracy, learning rate, time", log),
        "errors": table("image, true class, predicted class, confidence, blurred there", errors),
        "confusions": ", ".join(confusions),
    }
    words |= {"shown": shown, "layer": layer, "legend": legend, "blurring": blurring}
    return "\n\n".join(lines).replace("|\n\n|", "|\n|").format(**run | words)


def seal(text: str) -> str:
    """The text under a line, invisible when rendered, by which an edit is noticed."""
    return f"<!-- by gradcam.py; SHA-256 of the rest: {hashlib.sha256(text.encode()).hexdigest()} -->\n{text}"


def is_unedited(report: Path) -> bool:
    text = report.read_text("utf-8", errors="replace")  # whatever an editor made the ends of lines
    return text == seal(text.partition("\n")[2])


def write_report(run: Path, output: Path, text: str) -> Path:
    """Replace report.md, with the run's pictures beside it; an edited one stays beside a report-new.md."""
    for name in ("augmentations.png", "curves.png", "confusion.png"):
        if output.resolve() != run.resolve() and (run / name).exists():
            shutil.copy(run / name, output)
    report = output / "report.md"
    if report.exists() and not is_unedited(report):
        print(f"{report} was edited, so it stays, and the new one is report-new.md")
        report = output / "report-new.md"
    write(report, seal(text).encode())
    return report
