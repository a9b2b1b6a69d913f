"""Train ResNet18 on CIFAR-10, cutting the learning rate whenever validation stops improving.

python train.py --epochs 40                 the full run
python train.py --epochs 4 --data demo      a try without a download
python train.py --resume                    go on after a stop
"""

import argparse
import copy
import math
import os
import time
from pathlib import Path

import torch
from torch import nn
from torch.optim.lr_scheduler import LinearLR, ReduceLROnPlateau
from torch.optim.swa_utils import get_ema_multi_avg_fn

import data
import utils
from model import NORMS, ResNet18, count_parameters

MOMENTUM = 0.9
# Progress of less than 1 % in the validation loss counts as none. The loss of averaged weights is so smooth
# that with the default of 0.01 % almost every epoch is progress, and the rate is cut far too late.
PLATEAU_THRESHOLD = 0.01
MIN_LR = 1e-4
WARMUP_STEPS = 200  # in which the learning rate rises to --lr: at once it would throw fresh weights far off
EVAL_BATCH = 500  # images; without gradients more of them fit at once
PLOT_SECONDS = 30  # the curves are redrawn at most so often during the run
# What --resume cannot change; where the run computes, where it is kept and how long it is may change.
FIXED_SETTINGS = ["batch_size", "lr", "weight_decay", "factor", "patience", "label_smoothing", "val_split"]
FIXED_SETTINGS += ["train_size", "norm", "seed"]


def get_parser() -> argparse.ArgumentParser:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description="Train ResNet18 on CIFAR-10.", formatter_class=formatter)
    count = utils.number(int, 1, 1_000_000, "a whole number from 1 to 1000000")
    whole = utils.number(int, 0, 1_000, "a whole number from 0 to 1000")
    processes = utils.number(int, 0, 64, "a whole number from 0 to 64")
    seed = utils.number(int, 0, 2**32 - 1, "a whole number from 0 to 4294967295")
    rate = utils.number(float, 1e-9, 1e6, "a number above 0")
    factor = utils.number(float, 0.001, 0.999, "a number between 0 and 1")
    share = utils.number(float, 0, 0.9, "a number from 0 to 0.9")
    add = parser.add_argument
    add("--data", default="data", help="folder of CIFAR-10 (else it is downloaded) or of images, or demo")
    add("--output", type=Path, default=Path("outputs"), help="folder for all that is written")
    add("--epochs", type=count, default=40, help="passes over the training images")
    add("--batch-size", type=count, default=128, help="images a step")
    add("--lr", type=rate, default=0.1, help="learning rate after the warm-up")
    add("--weight-decay", type=share, default=5e-4, help="L2 penalty")
    add("--factor", type=factor, default=0.3, help="what a plateau multiplies the learning rate by")
    add("--patience", type=whole, default=1, help="epochs without progress that are let pass before a cut")
    add("--label-smoothing", type=share, default=0.1, help="share of the label spread over all classes")
    add("--val-split", type=share, default=0.1, help="share of the training images kept for validation")
    add("--train-size", type=count, help="train on so many images, if given")
    add("--norm", choices=NORMS, default="batch", help="normalisation layers")
    add("--workers", type=processes, help="processes that augment, else 1 on a CPU and up to 16 with a GPU")
    add("--seed", type=seed, default=0, help="of all randomness")
    add("--device", choices=["auto", *utils.DEVICES], default="auto", help="where to compute")
    add("--precision", choices=["auto", *utils.PRECISIONS], default="auto", help="of convolutions")
    add("--compile", action="store_true", help="torch.compile: a slow start, then faster steps")
    add("--resume", nargs="?", const=True, metavar="FILE", help="go on from OUTPUT/last.pt, or from FILE")
    add("--overwrite", action="store_true", help="replace the run in OUTPUT")
    return parser


