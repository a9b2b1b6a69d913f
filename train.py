"""Train ResNet18 on CIFAR-10; whenever the validation loss plateaus, the learning rate is reduced.

python train.py --epochs 40                                              the full run
python train.py --data demo --width 16 --epochs 10 --batch-size 32       a minute, offline
python train.py --resume                                                 continue after a stop
"""

import argparse
import copy
import csv
import io
import math
import os
import shlex
import sys
import time
import warnings
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LinearLR, ReduceLROnPlateau
from torch.optim.swa_utils import get_ema_multi_avg_fn

import data
import utils
from model import NORMS, WIDTH, ResNet18, count_parameters, summary

MOMENTUM = 0.9
# Less than 1% below the best validation loss is no progress. The loss of averaged weights is so smooth that
# with the default of 0.01% almost every epoch would be progress, and the rate would be reduced far too late.
PLATEAU_THRESHOLD = 0.01
# The learning rate rises to --lr: starting with all of it would throw fresh weights far off.
WARMUP_STEPS = 200
SAVE_SECONDS = 30  # after an epoch the files are written if 30 seconds have passed since the last time
NOT_SETTINGS = {"output", "resume", "overwrite"}  # flags that say nothing about the run itself
CAN_CHANGE = {"data", "epochs", "workers", "device", "precision"}  # settings that --resume may change
OUTPUT_FILES = ["checkpoint.pt", "last.pt", "history.csv", "augmentations.png", "curves.png", "confusion.png"]
GRADCAM_FILES = ["misclassified.png", "gradcam.png", "own.png"]  # and reports
EPOCH_HEAD = "  epoch       lr   train loss  accuracy   val loss  accuracy   images/s     time      left"
EPOCH_LINE = (
    "{epoch:3}/{epochs:<3} {lr:8.3g}   {train_loss:10.4f}  {train_accuracy:8.4f}   {val_loss:8.4f}  "
    "{val_accuracy:8.4f}   {images_per_second:8,.0f}  {time:>7}  {left:>8}"
)


def get_parser():
    number = utils.number
    parser, add = utils.make_parser("Train ResNet18.")
    add("--data", data.DEFAULT_FOLDER, "folder of CIFAR-10 or of images, or demo", type=os.path.expanduser)
    add("--output", Path("outputs"), "output folder", type=utils.path)
    add("--epochs", 40, "passes over the training images", type=number(int, 1))
    add("--batch-size", 128, "images per step", type=number(int, 1))
    add("--lr", 0.1, "learning rate after the warm-up", type=number(float, 1e-9, 1e6))
    add("--weight-decay", 0.0005, "L2 penalty", type=number(float, 0, 0.9))
    add("--factor", 0.3, "multiplies the learning rate on a plateau", type=number(float, 0.001, 0.999))
    add("--patience", 1, "epochs without progress that are tolerated", type=number(int, 0))
    add("--label-smoothing", 0.1, "share of each label spread over all classes", type=number(float, 0, 0.9))
    add("--val-split", 0.1, "share kept for validation", type=number(float, 0.001, 0.9))
    add("--norm", "batch", "normalization; layer also standardizes filters", choices=NORMS)
    # With fewer than 8 channels, PyTorch's convolutions on CPUs write out of bounds (oneDNN issue 6035).
    add("--width", WIDTH, "channels of the first convolution", type=number(int, 8, 1024))
    add("--seed", 0, "random seed", type=number(int, 0, 2**32 - 1))
    add("--device", "auto", "where to compute", choices=utils.DEVICES)
    add("--precision", "auto", "numeric precision", choices=["auto", *utils.PRECISIONS])
    add(
        "--without",
        [],
        "augmentations to turn off",
        unset="none",
        nargs="+",
        choices=data.augmentations([0, 0, 0]),
    )
    add(
        "--limit",
        None,
        "use this many training images, validation included",
        unset="all",
        type=number(int, 2),
    )
    add("--workers", None, "augmentation processes", unset="1; with CUDA up to 4", type=number(int, 0, 64))
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help="continue the run in OUTPUT")
    group.add_argument("--overwrite", action="store_true", help="delete the run in OUTPUT first")
    return parser


def parse_args(argv):
    """The settings and, with --resume, the saved state to continue from. Raises RunError."""
    parser = get_parser()
    args = parser.parse_args(argv)
    if not args.resume:
        if not args.overwrite and any(args.output.glob("*.pt")):
            raise utils.RunError(f"{args.output} holds a run: use --resume, --overwrite or another --output")
        return args, None
    state = utils.load_checkpoint(args.output / "last.pt", "use --overwrite or another --output")
    args = parser.parse_args(argv, argparse.Namespace(**state["settings"]))  # these, unless given again
    for name, value in state["settings"].items():
        if name not in CAN_CHANGE and getattr(args, name) != value:
            parser.error(f"--{name.replace('_', '-')} cannot be changed by --resume: the run has {value}")
    return args, state


