"""What the scripts share, in this order: device and precision, prediction, files, command line, plots."""

import argparse
import contextlib
import errno
import functools
import hashlib
import io
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import unicodedata
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from torch import nn

if "IPython" not in sys.modules:
    os.environ.pop("MPLBACKEND", None)  # by a notebook that started this process: it may not exist here
import matplotlib
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.textpath import text_to_path
from matplotlib.ticker import LogLocator, MaxNLocator, PercentFormatter

DEVICES = ("auto", "cuda", "mps", "cpu")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EVAL_BATCH = 500  # images; without gradients more of them fit at once
ESTIMATE_SECONDS = 20  # of training, after which its pace can be trusted
TILE = 1.5  # inches an image is wide in a figure
GAP = 0.08  # inches between what stands above one another; with less the heading touches the titles below it
PINK = (1, 0, 0.65)  # of heatmaps: no grass, sky or skin has this colour
HEAT_OPACITY = 0.65  # at most, so that the photo shows through


class RunError(Exception):
    """The program cannot go on; the message says why and what to do."""


class UsageError(RunError):
    """A flag is wrong."""


def choose_device(name: str) -> torch.device:
    """ "auto" takes CUDA, then MPS, then the CPU. Raises RunError when the device asked for is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available[name]:
        raise RunError(f"--device {name}: PyTorch finds no such device on this machine; try --device cpu")
    return torch.device(name)


def usable_cores() -> int:
    """The CPU cores that this process may use."""
    if hasattr(os, "process_cpu_count"):  # since Python 3.13
        return os.process_cpu_count() or 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_format(device: torch.device) -> torch.memory_format:
    """Channels last, the fastest for convolutions; on MPS it is slow and was wrong (PyTorch issue 175189)."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """ "auto" takes bfloat16 where it is the fastest, float16 on older CUDA GPUs, else float32."""
    if name == "fp16" and device.type != "cuda":
        raise RunError("--precision fp16 needs a GPU with CUDA: choose auto, fp32 or bf16")
    if name != "auto":
        return PRECISIONS[name]
    if device.type == "cuda":
        # A T4 only emulates bfloat16, slowly; the plain is_bf16_supported() says True there.
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if device.type == "cpu":
        # Without AMX or AVX512-BF16, bfloat16 is many times slower than float32. AVX512-BF16 alone is fast on
        # AMD's cores; an Intel Xeon whose AMX was hidden trained at 50 images/s with it, in float32 at 70.
        intel = "Intel" in getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name", "")
        with contextlib.suppress(AttributeError):  # private functions of PyTorch, which may go
            if torch.cpu._is_amx_tile_supported() or (torch.cpu._is_avx512_bf16_supported() and not intel):
                return torch.bfloat16
    return torch.float32


def autocast(device: torch.device, precision: torch.dtype):
    """For a forward pass. In float32 nothing is entered: an autocast that is off still warns on MPS."""
    return contextlib.nullcontext() if precision == torch.float32 else torch.autocast(device.type, precision)


@torch.no_grad()
def predict(model: nn.Module, split, normalize: nn.Module, precision: torch.dtype) -> tuple:
    """In evaluation mode: logits (N, classes) float32 and labels (N,) int64, both on the CPU.

    split: has images (N, 32, 32, 3) uint8 and labels (N,), both NumPy arrays
    """
    device = next(model.parameters()).device
    model.eval()
    logits = []
    for images in progress(torch.from_numpy(split.images).split(EVAL_BATCH), "evaluating"):
        with autocast(device, precision):
            logits.append(model(normalize(images.to(device))).float())
    return torch.cat(logits).cpu(), torch.from_numpy(split.labels)


def sync(file: int) -> None:
    """os.fsync, where the file system has it."""
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # as some network drives answer
            raise


def make_folder(output: Path) -> None:
    """Make the folder of --output, unless it is there. Raises RunError."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"no folder can be made at {output} ({error.strerror}): name another --output"
        ) from None


