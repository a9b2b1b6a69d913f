"""Train ResNet18 on CIFAR-10, cutting the learning rate whenever validation stops improving.

python train.py --epochs 40                             the full run
python train.py --epochs 4 --data demo --width 16       a try of a minute, without a download
python train.py --resume                                go on after a stop
"""

import argparse
import copy
import math
import os
import shlex
import sys
import time
import warnings
from importlib import metadata
from pathlib import Path

import torch
from torch import nn
from torch.optim.lr_scheduler import LinearLR, ReduceLROnPlateau
from torch.optim.swa_utils import get_ema_multi_avg_fn

import data
import utils
from model import NORMS, WIDTH, ResNet18, count_parameters, summary

MOMENTUM = 0.9
# Less than 1 % below the best validation loss is no progress. The loss of averaged weights is so smooth that
# with the default of 0.01 % almost every epoch would be progress, and the rate be cut far too late.
PLATEAU_THRESHOLD = 0.01
MIN_LR = 0.001  # as a share of --lr
WARMUP_STEPS = 200  # in which the rate rises to --lr; all of it at once would throw fresh weights far off
SAVE_SECONDS = 30  # after an epoch the files are written if 30 seconds have passed since the last time
STATE_KEYS = ("settings", "training", "history", "best", "commands", "facts", "classes", "brightness")
NOT_SETTINGS = {"output", "resume", "overwrite"}  # flags that say nothing about the run itself
CAN_CHANGE = {"data", "epochs", "workers", "device", "precision"}  # settings, by --resume
OUTPUT_FILES = ["checkpoint.pt", "last.pt", "history.csv", "augmentations.png", "curves.png", "confusion.png"]
GRADCAM_FILES = ["misclassified.png", "gradcam.png", "own.png"]  # and reports


def get_parser() -> argparse.ArgumentParser:
    formatter, about = argparse.ArgumentDefaultsHelpFormatter, __doc__.partition("\n")[0]
    parser = argparse.ArgumentParser(description=about, formatter_class=formatter, allow_abbrev=False)
    add, number = parser.add_argument, utils.number
    add("--data", type=os.path.expanduser, default=data.DEFAULT_FOLDER, help="folder of images, or demo")
    add("--output", type=utils.path, default=Path("outputs"), help="folder for all that is written")
    add("--epochs", type=number(int, 1), default=40, help="passes over the training images")
    add("--batch-size", type=number(int, 1), default=128, help="images per step")
    add("--lr", type=number(float, 1e-9, 1e6), default=0.1, help="learning rate after the warm-up")
    add("--weight-decay", type=number(float, 0, 0.9), default=5e-4, help="L2 penalty")
    add("--factor", type=number(float, 0.001, 0.999), default=0.3, help="multiplies the rate at a plateau")
    add("--patience", type=number(int, 0), default=1, help="epochs without progress before a cut")
    add("--label-smoothing", type=number(float, 0, 0.9), default=0.1, help="share spread over all classes")
    add("--val-split", type=number(float, 0.001, 0.9), default=0.1, help="share kept for validation")
    add("--limit", type=number(int, 2), help="use only so many training images, validation included")
    add("--without", nargs="+", choices=[*data.augmentations([0, 0, 0])], default=[], help="leave these out")
    add("--norm", choices=NORMS, default="batch", help="normalisation; layer: with standardised filters")
    add("--width", type=number(int, 1, 1024), default=WIDTH, help="channels of the stem")
    add("--workers", type=number(int, 0, 64), help="processes that augment, else 1, or up to 4 with CUDA")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of all randomness")
    add("--device", choices=utils.DEVICES, default="auto", help="where to compute")
    add("--precision", choices=["auto", *utils.PRECISIONS], default="auto", help="number format")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help="go on with the run in OUTPUT")
    group.add_argument("--overwrite", action="store_true", help="replace the run in OUTPUT")
    return parser


def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, dict | None]:
    """The settings and, with --resume, the saved state to go on from. Raises RunError."""
    parser = get_parser()
    args = parser.parse_args(argv)
    if not args.resume:
        if not args.overwrite and any(args.output.glob("*.pt")):
            raise utils.RunError(f"{args.output} holds a run: use --resume, --overwrite or another --output")
        return args, None
    state = utils.load_checkpoint(args.output / "last.pt", STATE_KEYS, "use --overwrite or another --output")
    args = parser.parse_args(argv, argparse.Namespace(**state["settings"]))  # these, but for flags given now
    for name, value in state["settings"].items():
        if name not in CAN_CHANGE and getattr(args, name) != value:
            parser.error(f"--{name.replace('_', '-')} would change the run, which has {value}: leave it out")
    return args, state