class Training:
    """Everything with a state. All of it is saved, so --resume continues as if there had been no stop."""

    PARTS = ("model", "averaged", "optimizer", "warmup", "plateau", "scaler")

    def __init__(self, model, args, fp16):
        self.model = model
        # The exponential moving average of the weights is better: it is validated, tested and kept.
        self.averaged = copy.deepcopy(model)
        self.optimizer = torch.optim.SGD(
            model.parameters(), args.lr, MOMENTUM, weight_decay=args.weight_decay, nesterov=True
        )
        self.warmup = LinearLR(self.optimizer, start_factor=1 / WARMUP_STEPS, total_iters=WARMUP_STEPS)
        self.plateau = ReduceLROnPlateau(
            self.optimizer,
            factor=args.factor,
            patience=args.patience,
            threshold=PLATEAU_THRESHOLD,
            min_lr=0.001 * args.lr,
        )
        device = next(model.parameters()).device
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)  # active for float16 only
        # In float16 the first step may overflow and be skipped, which looks like a wrong order of calls.
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")

    def state_dict(self):
        return {name: getattr(self, name).state_dict() for name in self.PARTS}

    def load_state_dict(self, state):
        for name in self.PARTS:
            if state[name]:  # a scaler that is not used has none
                getattr(self, name).load_state_dict(state[name])


def float_tensors(model):
    """Parameters and running statistics themselves, not copies; the batch counters are left out."""
    return [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]


def train_one_epoch(training, loader, criterion, autocast, what):
    """One pass over the training images. Returns train_loss, train_accuracy in [0, 1], images_per_second."""
    model = training.model
    device = next(model.parameters()).device
    pinned = device.type == "cuda"  # train_loader pins memory, so the CPU need not wait for copies from it
    # The average looks back about one epoch. AveragedModel would make the CPU wait for the GPU in each step.
    update_average = get_ema_multi_avg_fn(decay=1 - 1 / len(loader))
    averages = float_tensors(training.averaged)
    weights = float_tensors(model)
    loss_sum = 0
    correct = 0
    seen = 0
    start = time.perf_counter()
    model.train()
    for images, labels in utils.progress(loader, what):
        inputs = data.to_input(images.to(device, non_blocking=pinned))  # (B, 3, 32, 32) in [0, 1]
        labels = labels.to(device, non_blocking=pinned)
        with autocast:
            logits = model(inputs)  # (B, classes)
            loss = criterion(logits, labels)
        training.optimizer.zero_grad()
        training.scaler.scale(loss).backward()
        training.scaler.step(training.optimizer)
        training.scaler.update()
        training.warmup.step()  # without effect after WARMUP_STEPS
        update_average(averages, weights, None)  # the third argument, a count, is not used

        # The sums stay on the device: reading them in each step would make the CPU wait.
        loss_sum += loss.detach() * len(labels)
        correct += (logits.argmax(1) == labels).sum()
        seen += len(labels)
    # On augmented images with the current weights; validation uses averaged ones and looks better.
    return {
        "train_loss": loss_sum.item() / seen,  # .item() waits for the GPU, so the time below is right
        "train_accuracy": correct.item() / seen,
        "images_per_second": seen / (time.perf_counter() - start),
    }


def evaluate(model, split, criterion):
    """The loss, the accuracy in [0, 1], and the confusion matrix of counts (true class, predicted class)."""
    logits = data.predict(model, split.images)
    labels = torch.from_numpy(split.labels)
    classes = logits.shape[1]
    pairs = labels * classes + logits.argmax(1)
    confusion = pairs.bincount(minlength=classes**2).view(classes, classes)
    return criterion(logits, labels).item(), confusion.trace().item() / len(labels), confusion