def write(path: Path, content: bytes, needed: bool = True) -> None:
    """Replace a file whole or not at all. Raises RunError, or prints a line when the file is not `needed`."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    for seconds in range(5 if needed else 1):  # a virus scanner may let go of a file, a disk may get space
        time.sleep(seconds)
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                sync(file.fileno())  # on the disk before it takes the place of the old one
            return os.replace(temporary, path)
        except OSError as error:
            message = f"{path} cannot be written ({error.strerror})"
        finally:
            temporary.unlink(missing_ok=True)  # it is there only after an error
    if needed:
        raise RunError(f"{message}: free some space, or name another folder")
    print(f"{message}: the run goes on without it")


def seal(content: bytes) -> bytes:
    """A line, invisible when rendered, that shows that nobody has edited the report below it."""
    return f"<!-- by gradcam.py; SHA-256 of what follows: {hashlib.sha256(content).hexdigest()} -->".encode()


def is_unedited(report: Path) -> bool:
    """Whether the file is what gradcam.py wrote, a seal and what it seals."""
    # An editor or git on Windows may have changed the line endings, and nothing else.
    first_line, _, rest = report.read_bytes().replace(b"\r\n", b"\n").partition(b"\n")
    return first_line == seal(rest)


def render(figure: Figure) -> bytes:
    """A matplotlib Figure as PNG."""
    known = get_font(findfont(FontProperties())).get_charmap()
    characters = {character for text in figure.findobj(Text) for character in text.get_text()} - {"\n"}
    report_unknown("".join(sorted(c for c in characters if ord(c) not in known)))
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # one for each character and each time
        figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
    return buffer.getvalue()


def save_figure(figure: Figure, path: Path, needed: bool = True) -> None:
    """Write a Figure as PNG. Raises RunError, or says so in a line if it is not `needed`."""
    write(path, render(figure), needed)


@functools.cache  # once, though they are in every figure of a run
def report_unknown(characters: str) -> None:
    if characters:
        print(f"pictures have boxes in place of {' '.join(characters)}, which the font of matplotlib lacks")


def save_checkpoint(state: dict, path: Path) -> None:
    """Save numbers, strings, lists, dicts and tensors only, so that loading needs to run no code."""
    buffer = io.BytesIO()  # torch.save straight to a full disk ends the process
    torch.save(state, buffer)
    write(path, buffer.getbuffer())


def load_checkpoint(path: Path, *keys: str) -> dict:
    """The saved dict, with tensors on the CPU. Raises RunError unless it has all `keys`."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums in the file
            if archive.testzip():
                raise zipfile.BadZipFile("wrong checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)  # never runs code from the file
    except FileNotFoundError:
        raise RunError(f"there is no file {path}: run train.py first, or name another") from None
    except Exception as error:  # a damaged file makes torch.load raise one of a dozen types
        reason = str(error).partition("\n")[0][:80]
        raise RunError(f"{path} is damaged or no checkpoint, name another ({reason})") from None
    if not isinstance(state, dict) or not state.keys() >= set(keys):
        raise RunError(f"{path} is of another kind or version: name the checkpoint.pt of a run")
    return state


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a number from low to high, both included."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            limits = f"from {low:g} to {high:.10g}" if high < math.inf else f"{low:g} or more"
            raise argparse.ArgumentTypeError(f"{text} is not {limits}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"  # argparse: "invalid number value: 'x'"
    return parse


def pad(text: str, width: int) -> str:
    """Spaces up to a width on the screen, where Chinese characters take two places, loose accents none."""
    extra = sum((unicodedata.east_asian_width(c) in "WF") - (unicodedata.combining(c) > 0) for c in text)
    return text.ljust(width - extra)


def quote(word: str | Path) -> str:
    """A path or another word as the system's shell takes it."""
    return subprocess.list2cmdline([str(word)]) if sys.platform == "win32" else shlex.quote(str(word))


def clock(seconds: float) -> str:
    """3725.4 -> "1:02:05"."""
    return str(timedelta(seconds=round(seconds)))


def progress(batches, what: str, rounds: int = 0) -> Iterator:
    """Yield each of the batches; on a terminal or in a notebook, only there, a line shows how far they are.

    rounds: if given, a line that goes to files too tells early on how long so many rounds of them will take
    """
    # Standard output may be anything that can write: a window of IDLE, a file, None.
    watched = in_notebook() or isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.isatty()
    start = shown = time.perf_counter()
    for done, batch in enumerate(batches, 1):
        yield batch
        now = time.perf_counter()
        whole = (now - start) * len(batches) / done  # seconds
        if rounds and now - start > ESTIMATE_SECONDS:
            print(f"{f'{what} will take about {clock(rounds * whole)}':60}")
            rounds = 0
        if watched and (now - shown > 0.5 or done == len(batches)):
            shown = now
            width = shutil.get_terminal_size().columns - 1
            line = f"{what}: {done / len(batches):4.0%}, {clock(start + whole - now)} left"
            print(f"{line[:width] if done < len(batches) else '':{width}}", end="\r", flush=True)


def in_notebook() -> bool:
    """Only asks IPython if it is running already."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


def show(*paths: Path) -> None:
    """In a notebook the pictures stand below the cell."""
    if in_notebook():
        from IPython.display import Image, display

        display(*[Image(filename=path) for path in paths if path.exists()])


TOO_LITTLE_MEMORY = "there is too little memory: choose a smaller --batch-size or fewer --workers"
HINTS = {  # what type and first line of an error of PyTorch say: what the user can do
    "no kernel image": "this GPU is too old for this PyTorch: use --device cpu, or an older PyTorch",
    "memoryerror": TOO_LITTLE_MEMORY,
    "out of memory": TOO_LITTLE_MEMORY,
    "allocate": TOO_LITTLE_MEMORY,
    "terminated": "stopped from outside",
    "dataloader worker (pid": "a worker process died, perhaps for lack of memory: use fewer --workers, or 0",
    "loading state_dict": "the saved weights are of another network: train again with --overwrite",
    "torch._dynamo": "--compile does not work here, leave it out",
    "torch._inductor": "--compile does not work here, leave it out",
}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults but for those that say nothing: None, [] and False."""

    def _get_help_string(self, action: argparse.Action) -> str:
        silent = str(action.default) in ("None", "[]", "False")
        return action.help if silent else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Shows defaults in its help; raises UsageError where argparse would end the process."""

    def __init__(self, description: str):
        # No abbreviations: who writes --epoch or --check should hear that there is no such flag.
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False)

    def error(self, message: str):
        raise UsageError(message)


@contextlib.contextmanager
def explained_errors() -> Iterator[None]:
    """For each main(): what can happen though the code is right becomes a RunError that says what to do."""
    try:
        with matplotlib.rc_context({"text.parse_math": False}):  # a class may be called "$5 to $10"
            yield
    except OSError as error:
        raise RunError(str(error)) from error
    except (MemoryError, RuntimeError) as error:
        first_line = str(error).partition("\n")[0]
        for words, hint in HINTS.items():
            if words in f"{type(error)} {first_line}".lower():
                raise RunError(f"{hint} ({first_line})") from error
        raise


def run(main: Callable[[], None]) -> None:
    """Call main() for the command line: a RunError or a stop becomes one line and an exit status."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop is a Ctrl-C
    if isinstance(sys.stdout, io.TextIOWrapper):
        # So that a log file shows each epoch when it ends, and no name of a class stops the program.
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    finally:
        signal.signal(signal.SIGTERM, before)  # %run in a notebook leaves the process alive


def best_epoch(history: list[dict]) -> dict:
    """The first row with the highest validation accuracy; among equals the one with the lowest loss."""
    return max(history, key=lambda row: (row["val_accuracy"], -row["val_loss"]))


def plot_curves(history: list[dict], title: str) -> Figure:
    """Loss, accuracy and learning rate over the epochs; dotted lines where the plateau cut the rate.

    history: a row per epoch with epoch, lr, train_loss, train_accuracy, val_loss, val_accuracy (in [0, 1]).
    """
    columns = {name: [row[name] for row in history] for name in history[0]}
    epochs, rates, best = columns["epoch"], columns["lr"], best_epoch(history)
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    figure.suptitle(title)
    loss, accuracy, rate = figure.subplots(1, 3)
    for axis, name in ((loss, "loss"), (accuracy, "accuracy")):
        axis.plot(epochs, columns[f"train_{name}"], "o--", markersize=3, label="training (augmented)")
        axis.plot(epochs, columns[f"val_{name}"], "s-", markersize=3, label="validation")
    loss.set(title="Loss", ylabel="loss (cross-entropy)")
    label = f"best: epoch {best['epoch']}, {best['val_accuracy']:.2%}"
    accuracy.plot(best["epoch"], best["val_accuracy"], "k*", markersize=12, label=label)
    accuracy.set(title="Accuracy", ylabel="accuracy")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1))
    rate.step(epochs, rates, "k.-", where="mid", label="learning rate")
    rate.set(title="Learning rate", ylabel="learning rate (log scale)", yscale="log")
    rate.set_ylim(min(rates) / 2, max(rates) * 2)
    rate.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    rate.yaxis.set_major_formatter("{x:g}")
    rate.yaxis.set_minor_formatter("")
    cuts = [epoch + 0.5 for epoch, lr, next_lr in zip(epochs, rates, rates[1:], strict=False) if next_lr < lr]
    for axis in (loss, accuracy, rate):
        for i, cut in enumerate(cuts):
            axis.axvline(cut, color="grey", ls=":", label="_" if i else "cut by the plateau")
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(alpha=0.3)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize=9)
    return figure


