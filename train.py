"""Train ResNet18 on CIFAR-10, cutting the learning rate whenever validation stops improving.

python train.py --epochs 40                             the full run
python train.py --epochs 4 --data demo --width 16       a try of a minute, without a download
python train.py --resume                                go on after a stop
"""

import argparse
import copy
import csv
import io
import math
import sys
import time
from importlib import metadata
from pathlib import Path

import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LinearLR, ReduceLROnPlateau
from torch.optim.swa_utils import get_ema_multi_avg_fn

import data
import utils
from model import NORMS, WIDTH, ResNet18, count_parameters

MOMENTUM = 0.9
# Progress of less than 1 % in the validation loss counts as none. The loss of averaged weights is so smooth
# that with the default of 0.01 % almost every epoch is progress, and the rate is cut far too late.
PLATEAU_THRESHOLD = 0.01
MIN_LR = 0.001  # as a share of --lr
WARMUP_STEPS = 200  # in which the rate rises to --lr; the full rate at once would throw fresh weights far off
SAVE_SECONDS = 30  # after an epoch the files are written if so many have passed since the last time
NOT_SETTINGS = {"output", "resume", "overwrite"}  # flags that say nothing about the run itself
CAN_CHANGE = {"data", "epochs", "workers", "device", "precision", "compile"}  # settings, by --resume
OUTPUT_FILES = ["checkpoint.pt", "last.pt", "history.csv", "augmentations.png", "curves.png", "confusion.png"]
GRADCAM_FILES = ["misclassified.png", "gradcam.png", "own.png", "report.md"]


def get_parser() -> argparse.ArgumentParser:
    parser = utils.Parser("Train ResNet18; validation decides when the learning rate is cut.")
    add, number = parser.add_argument, utils.number
    add("--data", default=data.DEFAULT_FOLDER, help="folder of CIFAR-10 or of images, or demo")
    add("--output", type=Path, default=Path("outputs"), help="folder for all that is written")
    add("--epochs", type=number(int, 1), default=40, help="passes over the training images")
    add("--batch-size", type=number(int, 1), default=128, help="images per step")
    add("--lr", type=number(float, 1e-9, 1e6), default=0.1, help="learning rate after the warm-up")
    add("--weight-decay", type=number(float, 0, 0.9), default=5e-4, help="L2 penalty")
    add("--factor", type=number(float, 0.001, 0.999), default=0.3, help="multiplies the rate at a plateau")
    add("--patience", type=number(int, 0), default=1, help="epochs without progress that are let pass first")
    add("--label-smoothing", type=number(float, 0, 0.9), default=0.1, help="share spread over all classes")
    add("--val-split", type=number(float, 0.001, 0.9), default=0.1, help="share kept for validation")
    add("--limit", type=number(int, 2), help="use only so many training images, validation included")
    techniques = list(data.augmentations(mean=[0, 0, 0]))  # only their names are needed
    add("--without", nargs="+", choices=techniques, default=[], help="techniques to leave out")
    add("--norm", choices=NORMS, default="batch", help="normalisation; layer: with standardised filters")
    add("--width", type=number(int, 1, 1024), default=WIDTH, help="channels of the stem")
    add("--workers", type=number(int, 0, 64), help="processes that augment; else 1, for CUDA up to 16")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of all randomness")
    add("--device", choices=utils.DEVICES, default="auto", help="where to compute")
    add("--precision", choices=["auto", *utils.PRECISIONS], default="auto", help="number format")
    switch = argparse.BooleanOptionalAction  # --no-compile: a run can be resumed without it
    add("--compile", action=switch, default=False, help="torch.compile: a slow start, then faster steps")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help="go on with the run in OUTPUT")
    group.add_argument("--overwrite", action="store_true", help="replace the run in OUTPUT")
    return parser