def describe(args, argv, splits, techniques, training, precision):
    """What is known of a run before its first epoch. This dict becomes checkpoint.pt:

    model       averaged weights of the best epoch, with the mean and std of the images; None before it
    settings    the flags by name, without NOT_SETTINGS
    classes     their names
    facts       what the header, the plots and the report tell; counts: images of each class in each split
    brightness  the mean of each validation image, in [0, 255], by which --resume recognizes it
    history     for each epoch a dict, whose keys are the columns of history.csv
    epoch       the one with the best validation accuracy; None before the first one ends
    result      test_accuracy and confusion, a list of rows of counts; None before the test
    commands    the command lines that made it

    last.pt has one key more, training: the state of each of Training.PARTS.
    """
    train = splits["training"]
    model = training.model
    device = next(model.parameters()).device
    settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    if args.data != "demo":
        settings["data"] = str(Path(args.data).resolve())
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{device.type} (threads: {torch.get_num_threads()})"
    packages = ("torch", "torchvision", "albumentations", "matplotlib")
    without = f", without {' and '.join(args.without)}" if args.without else ""
    shared = data.count_shared(splits["test"], train, splits["validation"])
    overlap = ""
    if shared:
        overlap = f"{shared:,} test images are also training images, so the test accuracy may be too high."
    norm = "layer normalization and standardized filters" if args.norm == "layer" else "batch normalization"
    facts = {
        "title": f"{model.name} on {train.name}, {args.norm} norm{without}, seed {args.seed}",
        "data": train.name,
        "description": train.description,
        "network": f"{model.name}, {norm}, {count_parameters(model):,} parameters",
        "norm": norm,
        "summary": summary(copy.deepcopy(model).cpu().eval()),
        "images": ", ".join(f"{len(split.labels):,} {name}" for name, split in splits.items()),
        "counts": {name: np.bincount(split.labels).tolist() for name, split in splits.items()},
        "overlap": overlap,
        "hardware": f"{hardware}, {str(precision).removeprefix('torch.')}",
        "versions": ", ".join(f"{name} {metadata.version(name)}" for name in packages),
        "augmentation": data.describe_augmentations(techniques),
        "warmup_steps": WARMUP_STEPS,
        "momentum": MOMENTUM,
        "threshold": PLATEAU_THRESHOLD,
    }
    return {
        "model": None,
        "settings": settings,
        "classes": train.classes,
        "facts": facts,
        "brightness": torch.from_numpy(splits["validation"].images.mean((1, 2, 3))),
        "history": [],
        "epoch": None,
        "result": None,
        "commands": [shlex.join(["python", "train.py", *argv])],
    }