def plot_confusion(result: dict, title: str) -> Figure:
    """result["confusion"] is shown: counts (true class, predicted class), and the accuracy of each class."""
    classes = result["classes"]
    confusion = torch.tensor(result["confusion"])
    shares = (confusion / confusion.sum(1, keepdim=True).clamp_min(1)).numpy()
    with_counts = len(classes) <= 20  # more numbers could not be read
    size = 2 + (max(3.5, 0.62 * len(classes)) if with_counts else 0.16 * len(classes))  # inches
    figure = Figure(figsize=(size + 1.6, size), layout="constrained")
    figure.suptitle(wrap(title, 0.95 * 72 * (size + 1.6), size=12))
    axis = figure.subplots()
    # The root makes an error of one percent visible beside a diagonal of 95.
    image = axis.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1))
    figure.colorbar(image, label="share of the true class", format=PercentFormatter(1), shrink=0.8)
    fontsize = 10 if with_counts else 8
    classes = [wrap(name, 100, fontsize) if with_counts else name for name in classes]
    axis.set_xticks(range(len(classes)), classes, rotation=45 if with_counts else 90, fontsize=fontsize)
    names = [f"{name}  {shares[i, i]:.1%}" for i, name in enumerate(classes)]
    axis.set_yticks(range(len(classes)), names, fontsize=fontsize)
    axis.set(xlabel="predicted class", ylabel="true class and its accuracy")
    if with_counts:
        axis.set_xticklabels(classes, ha="right", rotation_mode="anchor")
        for true, predicted in confusion.nonzero().tolist():
            colour = "white" if shares[true, predicted] > 0.3 else "black"
            count = int(confusion[true, predicted])
            axis.text(predicted, true, count, ha="center", va="center", color=colour, fontsize=9)
    return figure


