"""Utilities; skip them on first reading: errors, flags, device, files, terminal, pictures, report."""

import argparse
import hashlib
import io
import math
import os
import shutil
import sys
import textwrap
import time
import zipfile
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path

import torch

if "IPython" not in sys.modules:
    os.environ.pop("MPLBACKEND", None)  # by a notebook that started this process: it may not exist here
import matplotlib.style
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, MaxNLocator, PercentFormatter

DEVICES = ("auto", "cuda", "mps", "cpu")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
IN_NOTEBOOK = "ipykernel" in sys.modules
# For all pictures, whatever a notebook or a matplotlibrc has set: in a dark style, black would be on black.
# It is entered around the main functions, so the plot functions need nothing.
default_style = matplotlib.style.context(["default", {"text.parse_math": False}], after_reset=True)


# -------------------- errors and flags
class RunError(Exception):
    """The program cannot go on; the message says why and what to do."""


def run(main):
    """Call main() for the command line: an expected error or Ctrl-C ends the program with one line."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # So that a log file shows each epoch when it ends, and no name of a class stops the program.
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped")
    except (RunError, OSError) as error:
        sys.exit(f"error: {error}")


def make_parser(description):
    """A parser, and a function that adds a flag whose help ends with its default, or with `unset`."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)

    def add(flag, default, meaning, unset=None, **options):
        parser.add_argument(flag, default=default, help=f"{meaning} (default: {unset or default})", **options)

    return parser, add


def number(kind, low, high=math.inf):
    """An argparse type: a number from low to high, both included."""

    def parse(text):
        if not low <= kind(text) <= high:
            limits = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:.10g}"
            raise argparse.ArgumentTypeError(f"{text} is not {limits}")
        return kind(text)

    parse.__name__ = kind.__name__  # argparse: "invalid int value: 'x'"
    return parse


def path(text):
    """An argparse type. The shell leaves the ~ in --output=~/run as it is; Path.expanduser fails for ~$x."""
    return Path(os.path.expanduser(text))


# -------------------- device and precision
def choose_device(name):
    """For "auto", CUDA, MPS or the CPU, in this order. Raises RunError if the device is not available."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = [key for key in available if available[key]][0]
    if not available[name]:
        raise RunError(f"--device {name}: PyTorch finds none on this machine; try --device cpu")
    return torch.device(name)


def memory_format(device):
    """Channels last, the fastest for convolutions; on MPS it is slow and was wrong (PyTorch issue 175189)."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def choose_precision(name, device):
    """For "auto", bfloat16 where it is fast, float16 on older CUDA GPUs, else float32. Raises RunError."""
    if name == "fp16" and device.type != "cuda":
        raise RunError("--precision fp16 needs a GPU with CUDA: choose auto, fp32 or bf16")
    if name != "auto":
        return PRECISIONS[name]
    if device.type == "cuda":
        # A T4 only emulates bfloat16, slowly; the plain is_bf16_supported() says True there.
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    # Without one of these two, bfloat16 on a CPU is many times slower. PyTorch before 2.11 cannot tell.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    is_fast = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
    return torch.bfloat16 if device.type == "cpu" and is_fast else torch.float32


def autocast(device, precision):
    """The context for forward passes, to be entered as often as needed."""
    # In float32 nothing is entered: even a disabled autocast warns on MPS.
    return nullcontext() if precision == torch.float32 else torch.autocast(device.type, precision)


# -------------------- files
def write(path, content, needed=True):
    """Replace a file whole or not at all. Raises RunError, or prints a line if the file is not `needed`."""
    temporary = path.with_name(f"{path.name}.tmp")
    for seconds in range(4 if needed else 1):
        time.sleep(seconds)  # a virus scanner may hold a file for a moment
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                with suppress(OSError):  # some network drives cannot
                    os.fsync(file.fileno())  # on the disk before it replaces the old one
            os.replace(temporary, path)
            return
        except OSError as error:
            message = f"{path} cannot be written ({error.strerror})"
    if needed:
        raise RunError(f"{message}: free some space, or name another folder")
    print(f"{message}: the run continues without it")