def parse_args() -> tuple[argparse.Namespace, dict | None]:
    """The settings and, with --resume, the state to go on from. Raises RunError."""
    parser = get_parser()
    args = parser.parse_args()
    if not args.resume:
        if (args.output / "last.pt").exists() and not args.overwrite:
            raise utils.RunError(f"{args.output} holds a run: use --resume, --overwrite or another --output")
        return args, None
    if args.overwrite:
        parser.error("--resume goes on with a run and --overwrite replaces it: use one of them")
    file = args.output / "last.pt" if args.resume is True else Path(args.resume)
    state = utils.load_checkpoint(file, "last state")
    saved = state["settings"]
    parser.set_defaults(**saved, output=file.parent)
    args = parser.parse_args()  # what differs from the saved settings now was given by a flag
    for name in FIXED_SETTINGS:
        if getattr(args, name) != saved[name]:
            flag = f"--{name.replace('_', '-')} {getattr(args, name)}"
            parser.error(f"{flag} would change the run, which has {saved[name]}: leave it out")
    if args.epochs < len(state["history"]):
        parser.error(f"--epochs {args.epochs}: the run already has {len(state['history'])}")
    return args, state


def build_training(args, classes: int, device: torch.device, fp16: bool) -> dict:
    """Everything that has a state: model, averaged, optimizer, scheduler, warmup, scaler."""
    torch.manual_seed(args.seed)
    model = ResNet18(classes, args.norm).to(device, memory_format=torch.channels_last)
    # Validated, tested and kept are the weights averaged over about the last epoch: they are better.
    averaged = copy.deepcopy(model)
    parameters, decay = model.parameters(), args.weight_decay
    # Fused is faster; but when the scaler skips its very first step, the momentum is left uninitialised.
    fused = device.type in ("cuda", "cpu") and not fp16
    optimizer = torch.optim.SGD(parameters, args.lr, MOMENTUM, weight_decay=decay, nesterov=True, fused=fused)
    plateau = {"factor": args.factor, "patience": args.patience, "threshold": PLATEAU_THRESHOLD}
    scheduler = ReduceLROnPlateau(optimizer, min_lr=MIN_LR, **plateau)
    warmup = LinearLR(optimizer, start_factor=1 / WARMUP_STEPS, total_iters=WARMUP_STEPS)
    scaler = torch.amp.GradScaler(device.type, enabled=fp16)
    training = {"model": model, "averaged": averaged, "optimizer": optimizer, "scheduler": scheduler}
    return {**training, "warmup": warmup, "scaler": scaler}


def restore(training: dict, state: dict, facts: dict) -> None:
    """Load a saved state into `training`. Raises RunError when it is of other data or another network."""
    if any(state[key] != facts[key] for key in ("classes", "mean", "std")):
        raise utils.RunError(f"--data {facts['data']}: not the images that the run was started with")
    fused = training["optimizer"].param_groups[0]["fused"]
    try:
        for name, part in training.items():
            if state[name]:  # a scaler that is not used has none
                part.load_state_dict(state[name])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        raise utils.RunError("the saved state is of another network or version: train again") from None
    for group in training["optimizer"].param_groups:
        group["fused"] = fused  # it belongs to this device, not to the saved state


def float_tensors(module: nn.Module) -> list[torch.Tensor]:
    """Parameters and running statistics: all that averaging makes sense for."""
    return [tensor for tensor in module.state_dict().values() if tensor.is_floating_point()]