def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, dict | None]:
    """The settings and, with --resume, the saved state to go on from. Raises RunError."""
    parser = get_parser()
    args = parser.parse_args(argv)
    if args.overwrite:
        return args, None
    last = args.output / "last.pt"
    # Before it is read, so that save() notices should another run write it now.
    mtime = last.stat().st_mtime_ns if last.exists() else 0
    keys = ("settings", "training", "history", "best", "classes", "hardware", "versions")
    state = utils.load_checkpoint(last, *keys) if args.resume or mtime else None
    if not args.resume:
        finished_an_epoch = any((args.output / name).exists() for name in ("checkpoint.pt", "history.csv"))
        if finished_an_epoch or state and state["history"]:
            ways = "--resume, --overwrite" if state else "--overwrite"
            raise utils.RunError(f"{args.output} holds a run: use {ways} or another --output")
        return args, None
    parser.set_defaults(**state["settings"])
    args = parser.parse_args(argv)  # again: now a flag that was not given has the value of the run
    for name, value in state["settings"].items():
        if name not in CAN_CHANGE and getattr(args, name) != value:
            flag = f"--{name.replace('_', '-')} {getattr(args, name)}"
            parser.error(f"{flag} would change the run, which has {value}: leave it out")
    if args.epochs < len(state["history"]):
        parser.error(f"--epochs {args.epochs}: the run already has {len(state['history'])}")
    return args, {**state, "mtime": mtime}


class Training:
    """Everything with a state. All of it is saved, so that --resume goes on as if there had been no stop."""

    def __init__(self, args: argparse.Namespace, classes: int, device: torch.device, fp16: bool):
        torch.manual_seed(args.seed)
        model = ResNet18(classes, args.norm, args.width).to(device, memory_format=utils.memory_format(device))
        optimizer = SGD(model.parameters(), args.lr, MOMENTUM, weight_decay=args.weight_decay, nesterov=True)
        plateau = {"factor": args.factor, "patience": args.patience, "threshold": PLATEAU_THRESHOLD}
        self.model = model
        # The exponential moving average of the weights is better: this is validated, tested and kept.
        self.averaged = copy.deepcopy(model)
        self.optimizer = optimizer
        self.warmup = LinearLR(optimizer, start_factor=1 / WARMUP_STEPS, total_iters=WARMUP_STEPS)
        # eps: cuts smaller than this are left out; by default it is not in proportion to the rate.
        self.plateau = ReduceLROnPlateau(optimizer, min_lr=MIN_LR * args.lr, eps=1e-7 * args.lr, **plateau)
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)  # does nothing but for float16

    def state_dict(self) -> dict:
        return {name: part.state_dict() for name, part in vars(self).items()}

    def load_state_dict(self, state: dict) -> None:
        for name, part in vars(self).items():
            if state[name]:  # a scaler that is not used has none
                part.load_state_dict(state[name])


def float_tensors(module: nn.Module) -> list[torch.Tensor]:
    """The parameters and running statistics themselves, no copies: all that averaging makes sense for."""
    return [tensor for tensor in module.state_dict().values() if tensor.is_floating_point()]


