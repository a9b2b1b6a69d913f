"""What train.py and gradcam.py share: device and precision, prediction, files, the command line, plots."""

import argparse
import errno
import io
import math
import os
import shutil
import signal
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator
from torch import nn

try:
    import fcntl
except ImportError:  # on Windows
    import msvcrt

DEVICES = ("cuda", "mps", "cpu")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class RunError(Exception):
    """The program cannot go on; the message says why and what to do."""


# ---------------------------------------------------------------- device and precision


def choose_device(name: str) -> torch.device:
    """ "auto" takes CUDA, then MPS, then the CPU. Raises RunError when the device asked for is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available[name]:
        raise RunError(f"--device {name}: PyTorch finds no such device on this machine; try --device cpu")
    return torch.device(name)


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """ "auto" takes bfloat16 where the hardware computes in it, float16 on older CUDA GPUs, else float32.

    Raises RunError for float16 on a CPU, where it is slower than everything else.
    """
    if name == "fp16" and device.type == "cpu":
        raise RunError("--precision fp16 needs a GPU: choose auto, fp32 or bf16")
    if name != "auto":
        return PRECISIONS[name]
    if device.type == "cuda":
        # A T4 only emulates bfloat16, slowly; the plain is_bf16_supported() says True there.
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if device.type == "cpu":
        # Without instructions for it bfloat16 is many times slower than float32. (bool() is False.)
        checks = [getattr(torch.cpu, f"_is_{name}_supported", bool) for name in ("avx512_bf16", "amx_tile")]
        return torch.bfloat16 if any(check() for check in checks) else torch.float32
    return torch.float32


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Context in which convolutions and matrix products compute in `precision`."""
    return torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32)


@torch.inference_mode()
def predict(model: nn.Module, batches: Iterable[torch.Tensor], precision: torch.dtype) -> torch.Tensor:
    """Logits (N, classes) float32 of normalised batches (B, 3, 32, 32), in evaluation mode."""
    model.eval()
    logits = []
    for images in batches:
        with autocast(images.device, precision):
            logits.append(model(images).float())
    return torch.cat(logits)


# ---------------------------------------------------------------- files


@contextmanager
def replacing(path: Path) -> Iterator[io.BufferedWriter]:
    """Open a temporary file for writing; at the end it takes the place of `path`, on an error it vanishes.

    Raises RunError when the file cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise RunError(
            f"{path} cannot be written ({error.strerror}): free some space or choose another folder"
        ) from None


def make_folder(folder: Path) -> None:
    """Create the folder and check that files can be written there. Raises RunError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"folder {folder} cannot be made ({error.strerror}): choose another folder") from None
    with replacing(folder / "write-test"):
        pass
    (folder / "write-test").unlink()


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keep other processes out of the folder. When a process dies, however it dies, its lock is released.

    Raises RunError when another process is in it, or when files cannot be written there.
    """
    make_folder(folder)
    with open(folder / "lock", "w") as file:
        try:
            if "fcntl" in globals():
                # Not flock, whose lock forked workers would share.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):  # any other: a file system without locks
                raise RunError(
                    f"another run is writing to {folder}: let it end, or choose another folder"
                ) from None
        try:
            yield
        finally:
            file.close()
            (folder / "lock").unlink(missing_ok=True)


KINDS = {  # what each kind of saved file must have
    "checkpoint": {"name", "data", "classes", "mean", "std", "norm", "model", "epoch"},
    "last state": {"data", "classes", "mean", "std", "settings", "history", "best", "model", "optimizer"},
}
FILES = {"checkpoint": "checkpoint.pt", "last state": "last.pt"}


def save_checkpoint(state: dict, path: Path) -> None:
    """Save numbers, strings, lists, dicts and tensors only, so that loading needs to run no code."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with replacing(path) as file:
        file.write(buffer.getbuffer())


def load_checkpoint(path: Path, kind: str) -> dict:
    """The saved dict, with tensors on the CPU. Raises RunError unless its "kind" is `kind`."""
    if path.is_dir():
        raise RunError(f"{path} is a folder: name the file {path / FILES[kind]}")
    if not path.is_file():
        raise RunError(f"there is no file {path}: run train.py first, or name the {FILES[kind]} of a run")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums in the file
            if archive.testzip():
                raise zipfile.BadZipFile("wrong checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)  # never runs code from the file
    except Exception as error:  # a damaged file makes torch.load raise one of a dozen types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(
            f"{path} is damaged or no checkpoint ({reason[:80]}): train again, or name another"
        ) from None
    if not isinstance(state, dict) or state.get("kind") != kind or not KINDS[kind] <= state.keys():
        raise RunError(f"{path} is no {kind} of this program: name the {FILES[kind]} that train.py wrote")
    return state


def load_weights(model: nn.Module, checkpoint: dict, path: Path) -> None:
    """Put the weights of a loaded checkpoint into the model. Raises RunError when they do not fit."""
    try:
        model.load_state_dict(checkpoint["model"])
    except (AttributeError, RuntimeError, TypeError):
        raise RunError(f"{path} holds the weights of another network: train again, or name another") from None


def save_figure(figure: Figure, path: Path) -> None:
    """Write a matplotlib Figure as PNG."""
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=150, bbox_inches="tight")


# ---------------------------------------------------------------- command line