def save_figure(figure, path, needed=True):
    """Write a Figure as PNG. Raises RunError, or prints a line if it is not `needed`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
    write(path, buffer.getvalue(), needed)


def save_checkpoint(state, path):
    """state: numbers, strings, lists, dicts and tensors only, so that loading needs to run no code."""
    buffer = io.BytesIO()  # torch.save straight to a full disk would end the process
    torch.save(state, buffer)
    write(path, buffer.getbuffer())


def load_checkpoint(path, remedy):
    """What train.py saved, with tensors on the CPU. Raises RunError, with a remedy, for any other file."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums in the file
            if archive.testzip():
                raise zipfile.BadZipFile("wrong checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)  # never runs code from the file
        if "result" not in state:
            raise KeyError("no result")
    except FileNotFoundError:
        raise RunError(f"there is no file {path}: run train.py first, or check the path") from None
    except Exception as error:  # for a damaged file, torch.load raises one of a dozen types
        reason = str(error).partition("\n")[0][:80]
        raise RunError(
            f"{path} is damaged or from another version of train.py ({reason}): {remedy}"
        ) from None
    return state


# -------------------- terminal and notebook
def clock(seconds):
    """3725.4 -> "1:02:05"."""
    return str(timedelta(seconds=round(seconds)))


def progress(batches, what):
    """Yield each of the batches; on a terminal or in a notebook a line shows the progress."""
    # Standard output may be anything that can write: a window of IDLE, a file, None.
    on_terminal = isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.isatty()
    shown = time.monotonic()
    for done, batch in enumerate(batches, 1):
        yield batch
        if (on_terminal or IN_NOTEBOOK) and time.monotonic() - shown > 0.5:
            shown = time.monotonic()
            print(f"{what}: {done / len(batches):4.0%}"[:79], end="  \r", flush=True)


def show(*paths):
    """In a notebook, display the pictures below the cell."""
    if IN_NOTEBOOK:
        from IPython.display import Image, display

        display(*[Image(filename=path) for path in paths if path.exists()])


# -------------------- pictures
def best_epoch(history):
    """The first row with the highest validation accuracy; among equals the one with the lowest loss."""
    return max(history, key=lambda row: (row["val_accuracy"], -row["val_loss"]))


def find_reductions(history):
    """The epochs after which the scheduler reduced the learning rate."""
    return [row["epoch"] for row, after in zip(history, history[1:], strict=False) if after["lr"] < row["lr"]]


def plot_curves(history, title) -> Figure:
    """Loss, accuracy and learning rate of each epoch; dotted lines where it was reduced.

    history: for each epoch a dict with the keys of history.csv; accuracies are in [0, 1]
    """
    epochs = [row["epoch"] for row in history]
    rates = [row["lr"] for row in history]
    best = best_epoch(history)
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    figure.suptitle(title)
    loss, accuracy, rate = figure.subplots(1, 3)
    for axis, name in ((loss, "loss"), (accuracy, "accuracy")):
        training = [row[f"train_{name}"] for row in history]
        validation = [row[f"val_{name}"] for row in history]
        axis.plot(epochs, training, "o--", markersize=3, label="training (augmented)")
        axis.plot(epochs, validation, "s-", markersize=3, label="validation")
    label = f"best: epoch {best['epoch']}, {best['val_accuracy']:.2%}"
    accuracy.plot(best["epoch"], best["val_accuracy"], "k*", markersize=12, label=label)
    accuracy.yaxis.set_major_formatter(PercentFormatter(1))
    rate.step(epochs, rates, "k.-", where="mid", label="learning rate")
    rate.set(yscale="log", ylim=(min(rates) / 2, max(rates) * 2))
    rate.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter="")
    for axis, name in ((loss, "loss (cross-entropy)"), (accuracy, "accuracy"), (rate, "learning rate")):
        label = "learning rate reduced"
        for epoch in find_reductions(history):
            axis.axvline(epoch + 0.5, color="gray", linestyle=":", label=label)
            label = "_"  # the others are not in the legend
        axis.set(title=name, xlabel="epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(alpha=0.3)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize=9)
    return figure


def shorten(names, length=22):
    """Names of at most this length, cut in the middle; longer only as far as two would look alike."""
    short = []
    for name in names:
        half = (length - 1) // 2
        short.append(name if len(name) <= length else f"{name[:half]}…{name[-half:]}")
    if len(set(short)) < len(set(names)):
        return shorten(names, length + 2)
    return short


def plot_confusion(confusion, classes, title) -> Figure:
    """The accuracy of each class, and a tensor of counts (true class, predicted class), colored by share."""
    shares = (confusion / confusion.sum(1, keepdim=True)).numpy()
    side = min(max(7.5, 0.16 * len(classes)), 16)  # inches
    size = min(10, 40 * side / len(classes))  # of the letters, in points
    figure = Figure(figsize=(side + 1.5, side + 0.5), layout="constrained")
    figure.suptitle(title)
    axis = figure.subplots()
    # Colored by the square root, so that one percent is visible beside a diagonal of 95.
    image = axis.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1))
    figure.colorbar(image, label="share of the true class", format=PercentFormatter(1), shrink=0.8)
    axis.set(xlabel="predicted class", ylabel="true class and its accuracy")
    if len(classes) <= 100:  # more names could not be read
        names = shorten(classes)
        rows = [f"{name}  {share:.1%}" for name, share in zip(names, shares.diagonal(), strict=True)]
        axis.set_yticks(range(len(classes)), rows, fontsize=size)
        axis.set_xticks(
            range(len(classes)), names, fontsize=size, rotation=45, ha="right", rotation_mode="anchor"
        )
    if len(classes) <= 30:  # more counts could not be read
        for true, predicted in confusion.nonzero().tolist():
            color = "white" if shares[true, predicted] > 0.3 else "black"
            count = int(confusion[true, predicted])
            axis.text(predicted, true, count, ha="center", va="center", color=color, fontsize=0.9 * size)
    return figure