def train_one_epoch(model, training: dict, loader, criterion, stats, precision, epochs_left: int) -> dict:
    """One pass over the training images. Returns train_loss, train_accuracy in [0, 1] and images_per_second.

    Raises RunError when the loss is not finite.
    """
    optimizer, scaler = training["optimizer"], training["scaler"]
    device = next(model.parameters()).device
    stats = [torch.tensor(values, device=device) for values in stats]  # once: a copy makes the CPU wait
    average = get_ema_multi_avg_fn(1 - 1 / len(loader))  # AveragedModel would make the CPU wait each step
    averaged_and_new = [float_tensors(training["averaged"]), float_tensors(training["model"])]
    loss_sum, correct, seen = torch.zeros((), device=device), torch.zeros((), device=device), 0
    model.train()
    progress, start, count = utils.Progress(), time.perf_counter(), loader.sampler.count
    for images, labels in loader:
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with utils.autocast(device, precision):
            logits = model(data.normalize(images, *stats))  # (B, classes)
            loss = criterion(logits, labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        training["warmup"].step()
        average(*averaged_and_new, None)

        # The sums stay on the device. Reading them makes the CPU wait, so that is done only to show them.
        loss_sum += loss.detach() * len(labels)
        correct += (logits.argmax(1) == labels).sum()
        seen += len(labels)
        if progress.due() or seen == count:
            speed = seen / (time.perf_counter() - start)
            row = {"train_loss": loss_sum.item() / seen, "train_accuracy": correct.item() / seen}
            if not math.isfinite(row["train_loss"]):
                raise utils.RunError("the training loss is no longer a finite number: try a smaller --lr")
            left = utils.clock((epochs_left * count + count - seen) / speed)
            share, means = f"{seen / count:4.0%}", "loss {train_loss:.4f}  accuracy {train_accuracy:.4f}"
            progress.show(f"{share}  {left} left  {means.format(**row)}  {speed:,.0f} images/s")
    progress.show("")
    return {**row, "images_per_second": seen / (time.perf_counter() - start)}


def evaluate(model: nn.Module, split: data.Split, stats, precision) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, classes) float32 and labels (N,) int64 of all images of a split, on the model's device."""
    device = next(model.parameters()).device
    batches = torch.from_numpy(split.images).split(EVAL_BATCH)
    logits = utils.predict(model, (data.normalize(batch.to(device), *stats) for batch in batches), precision)
    return logits, torch.from_numpy(split.labels).to(device)