class Training:
    """Everything with a state. All of it is saved, so that --resume goes on as if there had been no stop."""

    def __init__(self, args: argparse.Namespace, classes: int, device: torch.device, fp16: bool):
        torch.manual_seed(args.seed)
        model = ResNet18(classes, args.norm, args.width).to(device, memory_format=utils.memory_format(device))
        decay = args.weight_decay
        optimizer = torch.optim.SGD(model.parameters(), args.lr, MOMENTUM, weight_decay=decay, nesterov=True)
        plateau = {"factor": args.factor, "patience": args.patience, "threshold": PLATEAU_THRESHOLD}
        self.model = model
        # The exponential moving average of the weights is better: it is validated, tested and kept.
        self.averaged = copy.deepcopy(model)
        self.optimizer = optimizer
        self.warmup = LinearLR(optimizer, start_factor=1 / WARMUP_STEPS, total_iters=WARMUP_STEPS)
        self.plateau = ReduceLROnPlateau(optimizer, min_lr=MIN_LR * args.lr, **plateau)
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)  # active for float16 only
        # In float16 the first step may overflow and be skipped, which looks like a wrong order of calls.
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")

    def state_dict(self) -> dict:
        return {name: part.state_dict() for name, part in vars(self).items()}

    def load_state_dict(self, state: dict) -> None:
        for name, part in vars(self).items():
            if state[name]:  # a scaler that is not used has none
                part.load_state_dict(state[name])


def train_one_epoch(training: Training, loader, normalize, criterion, precision, what="training") -> dict:
    """One pass over the training images. Returns train_loss, train_accuracy in [0, 1], images_per_second."""
    model, optimizer, scaler = training.model, training.optimizer, training.scaler
    device = next(model.parameters()).device
    pinned = device.type == "cuda"  # only from pinned memory is it safe to go on while a copy is made
    # Parameters and running statistics themselves, no copies; to count batches on average makes no sense.
    tensors = [network.state_dict().values() for network in (training.averaged, model)]
    averaged, current = ([tensor for tensor in of if tensor.is_floating_point()] for of in tensors)
    # It looks back about one epoch. (AveragedModel does so, too, but makes the CPU wait in each step.)
    update_average = get_ema_multi_avg_fn(decay=1 - 1 / len(loader))
    loss_sum = correct = seen = 0
    start = time.perf_counter()
    model.train()
    for images, labels in utils.progress(loader, what):
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


def evaluate(model: ResNet18, split: data.Split, normalize, criterion, precision) -> tuple:
    """The loss, the accuracy in [0, 1], and the confusion matrix of counts (true class, predicted class)."""
    logits, labels = utils.predict(model, split, normalize, precision)
    pairs = labels * model.classes + logits.argmax(1)
    confusion = pairs.bincount(minlength=model.classes**2).reshape(model.classes, -1)
    return criterion(logits, labels).item(), confusion.trace().item() / len(labels), confusion


def save(output: Path, about: dict, training: Training, history: list[dict], best: dict | None) -> None:
    """Write what an epoch changes, last.pt last: whenever the run is killed, it holds the end of an epoch."""
    if history:  # else it is the first time, and there is nothing but last.pt to write
        utils.save_checkpoint(best, output / "checkpoint.pt")
        rows = [",".join(map(str, row)) for row in (history[0], *(row.values() for row in history))]
        utils.write(output / "history.csv", "\n".join([*rows, ""]).encode(), needed=False)
        utils.save_figure(utils.plot_curves(history, about["title"]), output / "curves.png", needed=False)
    state = {**about, "training": training.state_dict(), "history": history, "best": best}
    utils.save_checkpoint(state, output / "last.pt")


def resume(state: dict, about: dict, training: Training) -> tuple[list[dict], dict | None]:
    """Restore `training`; `about` then covers all of it. Returns history and best. Raises RunError."""
    # The same images in another order would not do: some that were trained on would be for validation.
    same = state["classes"] == about["classes"] and state["facts"]["images"] == about["facts"]["images"]
    # On another machine a JPEG may be decoded slightly differently.
    if not same or not torch.allclose(state["brightness"], about["brightness"], atol=0.1):
        raise utils.RunError("--data: not the images of the run, or not in the same order")
    training.load_state_dict(state["training"])
    print(f"Going on after epoch {len(state['history'])}.")
    about["commands"] = state["commands"] + about["commands"]
    for key in ("hardware", "versions"):
        parts = [*state["facts"][key].split(", then "), about["facts"][key]]
        about["facts"][key] = ", then ".join(dict.fromkeys(parts))  # each once, in order
    return state["history"], state["best"]