def number(kind: type, low: float, high: float, meaning: str) -> Callable[[str], float]:
    """An argparse type: a number from low to high, both included; `meaning` says so in words."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {meaning}")
        return value

    return parse


class Progress:
    """A line on a terminal that rewrites itself; nothing at all when output goes to a file or a pipe."""

    def __init__(self):
        self.shown = sys.stdout.isatty()
        self.last = time.perf_counter()

    def due(self, seconds: float = 0.5) -> bool:
        """True once every so many seconds: when it is time for the next `show`."""
        now = time.perf_counter()
        if now - self.last < seconds:
            return False
        self.last = now
        return True

    def show(self, text: str) -> None:
        if self.shown:
            print(f"\r{text[: shutil.get_terminal_size().columns - 1]}\033[K", end="", flush=True)


def clock(seconds: float) -> str:
    """3725 -> "1:02:05", 65 -> "1:05"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def run(main: Callable[[], None]) -> None:
    """Call main(); an expected error, Ctrl-C or SIGTERM becomes one line and an exit status."""
    status, numbers = 130, (signal.SIGINT, signal.SIGTERM)

    def stop(number, frame):
        nonlocal status
        status = 128 + number
        # Python ignores what is raised while it tidies up (in a __del__, or in a weak dictionary's remove).
        while frame and frame.f_code.co_name not in ("__del__", "remove"):
            frame = frame.f_back
        if not frame or os.name != "posix":
            raise KeyboardInterrupt
        signal.signal(signal.SIGALRM, lambda _, frame: stop(number, frame))
        signal.setitimer(signal.ITIMER_REAL, 0.05)  # so try again a little later

    for number in numbers:
        signal.signal(number, stop)
    # So that a log file shows each epoch when it ends, and no name of a class stops the program.
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    matplotlib.rcParams["text.parse_math"] = False  # a class may be called "$5 to $10"
    try:
        main()
    except RunError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stopped:
        print("\nstopped", *stopped.args, sep="; ", file=sys.stderr)
        sys.exit(status)
    except torch.OutOfMemoryError:
        sys.exit("error: the GPU has too little memory: choose a smaller --batch-size or --device cpu")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
            sys.exit("error: there is too little memory: choose a smaller --batch-size or fewer --workers")
        if "DataLoader" in str(error):
            sys.exit("error: a worker process died, perhaps for lack of memory: use fewer --workers, or 0")
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            sys.exit(f"error: --compile does not work here, leave it out ({str(error).splitlines()[0]})")
        raise
    except OSError as error:
        sys.exit(f"error: {error}")
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)  # no traceback on the way out


# ---------------------------------------------------------------- plots


def best_epoch(history: list[dict]) -> dict:
    """The first row with the highest validation accuracy; among equals the one with the lowest loss."""
    return max(history, key=lambda row: (row["val_accuracy"], -row["val_loss"]))


def plot_curves(history: list[dict], title: str) -> Figure:
    """Loss, accuracy and learning rate over the epochs; dotted lines where the plateau cut the rate.

    history: a row an epoch with epoch, lr, train_loss, train_accuracy, val_loss and val_accuracy (both may be
    None), accuracies in [0, 1].
    """
    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, 3)
    for axis, quantity, unit in zip(panels, ("loss", "accuracy"), ("cross-entropy", "%"), strict=False):
        scale = 100 if quantity == "accuracy" else 1
        for split, style in (("train", {"ls": "--", "marker": "o"}), ("val", {"ls": "-", "marker": "s"})):
            values = [row[f"{split}_{quantity}"] for row in history]
            if None not in values:
                name = "validation" if split == "val" else "training (augmented)"
                axis.plot(epochs, [scale * v for v in values], markersize=3, label=name, **style)
        axis.set(title=quantity.capitalize(), xlabel="epoch", ylabel=f"{quantity} ({unit})")
    if history[0]["val_accuracy"] is not None:
        best = best_epoch(history)
        label = f"best: epoch {best['epoch']}, {100 * best['val_accuracy']:.2f} %"
        panels[1].plot(best["epoch"], 100 * best["val_accuracy"], "k*", markersize=12, label=label)
    rates = [row["lr"] for row in history]
    panels[2].step(epochs, rates, "k.-", where="mid", label="learning rate")
    panels[2].set(title="Learning rate", xlabel="epoch", ylabel="learning rate (log scale)", yscale="log")
    panels[2].set_ylim(min(rates) / 2, max(rates) * 2)
    panels[2].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panels[2].yaxis.set_major_formatter("{x:g}")
    panels[2].yaxis.set_minor_formatter("")
    cuts = [b["epoch"] - 0.5 for a, b in zip(history, history[1:], strict=False) if b["lr"] < a["lr"]]
    for axis in panels:
        for i, cut in enumerate(cuts):
            axis.axvline(cut, color="grey", ls=":", label=None if i else "cut by the plateau")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(alpha=0.3)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize=9)
    return figure


def plot_confusion(confusion: torch.Tensor, classes: list[str], title: str) -> Figure:
    """A matrix of counts (true class, predicted class), shaded by row; each class with its accuracy."""
    count = len(classes)
    shares = (confusion / confusion.sum(1, keepdim=True).clamp_min(1)).numpy()
    size = max(5.5, 0.62 * count + 2)
    figure = Figure(figsize=(size + 1.6, size), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    names = [f"{name}  {100 * shares[i, i]:.1f} %" for i, name in enumerate(classes)]
    axis.set_xticks(range(count), classes, rotation=45, ha="right")
    axis.set_yticks(range(count), names)
    axis.set(title=title, xlabel="predicted class", ylabel="true class and its accuracy")
    if count <= 20:  # more numbers could not be read
        for true, predicted in confusion.nonzero().tolist():
            colour = "white" if shares[true, predicted] > 0.5 else "black"
            text = str(int(confusion[true, predicted]))
            axis.text(predicted, true, text, ha="center", va="center", color=colour, fontsize=9)
    return figure