def wrap(text, width):
    """The text with each of its lines wrapped."""
    return "\n".join(textwrap.fill(line, width) for line in text.split("\n"))


def draw_outline(axis, mask):
    """Draw a line around a mask (H, W), closed along the edges of the picture."""
    height, width = mask.shape
    x = np.arange(-1, width + 1).clip(-0.4, width - 0.6)  # with a frame of zeros, just inside the picture
    y = np.arange(-1, height + 1).clip(-0.4, height - 0.6)
    line = axis.contour(x, y, np.pad(mask, 1), levels=[0.5], colors="white", linewidths=1)
    line.set_path_effects([withStroke(linewidth=2, foreground="black")])


def plot_grid(images, titles, columns, heading, overlays=None) -> Figure:
    """Rows of images (H, W, 3) uint8, each under its title.

    overlays: for each image None, or a heatmap (H, W), of which the color goes from the lowest value
    (transparent) to the highest, and a mask (H, W) bool, which is outlined
    """
    tile = 1.6  # inches an image is wide, enough for 25 characters: "predicted automobile, 92%"
    rows = math.ceil(len(images) / columns)
    width = max(tile * columns, 4.8)
    titles = [wrap(title, 25) for title in titles]
    heading = wrap(heading, int(13 * width))
    lines = 1 + max(title.count("\n") for title in titles)
    height = (tile + 0.1 + 0.15 * lines) * rows + 0.2 * (heading.count("\n") + 2)
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(heading, fontsize=10)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.axis("off")
    # No grass, sky or skin has this color. It begins transparent, so that the photo shows through.
    pink = LinearSegmentedColormap.from_list("pink", [(1, 0, 0.65, 0), (1, 0, 0.65, 0.5)])
    for i, image in enumerate(images):
        axes[i].set_title(titles[i], fontsize=8)
        axes[i].imshow(image, interpolation="nearest")  # pixels look like pixels
        if overlays and overlays[i]:
            heatmap, mask = overlays[i]
            axes[i].imshow(heatmap, cmap=pink, interpolation="bilinear")
            if mask.any():
                draw_outline(axes[i], mask)
    return figure