def clear(output: Path) -> None:
    """Make the folder, and remove all that an earlier run left in it, but for an edited report."""
    output.mkdir(parents=True, exist_ok=True)
    reports = [path.name for path in output.glob("report*.md") if utils.is_unedited(path)]
    for name in OUTPUT_FILES + GRADCAM_FILES + reports:
        (output / name).unlink(missing_ok=True)


def describe(args, argv, splits: dict, mean, std, training: Training, steps: int, precision) -> dict:
    """What the header, gradcam.py, its report and --resume need to know of a run, besides its epochs."""
    train, model, device = splits["training"], training.model, next(training.model.parameters()).device
    without = f", without {' and '.join(args.without)}" if args.without else ""
    hardware = f"{device.type} (threads: {torch.get_num_threads()})"
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else hardware
    packages = ("torch", "torchvision", "albumentations", "matplotlib")
    settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    return {
        "title": f"{model.name} on {train.name}, {args.norm} norm{without}, seed {args.seed}",
        "facts": {
            "network": f"{model.name}, {args.norm} normalisation, {count_parameters(model):,} parameters",
            "images": ", ".join(f"{len(split.labels):,} {name}" for name, split in splits.items()),
            "hardware": f"{hardware}, {str(precision).removeprefix('torch.')}",
            "versions": ", ".join(f"{name} {metadata.version(name)}" for name in packages),
            "seed": args.seed,
        },
        "augmentation": [data.IN_WORDS.get(t, f"{t} | |") for t in data.augmentations(mean, args.without)],
        **{"steps_per_epoch": steps, "warmup_steps": WARMUP_STEPS},
        **{"momentum": MOMENTUM, "threshold": PLATEAU_THRESHOLD},
        "commands": [shlex.join(["python", "train.py", *argv])],
        "summary": summary(copy.deepcopy(model).cpu().eval()),
        "settings": settings | {"data": args.data if args.data == "demo" else str(Path(args.data).resolve())},
        # Of each validation image the mean, in [0, 255], by which --resume knows it.
        "brightness": torch.from_numpy(splits["validation"].images.mean((1, 2, 3))),
        **{"name": train.name, "classes": train.classes, "mean": mean, "std": std},
    }


def print_header(about: dict, args: argparse.Namespace, device: torch.device) -> None:
    for name, fact in {**about["facts"], "output": args.output}.items():
        print(f"{name:12}{fact}")
    if device.type == "cpu" and args.device == "auto":
        print("No GPU is in use: there is none, or this PyTorch is built without (pytorch.org/get-started).")
        if args.width > 16:
            print("On a CPU, --width 16 takes a quarter of the time and is some 4 points less accurate.")
    threads, load = torch.get_num_threads(), os.getloadavg()[0] if hasattr(os, "getloadavg") else 0
    if device.type == "cpu" and threads > 1 and load + threads > os.cpu_count() + 0.5:
        print("Other programs are at work: beside them OMP_NUM_THREADS=1 is many times faster.")
    if (steps := about["steps_per_epoch"] * args.epochs) < WARMUP_STEPS:
        print(f"Only {steps} steps: the learning rate rises for {WARMUP_STEPS}, so use more epochs.")
    print(f'After a stop: python train.py --resume --output "{args.output}"')
    print("\n  epoch       lr   train loss  accuracy   val loss  accuracy   images/s     time      left")


def print_epoch(row: dict, epochs: int, is_best: bool, next_lr: float) -> None:
    left = utils.clock((epochs - row["epoch"]) * row["seconds"])
    losses = "{train_loss:10.4f}  {train_accuracy:8.4f}   {val_loss:8.4f}  {val_accuracy:8.4f}".format(**row)
    times = f"{row['images_per_second']:8,.0f}  {utils.clock(row['seconds']):>7}  {left:>8}"
    print(f"{row['epoch']:3}/{epochs:<3} {row['lr']:8.3g}   {losses}   {times}{'  best' if is_best else ''}")
    if next_lr < row["lr"]:
        print(f"        plateau: the learning rate is cut from {row['lr']:.3g} to {next_lr:.3g}")