def save(output, run, training):
    """Write what an epoch changes; last.pt comes last, so a killed run can always be resumed."""
    if run["history"]:  # before the first epoch there is nothing but last.pt to write
        utils.save_checkpoint(run, output / "checkpoint.pt")
        table = io.StringIO()
        writer = csv.DictWriter(table, run["history"][0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(run["history"])
        utils.write(output / "history.csv", table.getvalue().encode(), needed=False)
        figure = utils.plot_curves(run["history"], run["facts"]["title"])
        utils.save_figure(figure, output / "curves.png", needed=False)
    utils.save_checkpoint(run | {"training": training.state_dict()}, output / "last.pt")


def resume(state, run, training):
    """Restore `training` and `run` as they were after the last epoch. Raises RunError."""
    # With the images in another order, validation would include some that were trained on.
    same_classes = state["classes"] == run["classes"]
    same_counts = state["facts"]["counts"] == run["facts"]["counts"]
    # On another machine a JPEG may be decoded slightly differently.
    if not (
        same_classes and same_counts and torch.allclose(state["brightness"], run["brightness"], atol=0.1)
    ):
        raise utils.RunError("--data: not the images of the run, or in another order")
    training.load_state_dict(state["training"])
    for key in ("history", "epoch", "model"):
        run[key] = state[key]
    run["commands"] = state["commands"] + run["commands"]
    for key in ("hardware", "versions"):
        parts = [*state["facts"][key].split(", then "), run["facts"][key]]
        run["facts"][key] = ", then ".join(dict.fromkeys(parts))  # each once, in order
    print(f"Resuming after epoch {len(run['history'])}.")


def clear(output):
    """Make the folder and delete what an earlier run left in it, except an edited report."""
    output.mkdir(parents=True, exist_ok=True)
    reports = [path.name for path in output.glob("report*.md") if utils.is_unedited(path)]
    for name in OUTPUT_FILES + GRADCAM_FILES + reports:
        (output / name).unlink(missing_ok=True)


def print_header(run, args, device, steps):
    facts = run["facts"]
    for name in ("network", "images", "hardware", "versions"):
        print(f"{name:12}{facts[name]}")
    if facts["overlap"]:
        print(facts["overlap"])
    if device.type == "cpu" and args.device == "auto":
        print("No GPU found, or this PyTorch was built without GPU support (pytorch.org/get-started).")
        if args.width > 16:
            print("On a CPU, --width 16 takes a quarter of the time (on CIFAR-10, 4 points less accurate).")
    if steps < WARMUP_STEPS:
        print(f"Only {steps} steps: the learning rate rises for {WARMUP_STEPS}, so use more epochs.")
    print(f'To resume: python train.py --resume --output "{args.output}"')
    print(f"\n{EPOCH_HEAD}")


def print_epoch(row, epochs, is_best, next_lr):
    left = utils.clock((epochs - row["epoch"]) * row["seconds"])
    line = EPOCH_LINE.format(**row, epochs=epochs, time=utils.clock(row["seconds"]), left=left)
    print(f"{line}  best" if is_best else line)
    if next_lr < row["lr"]:
        print(
            f"        validation loss plateaued: learning rate reduced from {row['lr']:.3g} to {next_lr:.3g}"
        )


def print_result(run, heading, output):
    print(f"\n{run['facts']['data']}: {heading}")
    print(f"Written to {output}: {', '.join(OUTPUT_FILES)}")
    print(f'Next: python gradcam.py --n 10 --checkpoint "{output / "checkpoint.pt"}"')


@utils.default_style
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args, state = parse_args(argv)
    device = utils.choose_device(args.device)
    precision = utils.choose_precision(args.precision, device)
    autocast = utils.autocast(device, precision)
    torch.backends.cudnn.benchmark = True  # let cuDNN time its algorithms and take the fastest

    # Data
    train, test = data.load_splits(args.data)
    mean, std = data.channel_statistics(train.images)  # before the split: no flag of the split changes it
    techniques = data.augmentations(mean, args.without)
    train, validation = data.split_validation(train, args.val_split, args.limit, args.seed)
    splits = {"training": train, "validation": validation, "test": test}
    loader = data.train_loader(train, techniques, args.batch_size, args.seed, args.workers, device)

    # Network, optimizer, schedulers
    torch.manual_seed(args.seed)
    model = ResNet18(len(train.classes), args.norm, args.width, mean, std)
    model.to(device, memory_format=utils.memory_format(device))
    training = Training(model, args, fp16=precision == torch.float16)
    criterion = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)  # in validation, too
    run = describe(args, argv, splits, techniques, training, precision)
    if state:
        resume(state, run, training)
    else:  # all settings are checked: only now an earlier run may be deleted
        picture = data.plot_augmentations(train, techniques)
        clear(args.output)
        utils.save_figure(picture, args.output / "augmentations.png", needed=False)
        save(args.output, run, training)
    print_header(run, args, device, args.epochs * len(loader))

    # Epochs
    saved = time.monotonic()
    for epoch in range(len(run["history"]) + 1, args.epochs + 1):
        start = time.perf_counter()
        loader.sampler.epoch = epoch
        trained = train_one_epoch(training, loader, criterion, autocast, f"epoch {epoch} of {args.epochs}")
        if epoch == 1:  # drop the random initial weights from the average
            training.averaged.load_state_dict(model.state_dict())
        with autocast:
            val_loss, val_accuracy, _ = evaluate(training.averaged, validation, criterion)
        if not math.isfinite(trained["train_loss"] + val_loss):
            raise utils.RunError("the loss is no longer finite: try a smaller --lr")
        lr = training.optimizer.param_groups[0]["lr"]  # before a reduction
        if training.warmup.last_epoch >= WARMUP_STEPS:  # it counts steps; before, the rate still rises
            training.plateau.step(val_loss)
        row = {
            "epoch": epoch,
            "lr": lr,
            **trained,
            "val_loss": val_loss,
            "val_accuracy": val_accuracy,
            "seconds": time.perf_counter() - start,
        }
        run["history"].append(row)
        is_best = row is utils.best_epoch(run["history"])  # by validation accuracy: that is what counts
        if is_best:
            run["epoch"] = epoch
            run["model"] = copy.deepcopy(training.averaged.state_dict())
        if time.monotonic() - saved > SAVE_SECONDS or epoch == args.epochs:
            save(args.output, run, training)
            saved = time.monotonic()
        print_epoch(row, args.epochs, is_best, training.optimizer.param_groups[0]["lr"])

    # Test
    training.averaged.load_state_dict(run["model"])  # those of the best epoch; last.pt has the latest
    with autocast:
        _, accuracy, confusion = evaluate(training.averaged, test, criterion)
    run["result"] = {"test_accuracy": accuracy, "confusion": confusion.tolist()}
    utils.save_checkpoint(run, args.output / "checkpoint.pt")
    heading = f"test accuracy {accuracy:.2%} with the weights of epoch {run['epoch']}"
    figure = utils.plot_confusion(confusion, train.classes, f"{run['facts']['title']}\n{heading}")
    utils.save_figure(figure, args.output / "confusion.png", needed=False)
    print_result(run, heading, args.output)
    utils.show(args.output / "curves.png", args.output / "confusion.png")


if __name__ == "__main__":
    utils.run(main)