# -------------------- report
REPORT = """# {facts[title]}

Name and date: ____________________

## Highlights

{facts[description]} Validation images, set aside from the training images, decided when the learning rate \
was reduced and which epoch was kept. {independence}

| | this run |
| --- | --- |
| test accuracy | {result[test_accuracy]:.2%} |
| validation accuracy | {best[val_accuracy]:.2%} in epoch {best[epoch]} of {last[epoch]} |
| training time | {time} |
| network | {facts[network]} |
| images | {facts[images]} |
| hardware | {facts[hardware]} |
| versions | {facts[versions]} |
| seed | {settings[seed]} |

```
{commands}
```

## About the model

ResNet18 (He et al. 2015), here with a 3x3 first convolution and no max-pool, has eight residual blocks in \
four stages. In each, two 3x3 convolutions with {facts[norm]} learn what to add to their input, which a \
shortcut carries past them. A linear layer turns the last activations, averaged over all positions, into a \
logit for each class.

```
{facts[summary]}
```

## Techniques used

| technique | what it does | in this run |
| --- | --- | --- |
{augmentation}
| normalized images | gives each channel mean 0 and standard deviation 1 | before: mean \
{mean[0]:.4f} {mean[1]:.4f} {mean[2]:.4f}, standard deviation {std[0]:.4f} {std[1]:.4f} {std[2]:.4f} |
| label smoothing | softens the targets | {settings[label_smoothing]:.2g} of each label is spread over all \
classes |
| SGD with Nesterov momentum | updates the weights | {settings[batch_size]} images per step, momentum \
{facts[momentum]}, weight decay {settings[weight_decay]:.2g}, learning rate {settings[lr]:.2g} from \
step {facts[warmup_steps]} on, less before |
| weight averaging (EMA) | averaged weights are validated, tested and kept; the training columns are of the \
current weights and augmented images | over about an epoch |
| ReduceLROnPlateau | reduces the learning rate when the validation loss plateaus | factor \
{settings[factor]:.2g}, patience {settings[patience]}, threshold {facts[threshold]:.0%}; {reductions} |
| Grad-CAM | shows which regions are evidence for a class | see Images |

![What the augmentations do to images of this run](augmentations.png)

## Graphs

![Loss, accuracy and learning rate](curves.png)

![Confusion matrix of the test set](confusion.png)

| class | test accuracy |
| --- | --- |
{classes}

## Training log

| epoch | train loss | train acc. | val. loss | val. acc. | learning rate | time |
| --- | --- | --- | --- | --- | --- | --- |
{log}

## Images

{shown}.
{errors}
## Discussion

* Epoch {best[epoch]} of {last[epoch]} was best. By more than chance? Would more epochs help? Support your \
answer with the curves.

Answer:
{questions}
## References

* K. He et al.: Deep Residual Learning, 2015, https://arxiv.org/abs/1512.03385
* R. Selvaraju et al.: Grad-CAM, 2017, https://arxiv.org/abs/1610.02391
* T. DeVries, G. Taylor: Cutout, 2017, https://arxiv.org/abs/1708.04552
* Normalization: S. Ioffe, C. Szegedy, 2015, https://arxiv.org/abs/1502.03167 (batch); J. Ba et al., 2016, \
https://arxiv.org/abs/1607.06450, and S. Qiao et al., 2019, https://arxiv.org/abs/1903.10520 (layer)
* Averaged weights: A. Tarvainen, H. Valpola, 2017, https://arxiv.org/abs/1703.01780
* Label smoothing: C. Szegedy et al., 2015, https://arxiv.org/abs/1512.00567
* A. Krizhevsky: CIFAR-10, 2009, https://www.cs.toronto.edu/~kriz/cifar.html
* PyTorch, with ReduceLROnPlateau: https://pytorch.org; albumentations: https://albumentations.ai
"""
LOG_ROW = (
    "| {epoch} | {train_loss:.3f} | {train_accuracy:.1%} | {val_loss:.3f} | {val_accuracy:.2%} | {lr:.2g} |"
)
ERRORS = """
| image | predicted class | true class | blur test of the predicted class |
| --- | --- | --- | --- |
{rows}

![Misclassified test images](misclassified.png)

Which regions did the network use? Grad-CAM adds up the activations of {layer}, each channel weighted by the \
mean gradient of the class's logit, and keeps what is positive. It is drawn for the predicted and for the \
true class. {legend}

{blurring}

![The same images with their heatmaps](gradcam.png)
"""
QUESTIONS = """
* The most frequent confusions: {confusions}. What does each pair have in common?

Answer:

* For which images did the network rely on the outlined fifth? Does blurring it matter more than blurring \
the middle?

Answer:
"""