def print_result(result: dict, output: Path) -> None:
    heading = f"test accuracy {result['test_accuracy']:.2%}, with the weights of epoch {result['epoch']}"
    confusion = torch.tensor(result["confusion"])
    figure = utils.plot_confusion(confusion, result["classes"], f"{result['title']}\n{heading}")
    utils.save_figure(figure, output / "confusion.png", needed=False)
    print(f"\n{result['name']}: {heading}")
    for name, row, right in zip(result["classes"], confusion, confusion.diagonal(), strict=True):
        print(f"    {name:20} {right / row.sum():8.2%}")
    print(f"Trained for {utils.clock(result['training_seconds'])}.")
    print(f"Written to {output}: {', '.join(OUTPUT_FILES)}")
    print(f'Next: python gradcam.py --n 10 --checkpoint "{output / "checkpoint.pt"}"')
    utils.show(output / "curves.png", output / "confusion.png")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args, state = parse_args(argv)
    device = utils.choose_device(args.device)
    precision = utils.choose_precision(args.precision, device)
    torch.backends.cudnn.benchmark = True  # let cuDNN time its algorithms and take the fastest

    # Data
    train, test = data.load_split(args.data, "train"), data.load_split(args.data, "test")
    if train.classes != test.classes:
        differing = ", ".join(map(repr, sorted({*train.classes} ^ {*test.classes})))
        raise utils.RunError(f"{args.data}: train and test must have the same classes, not so {differing}")
    mean, std = data.channel_statistics(train.images)  # of all, so that no flag changes it
    normalize = data.Normalize(mean, std).to(device)
    techniques = data.augmentations(mean, args.without)
    train, validation = data.split_validation(train, args.val_split, args.limit, args.seed)
    splits = {"training": train, "validation": validation, "test": test}
    loader = data.train_loader(train, techniques, args.batch_size, args.seed, args.workers, device)

    # Network, optimizer, schedulers
    training = Training(args, len(train.classes), device, precision == torch.float16)
    criterion = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)  # in validation, too
    about = describe(args, argv, splits, mean, std, training, len(loader), precision)
    history, best = resume(state, about, training) if state else ([], None)
    if not state:  # all settings are checked: only now an earlier run may go
        picture = data.plot_augmentations(train, techniques)
        clear(args.output)
        utils.save_figure(picture, args.output / "augmentations.png", needed=False)
        save(args.output, about, training, history, best)
    print_header(about, args, device)

    # Epochs
    saved = time.monotonic()
    for epoch in range(len(history) + 1, args.epochs + 1):
        start = time.perf_counter()
        loader.sampler.epoch = epoch
        what = f"epoch {epoch} of {args.epochs}"
        row = train_one_epoch(training, loader, normalize, criterion, precision, what)
        if epoch == 1:  # begin the average anew: the random weights of the start are part of it
            training.averaged.load_state_dict(training.model.state_dict())
        val_loss, val_accuracy, _ = evaluate(training.averaged, validation, normalize, criterion, precision)
        if not math.isfinite(row["train_loss"] + val_loss):
            raise utils.RunError("the loss is no longer a finite number: try a smaller --lr")
        lr = training.optimizer.param_groups[0]["lr"]  # of the last step
        if training.warmup.last_epoch >= WARMUP_STEPS:  # it counts steps; before, the rate still rises
            training.plateau.step(val_loss)
        row |= {"val_loss": val_loss, "val_accuracy": val_accuracy, "seconds": time.perf_counter() - start}
        history.append({"epoch": epoch, "lr": lr, **row})
        is_best = history[-1] is utils.best_epoch(history)  # by validation accuracy
        if is_best:
            best = {**about, **history[-1], "model": copy.deepcopy(training.averaged.state_dict())}
        if time.monotonic() - saved > SAVE_SECONDS or epoch == args.epochs:
            save(args.output, about, training, history, best)
            saved = time.monotonic()
        print_epoch(history[-1], args.epochs, is_best, training.optimizer.param_groups[0]["lr"])

    # Test
    training.averaged.load_state_dict(best["model"])  # those of the last epoch are saved
    _, accuracy, confusion = evaluate(training.averaged, test, normalize, criterion, precision)
    result = {**best, **about, "test_accuracy": accuracy, "confusion": confusion.tolist(), "history": history}
    result["training_seconds"] = sum(row["seconds"] for row in history)
    utils.save_checkpoint(result, args.output / "checkpoint.pt")
    print_result(result, args.output)


if __name__ == "__main__":
    utils.run(main)