def validate(model: nn.Module, split: data.Split, criterion, stats, precision) -> dict:
    """val_loss and val_accuracy in [0, 1]; None without validation images. Raises RunError for NaN."""
    if not len(split.labels):
        return {"val_loss": None, "val_accuracy": None}
    logits, labels = evaluate(model, split, stats, precision)
    loss, accuracy = criterion(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item()
    if not math.isfinite(loss):  # the scheduler would count it as one more epoch without progress
        raise utils.RunError("the validation loss is no longer a finite number: try a smaller --lr")
    return {"val_loss": loss, "val_accuracy": accuracy}


def save_epoch(output: Path, training: dict, history: list[dict], best: dict, facts: dict) -> None:
    """Write last.pt, from which --resume can make all the rest again, then the rest."""
    if len(history) == 1:  # a run that is replaced goes now, and its pictures with it
        for name in ("curves.png", "confusion.png", "misclassified.png", "gradcam.png"):
            (output / name).unlink(missing_ok=True)
    states = {name: part.state_dict() for name, part in training.items()}
    state = {"kind": "last state", **facts, **states, "history": history, "best": best}
    utils.save_checkpoint(state, output / "last.pt")
    if best["epoch"] == len(history):
        utils.save_checkpoint(best, output / "checkpoint.pt")
    save_history(output, history)
    curves = output / "curves.png"
    if not curves.exists() or time.time() - curves.stat().st_mtime > PLOT_SECONDS:
        save_curves(output, history, facts)


def save_history(output: Path, history: list[dict]) -> None:
    with utils.replacing(output / "history.csv") as file:
        for row in (history[0], *(row.values() for row in history)):
            file.write((",".join("" if value is None else str(value) for value in row) + "\n").encode())


def save_curves(output: Path, history: list[dict], facts: dict) -> None:
    title = f"ResNet18 on {facts['name']}, {facts['norm']} norm, seed {facts['settings']['seed']}"
    utils.save_figure(utils.plot_curves(history, title), output / "curves.png")


def seconds_a_step(batch_size: int, norm: str, precision: torch.dtype) -> float:
    """On the CPU, from two steps on blank images of a network of its own; the first only warms up."""
    model = ResNet18(norm=norm).to(memory_format=torch.channels_last)
    images = torch.zeros(batch_size, 3, 32, 32).to(memory_format=torch.channels_last)
    for _ in range(2):
        start = time.perf_counter()
        with utils.autocast(images.device, precision):
            loss = model(images).sum()
        loss.backward()
    return time.perf_counter() - start


def print_header(args, name: str, sizes: list[int], model: ResNet18, device, precision, left: int) -> None:
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print("data      {}: {:,} training, {:,} validation, {:,} test images".format(name, *sizes))
    weights = f"{count_parameters(model):,} weights"
    print(f"network   ResNet18, {args.norm} norm, {model.classes} classes, {weights}")
    print(f"device    {hardware}, {str(precision).removeprefix('torch.')}")
    print(f"seed      {args.seed}\noutput    {args.output}")
    if not left:
        return print(f"All {args.epochs} epochs are done, only the test follows; --epochs prolongs the run.")
    if device.type == "cpu":
        batch_size = min(args.batch_size, sizes[0])
        epoch = utils.clock(seconds_a_step(batch_size, args.norm, precision) * sizes[0] / batch_size)
        print(f"There is no GPU in use: an epoch will take about {epoch}; with one it would take seconds.")
    print("\n  epoch       lr   train loss  accuracy   val loss  accuracy   images/s    time")


def print_epoch(row: dict, epochs: int, is_best: bool, next_lr: float) -> None:
    values = [row["train_loss"], row["train_accuracy"], row["val_loss"], row["val_accuracy"]]
    losses = "{:>10}  {:>8}   {:>8}  {:>8}".format(*("-" if v is None else f"{v:.4f}" for v in values))
    speed = f"{row['images_per_second']:8,.0f}  {utils.clock(row['seconds']):>6}"
    mark = "  best" if is_best and row["val_loss"] is not None else ""
    print(f"{row['epoch']:3}/{epochs:<3} {row['lr']:8.5f}   {losses}   {speed}{mark}")
    if next_lr < row["lr"]:
        print(f"        plateau: the learning rate is cut from {row['lr']:.5f} to {next_lr:.5f}")


def calibration_error(logits: torch.Tensor, labels: torch.Tensor, bins: int = 15) -> float:
    """Expected calibration error in [0, 1] of logits (N, classes) with true labels (N,).

    The gap between mean confidence and accuracy, in bins of equal width of the confidence, averaged over the
    images (Guo et al. 2017, https://arxiv.org/abs/1706.04599, equation 3).
    """
    confidence, predicted = logits.softmax(1).max(1)
    gaps = (predicted == labels).float() - confidence
    # Within a bin, gaps above and below zero cancel out.
    sums = (confidence * bins).long().clamp_max(bins - 1).bincount(gaps)
    return sums.abs().sum().item() / len(labels)


def final_test(output: Path, test: data.Split, model: nn.Module, best: dict, precision) -> None:
    """Evaluate the best checkpoint on the test set, once; print accuracies, write confusion.png."""
    model.load_state_dict(best["model"])
    stats = best["mean"], best["std"]
    progress = utils.Progress()
    progress.show(f"testing on {len(test.labels):,} images")
    logits, labels = evaluate(model, test, stats, precision)
    mirrored, _ = evaluate(model, test._replace(images=test.images[:, :, ::-1].copy()), stats, precision)
    progress.show("")
    pairs = (labels * model.classes + logits.argmax(1)).bincount(minlength=model.classes**2)
    confusion = pairs.reshape(model.classes, -1).cpu()  # (true class, predicted class)
    accuracy = confusion.trace().item() / len(labels)
    utils.save_checkpoint({**best, "test_accuracy": accuracy}, output / "checkpoint.pt")
    share = f"{accuracy:.2%} of {len(labels):,} test images"
    title = f"ResNet18 on {best['name']}: {share} (epoch {best['epoch']})"
    utils.save_figure(utils.plot_confusion(confusion, test.classes, title), output / "confusion.png")
    print(f"\nTest accuracy on {best['name']}: {accuracy:.2%}, with the weights of epoch {best['epoch']}")
    for name, row, right in zip(test.classes, confusion, confusion.diagonal(), strict=True):
        print(f"    {name:12} {right / row.sum():8.2%}")
    both = (logits.softmax(1) + mirrored.softmax(1)).argmax(1)
    print(f"Averaged with the mirrored image: {(both == labels).float().mean():.2%}")
    print(f"Expected calibration error:       {calibration_error(logits, labels):.2%}")


def fit(args: argparse.Namespace, state: dict | None) -> None:
    """Train from the start, or on from a saved `state`; then test."""
    device = utils.choose_device(args.device)
    precision = utils.choose_precision(args.precision, device)
    on_gpu = device.type == "cuda"
    # All batches but the last have one size: time the algorithms once, keep the fastest.
    torch.backends.cudnn.benchmark = True

    # Data
    train, test = data.load_train_test(args.data)
    stats = data.channel_statistics(train.images)
    indices = data.split_validation(train.labels, args.val_split, args.train_size, args.seed)
    train, validation = (train.subset(part) for part in indices)
    workers = args.workers
    if workers is None:
        workers = min(16, os.cpu_count() or 1) if on_gpu else 1
    loader = data.train_loader(train, stats[0], args.batch_size, args.seed, workers, pin_memory=on_gpu)

    # Network, optimizer, scheduler
    training = build_training(args, len(train.classes), device, precision == torch.float16)
    model, averaged, optimizer, scheduler, warmup, _ = training.values()
    of_this_call = ("output", "resume", "overwrite")
    settings = {key: value for key, value in vars(args).items() if key not in of_this_call}
    facts = {"name": data.data_name(args.data), "data": args.data, "norm": args.norm, "settings": settings}
    facts |= {"classes": train.classes, "mean": stats[0], "std": stats[1]}
    history, best = [], None
    if state:
        restore(training, state, facts)
        history, best = state["history"], state["best"]
    step_model = torch.compile(model) if args.compile else model
    criterion = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)
    sizes = [len(split.labels) for split in (train, validation, test)]
    print_header(args, facts["name"], sizes, model, device, precision, args.epochs - len(history))

    try:
        for epoch in range(len(history) + 1, args.epochs + 1):
            start, left = time.perf_counter(), args.epochs - epoch
            loader.sampler.epoch = epoch
            row = train_one_epoch(step_model, training, loader, criterion, stats, precision, left)
            if epoch == 1:  # begin the average anew, without the random weights of the start
                averaged.load_state_dict(model.state_dict())
            row |= validate(averaged, validation, criterion, stats, precision)
            lr = optimizer.param_groups[0]["lr"]
            if warmup.last_epoch >= WARMUP_STEPS:  # while the rate still rises, no plateau can be its fault
                scheduler.step(row["val_loss"] if args.val_split else row["train_loss"])
            history.append({"epoch": epoch, "lr": lr, **row, "seconds": time.perf_counter() - start})

            is_best = not args.val_split or history[-1] is utils.best_epoch(history)
            if is_best:
                weights = copy.deepcopy(averaged.state_dict())
                best = {"kind": "checkpoint", **facts, **history[-1], "model": weights}
            save_epoch(args.output, training, history, best, facts)
            print_epoch(history[-1], args.epochs, is_best, optimizer.param_groups[0]["lr"])

        save_history(args.output, history)  # once more, should the run have been stopped while saving
        save_curves(args.output, history, facts)
        final_test(args.output, test, averaged, best, precision)
    except KeyboardInterrupt as stop:
        if history and (args.output / "last.pt").exists():
            stop.args = (f"to go on: python train.py --resume {args.output / 'last.pt'}",)
        raise
    print(f"Trained for {utils.clock(sum(row['seconds'] for row in history))}.")
    print(f"Written to {args.output}: checkpoint.pt, last.pt, history.csv, curves.png, confusion.png")
    print(f"Next: python gradcam.py --n 10 --checkpoint {args.output / 'checkpoint.pt'}")


def main() -> None:
    args, state = parse_args()
    with utils.lock(args.output):
        fit(args, state)


if __name__ == "__main__":
    utils.run(main)