def table_rows(rows):
    """The rows of a table in Markdown; each is a list of strings."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def find_confusions(confusion, classes):
    """The five most frequent confusions of a matrix of counts (true class, predicted class), in words."""
    wrong = confusion.clone().fill_diagonal_(0)
    pairs = sorted(wrong.nonzero().tolist(), key=lambda pair: -wrong[pair[0], pair[1]])
    words = [f"true {classes[i]}, predicted {classes[j]}: {wrong[i, j]}" for i, j in pairs[:5]]
    return "; ".join(words)


def make_report(run, words):
    """The write-up as Markdown, from the checkpoint of a finished run and what gradcam.py has to say."""
    facts = run["facts"]
    history = run["history"]
    classes = run["classes"]
    confusion = torch.tensor(run["result"]["confusion"])
    accuracies = (confusion.diagonal() / confusion.sum(1)).tolist()
    epochs = ", ".join(str(epoch) for epoch in find_reductions(history))
    reductions = f"reduced after epoch {epochs}; last {history[-1]['lr']:.2g}" if epochs else "never reduced"
    errors = ""
    questions = ""
    if "rows" in words:
        errors = ERRORS.format(**words | {"rows": table_rows(words["rows"])})
        questions = QUESTIONS.format(confusions=find_confusions(confusion, classes))
    return REPORT.format(
        facts=facts,
        settings=run["settings"],
        result=run["result"],
        best=best_epoch(history),
        last=history[-1],
        independence=facts["overlap"] or "The test images had no part in that.",
        commands="\n".join(run["commands"]),
        augmentation=table_rows(facts["augmentation"]) or "| augmentation | none | |",
        mean=run["model"]["normalize.mean"].flatten().tolist(),
        std=run["model"]["normalize.std"].flatten().tolist(),
        reductions=reductions,
        classes=table_rows(
            [name, f"{accuracy:.2%}"] for name, accuracy in zip(classes, accuracies, strict=True)
        ),
        log="\n".join(f"{LOG_ROW.format(**row)} {clock(row['seconds'])} |" for row in history),
        time=clock(sum(row["seconds"] for row in history)),
        shown=words["shown"],
        errors=errors,
        questions=questions,
    )


def seal(text):
    """The text under a line, invisible when rendered, by which an edit is noticed."""
    return f"<!-- by gradcam.py; SHA-256 of the rest: {hashlib.sha256(text.encode()).hexdigest()} -->\n{text}"


def is_unedited(report):
    text = report.read_text("utf-8", errors="replace")  # whatever an editor made the ends of lines
    return text == seal(text.partition("\n")[2])


def write_report(folder, output, text):
    """Replace report.md, with the run's pictures beside it; an edited one stays beside a report-new.md."""
    for name in ("augmentations.png", "curves.png", "confusion.png"):
        if output.resolve() != folder and (folder / name).exists():
            shutil.copy(folder / name, output)
    report = output / "report.md"
    while report.exists() and not is_unedited(report):
        print(f"{report} was edited, so it stays, but its pictures are new")
        report = report.with_stem(f"{report.stem}-new")
    write(report, seal(text).encode())
    return report