def train_one_epoch(training: Training, loader, normalize, criterion, precision, estimate_for=0) -> dict:
    """One pass over the training images. Returns train_loss, train_accuracy in [0, 1], images_per_second.

    estimate_for: if not 0, a line says early on how long so many epochs will take
    """
    model, optimizer, scaler = training.model, training.optimizer, training.scaler
    device = normalize.mean.device
    pinned = device.type == "cuda"  # from other memory, copies that go on while we do may read what is gone
    averaged, current = float_tensors(training.averaged), float_tensors(model)
    # Over about one epoch. (AveragedModel does the same, but makes the CPU wait for the GPU in each step.)
    update_average = get_ema_multi_avg_fn(decay=1 - 1 / len(loader))
    loss_sum = correct = seen = 0
    start = time.perf_counter()
    model.train()
    for images, labels in utils.progress(loader, "training", estimate_for):
        images, labels = images.to(device, non_blocking=pinned), labels.to(device, non_blocking=pinned)
        with utils.autocast(device, precision):
            logits = model(normalize(images))  # (B, classes)
            loss = criterion(logits, labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        training.warmup.step()
        update_average(averaged, current, None)  # the third argument, a count, is not used

        # The sums stay on the device: to read them in each step would make the CPU wait.
        loss_sum += loss.detach() * len(labels)
        correct += (logits.argmax(1) == labels).sum()
        seen += len(labels)
    # Measured on augmented images while the weights still change, so validation often looks better.
    row = {"train_loss": loss_sum.item() / seen, "train_accuracy": correct.item() / seen}
    return {**row, "images_per_second": seen / (time.perf_counter() - start)}


def validate(model: ResNet18, split: data.Split, normalize, criterion, precision: torch.dtype) -> dict:
    """val_loss and val_accuracy in [0, 1]."""
    logits, labels = utils.predict(model, split, normalize, precision)
    accuracy = (logits.argmax(1) == labels).float().mean().item()
    return {"val_loss": criterion(logits, labels).item(), "val_accuracy": accuracy}


def final_test(model: ResNet18, split: data.Split, normalize, precision: torch.dtype) -> dict:
    """Accuracies in [0, 1] and the confusion matrix, rows of counts (true class, predicted class).

    mirrored_accuracy is with test-time augmentation: an image and its mirror image vote together.
    """
    logits, labels = utils.predict(model, split, normalize, precision)
    mirrored = split._replace(images=split.images[:, :, ::-1].copy())
    mirrored_logits, _ = utils.predict(model, mirrored, normalize, precision)
    both = logits.softmax(1) + mirrored_logits.softmax(1)
    pairs = (labels * model.classes + logits.argmax(1)).bincount(minlength=model.classes**2)
    confusion = pairs.reshape(model.classes, -1)
    return {
        "test_accuracy": confusion.trace().item() / len(labels),
        "mirrored_accuracy": (both.argmax(1) == labels).float().mean().item(),
        "class_accuracy": (confusion.diagonal() / confusion.sum(1)).tolist(),
        "confusion": confusion.tolist(),
    }


def remove(output: Path, names: list[str]) -> None:
    """Remove these files of an earlier run, and all temporary ones that it left if it was killed."""
    patterns = [name.replace(".", "*.") for name in OUTPUT_FILES + GRADCAM_FILES]  # *: report-2.md, too
    temporary = [path for pattern in patterns for path in output.glob(f"{pattern}.*.tmp")]
    for path in [output / name for name in names] + temporary:
        path.unlink(missing_ok=True)


def save(output: Path, mtime: int, about: dict, training: Training, history: list, best: dict | None) -> int:
    """Write all files, last.pt after all others: whenever the run is killed, it holds the end of an epoch.

    mtime is when this run last wrote last.pt, in nanoseconds. Returns the new one. Raises RunError.
    """
    last = output / "last.pt"
    if history:  # else it is the first time, and there is nothing but last.pt to write
        if last.stat().st_mtime_ns != mtime:  # two runs must not mix
            raise utils.RunError(f"another run now writes to {output}, so this one stops")
        utils.save_checkpoint(best, output / "checkpoint.pt")
        table = io.StringIO()
        writer = csv.DictWriter(table, history[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
        utils.write(output / "history.csv", table.getvalue().encode(), needed=False)
        utils.save_figure(utils.plot_curves(history, about["title"]), output / "curves.png", needed=False)
    state = {**about, "training": training.state_dict(), "history": history, "best": best}
    utils.save_checkpoint(state, last)
    return last.stat().st_mtime_ns


def begin(output: Path, about: dict, training: Training) -> int:
    """Make the folder of a new run, remove an earlier one from it, and write the first last.pt: see save.

    A report that the user has edited stays, with its pictures of errors.
    """
    utils.make_folder(output)
    names = [*OUTPUT_FILES, "own.png"]
    for report in [output / "report.md", *output.glob("report-[2-9].md")]:
        if not report.exists() or utils.is_unedited(report):
            ending = report.stem.removeprefix("report")
            names += [report.name, f"misclassified{ending}.png", f"gradcam{ending}.png"]
    remove(output, names)
    return save(output, 0, about, training, [], None)


def resume(args: argparse.Namespace, state: dict, about: dict, training: Training) -> tuple:
    """Restore `training` from a saved state; `about` then tells where all epochs ran, not only the next.

    Returns history, best and mtime. Raises RunError.
    """
    # The same images in another order would not do: some that were trained on would be for validation.
    now = about["brightness"]
    before = state.get("brightness", now)  # a state of an older version has none
    same = state["classes"] == about["classes"] and before.shape == now.shape
    if not same or not torch.allclose(before, now, atol=0.1):  # a JPEG may be decoded a little otherwise
        raise utils.RunError(f"--data {args.data}: not the images of the run, or not in the same order")
    training.load_state_dict(state["training"])
    remove(args.output, [])
    epochs = len(state["history"])
    for key in ("hardware", "versions"):
        if epochs == args.epochs or epochs and state[key].endswith(about[key]):
            about[key] = state[key]
        elif epochs:
            about[key] = f"{state[key]}; from epoch {epochs + 1} {about[key]}"
    print(f"Going on: {epochs} of {args.epochs} epochs are saved.")
    return state["history"], state["best"], state["mtime"]


def command(args: argparse.Namespace) -> str:
    """The line that gives a run with these settings again."""
    words = [f"python train.py --epochs {args.epochs}"]
    for name, default in vars(get_parser().parse_args([])).items():
        value, flag = getattr(args, name), f"--{name.replace('_', '-')}"
        same = value == default or (name == "data" and Path(value).resolve() == Path(default).resolve())
        if not same and name not in NOT_SETTINGS | {"epochs"}:
            values = value if isinstance(value, list) else [] if value is True else [value]
            words += [flag, *(utils.quote(one) for one in values)]
    return " ".join(words)


def describe(args, splits: dict, mean, std, techniques: dict, training: Training, device, precision) -> dict:
    """What gradcam.py, its report and --resume need to know of a run, besides its epochs and weights."""
    train, model = splits["training"], training.model
    settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    settings["data"] = args.data if args.data == "demo" else str(Path(args.data).resolve())
    without = f", without {' and '.join(args.without)}" if args.without else ""
    counts = ", ".join(f"{len(split.labels):,} {name}" for name, split in splits.items())
    names = {"cpu": f"cpu (threads: {torch.get_num_threads()})", "mps": "mps"}
    hardware = names.get(device.type) or torch.cuda.get_device_name(device)
    defaults = training.optimizer.defaults
    rates = ", ".join(f"{name} {defaults[name]}" for name in ("lr", "momentum", "weight_decay", "nesterov"))
    steps = -(-len(train.labels) // args.batch_size)
    packages = ("torch", "torchvision", "albumentations", "matplotlib")
    return {
        "title": f"{model.name} on {train.name}, {args.norm} norm{without}, seed {args.seed}",
        "images": f"{counts} images in {model.classes} classes",
        "parameters": f"{count_parameters(model):,}",
        "hardware": f"{hardware}, {str(precision).removeprefix('torch.')}",
        "versions": ", ".join(f"{name} {metadata.version(name)}" for name in packages),
        "command": command(args),
        "augmentation": {name: ", ".join(map(repr, parts)) for name, parts in techniques.items()},
        "optimizer": f"{rates}; {args.batch_size} images a step; the rate rises during {WARMUP_STEPS} steps",
        "average": f"exponential, decay 1 - 1/(steps of an epoch) = 1 - 1/{steps}",
        "plateau": training.plateau.state_dict(),  # for its settings: factor, patience, threshold, min_lrs
        "settings": settings,
        "steps": steps * args.epochs,
        # Of each validation image the mean, in [0, 255], by which --resume knows it.
        "brightness": torch.from_numpy(splits["validation"].images.mean((1, 2, 3))),
        **{"name": train.name, "classes": train.classes, "mean": mean, "std": std},
    }


def print_header(about: dict, output: Path, device: torch.device) -> None:
    for name in ("title", "images", "parameters", "hardware"):
        print(f"{name:12}{about[name]}")
    print(f"output      {output}; after a stop: python train.py --resume --output {utils.quote(output)}")
    if device.type == "cpu" and about["settings"]["device"] == "auto":
        if about["settings"]["width"] == WIDTH:
            print("No GPU is in use; one would be far faster. On a CPU, --width 16 takes a quarter of the")
            print("time or less and is about 4 points less accurate on CIFAR-10 (see README).")
        if not torch.version.cuda and not torch.version.hip and sys.platform != "darwin":
            print("This PyTorch was built without CUDA; with it: https://pytorch.org/get-started/locally")
    if about["steps"] < WARMUP_STEPS:
        print(f"Only {about['steps']} steps: the learning rate rises for {WARMUP_STEPS}, so use more epochs.")
    print("\n  epoch       lr   train loss  accuracy   val loss  accuracy   images/s     time      left")


def print_epoch(row: dict, epochs: int, is_best: bool, next_lr: float) -> None:
    left = utils.clock((epochs - row["epoch"]) * row["seconds"])
    losses = "{train_loss:10.4f}  {train_accuracy:8.4f}   {val_loss:8.4f}  {val_accuracy:8.4f}".format(**row)
    times = f"{row['images_per_second']:8,.0f}  {utils.clock(row['seconds']):>7}  {left:>8}"
    print(f"{row['epoch']:3}/{epochs:<3} {row['lr']:8.3g}   {losses}   {times}{'  best' if is_best else ''}")
    if next_lr < row["lr"]:
        print(f"        plateau: the learning rate is cut from {row['lr']:.3g} to {next_lr:.3g}")


def print_result(result: dict, output: Path) -> None:
    accuracy, epoch = result["test_accuracy"], result["epoch"]
    figure = utils.plot_confusion(result, f"{result['title']}: test accuracy {accuracy:.2%} (epoch {epoch})")
    utils.save_figure(figure, output / "confusion.png", needed=False)
    print(f"\nTest accuracy on {result['name']}: {accuracy:.2%}, with the weights of epoch {epoch}")
    width = max(map(len, result["classes"]))
    for name, share in zip(result["classes"], result["class_accuracy"], strict=True):
        print(f"    {utils.pad(name, width)} {share:8.2%}")
    print(f"Averaged with the mirrored image (test-time augmentation): {result['mirrored_accuracy']:.2%}")
    print(f"Trained for {utils.clock(result['training_seconds'])}.")
    print(f"Written to {output}: {', '.join(OUTPUT_FILES)}")
    print(f"Next: python gradcam.py --n 10 --checkpoint {utils.quote(output / 'checkpoint.pt')}")
    utils.show(output / "curves.png", output / "confusion.png")


def fit(args: argparse.Namespace, state: dict | None) -> None:
    """Train from the beginning, or continue from a saved `state`; then test."""
    device = utils.choose_device(args.device)
    precision = utils.choose_precision(args.precision, device)
    torch.backends.cudnn.benchmark = True  # let cuDNN time its algorithms and take the fastest

    # Data
    train, test = data.load_split(args.data, "train"), data.load_split(args.data, "test")
    if train.classes != test.classes:
        differing = ", ".join(sorted({*train.classes} ^ {*test.classes}))
        raise utils.RunError(
            f"{args.data}: train and test must have the same class folders, not so {differing}"
        )
    mean, std = data.channel_statistics(train.images)
    normalize = data.Normalize(mean, std).to(device)
    techniques = data.augmentations(mean, args.without)
    train, validation = data.split_validation(train, args.val_split, args.limit, args.seed)
    splits = {"training": train, "validation": validation, "test": test}

    # Network, optimizer, schedulers
    training = Training(args, len(train.classes), device, precision == torch.float16)
    criterion = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)
    about = describe(args, splits, mean, std, techniques, training, device, precision)
    if state:
        history, best, mtime = resume(args, state, about, training)
    else:
        history, best, mtime = [], None, begin(args.output, about, training)
    if not (args.output / "augmentations.png").exists():
        look = data.plot_augmentations(train, techniques)
        utils.save_figure(look, args.output / "augmentations.png", needed=False)
    if args.compile:
        training.model.compile()
    print_header(about, args.output, device)

    # Epochs
    estimate_for = args.epochs - len(history)
    with data.train_loader(train, techniques, args.batch_size, args.seed, args.workers, device) as loader:
        for epoch in range(len(history) + 1, args.epochs + 1):
            start = time.perf_counter()
            loader.sampler.epoch = epoch
            row = train_one_epoch(training, loader, normalize, criterion, precision, estimate_for)
            estimate_for = 0
            if epoch == 1:  # begin the average anew: so far the random weights of the start are part of it
                training.averaged.load_state_dict(training.model.state_dict())
            row |= validate(training.averaged, validation, normalize, criterion, precision)
            if not math.isfinite(row["train_loss"] + row["val_loss"]):
                raise utils.RunError("the loss is no longer a finite number: try a smaller --lr")
            lr = training.optimizer.param_groups[0]["lr"]
            if training.warmup.last_epoch >= WARMUP_STEPS:  # it counts steps; before, the rate still rises
                training.plateau.step(row["val_loss"])
            history.append({"epoch": epoch, "lr": lr, **row, "seconds": time.perf_counter() - start})
            is_best = history[-1] is utils.best_epoch(history)  # by validation accuracy
            if is_best:
                best = {**about, **history[-1], "model": copy.deepcopy(training.averaged.state_dict())}
            if abs(time.time_ns() - mtime) > SAVE_SECONDS * 1e9:  # abs: a file server's clock may be ahead
                mtime = save(args.output, mtime, about, training, history, best)
            print_epoch(history[-1], args.epochs, is_best, training.optimizer.param_groups[0]["lr"])
    mtime = save(args.output, mtime, about, training, history, best)

    # Test
    kept = copy.deepcopy(training.averaged)  # whose own state is saved once more below
    kept.load_state_dict(best["model"])
    result = {**best, **about, **final_test(kept, test, normalize, precision)}
    result["training_seconds"] = sum(row["seconds"] for row in history)
    save(args.output, mtime, about, training, history, result)
    print_result(result, args.output)


@utils.explained_errors()
def main(argv: list[str] | None = None) -> None:
    fit(*parse_args(argv))


if __name__ == "__main__":
    utils.run(main)