def wrap(text: str, points: float, size: float) -> str:
    """The text in lines about so many points wide, in the font of this size."""
    lines = []
    for line in text.split("\n"):
        known = re.sub("[^ -~]", "W", line)  # a letter that the font lacks is shown as a box
        width = text_to_path.get_text_width_height_descent(known, FontProperties(size=size), False)[0]
        lines.append(textwrap.fill(line, max(1, int(len(line) * points / max(width, 1)))))
    return "\n".join(lines)


def plot_grid(images: list, titles: list[str], columns: int, heading: str, maps: Sequence = ()) -> Figure:
    """The images (H, W, 3) in rows of so many columns, each under its title.

    maps: if given, one for each image, None or (H, W) in [0, 1]: pink over the image, the denser the more,
    and a line around what is above half
    """
    titles = [wrap(title, 0.92 * 72 * TILE, size=9) for title in titles]
    rows = -(-len(images) // columns)
    lines = [max(title.count("\n") + 1 for title in titles[row * columns :][:columns]) for row in range(rows)]
    width = max(TILE * columns, 4)
    heading = wrap(heading, 0.95 * 72 * width, size=11)
    height = (TILE + GAP) * rows + 0.15 * sum(lines) + 0.2 * (heading.count("\n") + 2)
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(heading, fontsize=11)
    figure.get_layout_engine().set(h_pad=GAP)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis in axes:
        axis.axis("off")
    for axis, image, title, heat in zip_longest(figure.axes, images, titles, maps):
        if image is None:
            continue
        axis.imshow(image, interpolation="nearest")  # pixels look like pixels
        axis.set_title(title, fontsize=9)
        if heat is not None:
            pink = np.dstack([np.full((*heat.shape, 3), PINK), HEAT_OPACITY * heat])
            axis.imshow(pink, interpolation="bilinear")
            if heat.any():
                # With a margin of zeros, just within the edge at -0.5, the line is closed along the edge.
                places = [np.clip(range(-1, size + 1), -0.4, size - 0.6) for size in heat.shape[::-1]]
                line = axis.contour(*places, np.pad(heat, 1), levels=[0.5], colors="white", linewidths=1)
                line.set_path_effects([withStroke(linewidth=2, foreground="black")])
            else:
                axis.set_title(f"{title}\n(nothing speaks for it)", fontsize=9)
    return figure
