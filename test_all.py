"""Tests of every promise; no network, two to five minutes on two cores.

python -m pytest -q test_all.py
"""

import copy
import csv
import errno
import gc
import hashlib
import http.server
import io
import itertools
import os
import pickle
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import warnings
from collections import OrderedDict
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
import torchvision
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from torch import nn

import data
import gradcam
import model as model_script
import train
import utils
from model import ResNet18, count_parameters

pytestmark = pytest.mark.filterwarnings("error")
needs_signals = pytest.mark.skipif(os.name != "posix", reason="needs signals")
HERE = Path(__file__).parent
CPU = torch.device("cpu")
MEAN, STD = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]  # of CIFAR-10


def start(code: str, *words, **options) -> subprocess.Popen:
    """Run Python code in a process of its own, with the scripts at hand."""
    command = [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {str(HERE)!r}); {code}",
        *map(str, words),
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def start_until(line: str, code: str, *words, **options) -> subprocess.Popen:
    """The same, until it prints a line that holds these words."""
    process = start(code, *words, **options)
    while line not in process.stdout.readline():
        assert process.poll() is None, process.stderr.read()
    return process


TRAIN = "import train, utils; train.SAVE_SECONDS = -1; utils.run(train.main)"  # saves after every epoch


def call(module, *words) -> subprocess.CompletedProcess:
    """A script as a user calls it, but in this process, which saves the seconds of the imports."""
    out, err, status = io.TextIOWrapper(io.BytesIO()), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            utils.run(lambda: module.main([*map(str, words)]))
        except SystemExit as stop:
            status = stop.code
    out.seek(0)
    return subprocess.CompletedProcess(words, status, out.read(), err.getvalue())


def succeed(module, *words) -> str:
    """What the script prints."""
    done = call(module, *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_one_line_error(done: subprocess.CompletedProcess, status: int, *words: str) -> None:
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    message = done.stderr.strip().splitlines()[-1]
    assert "error: " in message
    for word in words:
        assert word in message, message


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """A folder with eight images per class, which differ in brightness."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for path in [folder / split / name for split in ("train", "test") for name in ("cat", "dog")]:
        path.mkdir(parents=True)
        for i in range(8):
            pixels = rng.integers(0, 100, (32, 32, 3)) + 150 * (path.name == "dog")
            Image.fromarray(pixels.astype(np.uint8)).save(path / f"{i}.png")
    return folder


FLAGS = "--epochs 2 --batch-size 4 --workers 0 --width 8 --device cpu --precision fp32"
TINY = FLAGS.split()


@pytest.fixture(scope="session")
def finished(images, tmp_path_factory) -> Path:
    """The output folder of a run of two epochs on eight images per class."""
    output = tmp_path_factory.mktemp("finished")
    (output / "log").write_text(succeed(train, "--data", images, "--output", output, *TINY))
    return output


# ---------------------------------------------------------------- model.py


def test_network_is_the_known_resnet18():
    """The oracle is torchvision's ResNet18 with the CIFAR stem: equal parameters in order, equal function."""
    known = torchvision.models.resnet18(num_classes=10)
    known.conv1, known.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    ours = ResNet18()
    assert count_parameters(ours) == count_parameters(known) == 11_173_962
    for module in known.modules():
        if isinstance(module, nn.BatchNorm2d):  # so that every parameter matters
            for values in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                values.uniform_(0.5, 1.5)
    ours.load_state_dict(OrderedDict(zip(ours.state_dict(), known.state_dict().values(), strict=True)))
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(ours.eval()(x), known.eval()(x))
    assert list(dict(ours.feature.named_children())) == ["stem", "layer1", "layer2", "layer3", "layer4"]
    torch.testing.assert_close(ours.classifier(ours.feature(x)), ours(x))


def test_layer_norm_normalises_each_image_over_channels_and_positions():
    model = ResNet18(7, norm="layer")
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    x = torch.randn(3, 64, 8, 8) * torch.tensor([1.0, 5.0, 9.0]).view(3, 1, 1, 1)
    by_hand = (x - x.mean((1, 2, 3), keepdim=True)) / (
        x.var((1, 2, 3), keepdim=True, correction=0) + 1e-5
    ).sqrt()
    torch.testing.assert_close(model.feature.stem[1](x), by_hand)
    y = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(model(y)[:1], model(y[:1]), atol=1e-5, rtol=1e-4)  # no image sees another
    with pytest.raises(KeyError, match="group"):
        ResNet18(norm="group")


def test_layer_norm_convolves_with_standardised_weights():
    model = ResNet18(7, norm="layer", width=8)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 20  # the stem, two in each of eight blocks, three projections
    for convolution in convolutions:
        (trained,) = convolution.parameters()
        filters = trained.detach().flatten(1)
        by_hand = (filters - filters.mean(1, keepdim=True)) / filters.std(1, keepdim=True, correction=0)
        torch.testing.assert_close(convolution.weight.flatten(1), by_hand, atol=1e-3, rtol=1e-3)
    images = torch.randn(3, 3, 32, 32)
    logits = model(images)
    with torch.no_grad():  # neither the scale nor the mean of a filter matters
        for convolution in convolutions:
            (trained,) = convolution.parameters()
            trained.mul_(torch.rand(len(trained), 1, 1, 1) + 0.5).add_(0.1)
    torch.testing.assert_close(model(images), logits, atol=1e-3, rtol=1e-3)
    plain = ResNet18(7, width=8)
    assert all(type(m.weight) is nn.Parameter for m in plain.modules() if isinstance(m, nn.Conv2d))


def test_model_prints_its_table():
    table = succeed(model_script)
    assert table.startswith("ResNet18\n") and "11,173,962" in table and "512 x 4 x 4" in table
    narrow = succeed(model_script, "--width", 16)
    assert narrow.startswith("ResNet18 of width 16\n") and "701,466" in narrow and "128 x 4 x 4" in narrow
    assert_one_line_error(call(model_script, "--width", 0), 2, "--width 0")


def test_imports_do_nothing(tmp_path):
    code = "import torch; seed = torch.initial_seed(); import model; "
    code += "assert not {'albumentations', 'matplotlib', 'cv2', 'torchvision'} & set(sys.modules); "
    code += "import data, utils, train, gradcam; assert seed == torch.initial_seed()"
    # As a notebook sets it for the processes that it starts, whatever environment they live in.
    process = start(code, cwd=tmp_path, env={**os.environ, "MPLBACKEND": "module://not_here.backend"})
    assert process.communicate() == ("", "") and process.returncode == 0 and not list(tmp_path.iterdir())


# ---------------------------------------------------------------- data.py


def random_split(count: int) -> data.Split:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return data.Split(pixels, rng.integers(0, 10, count), [str(i) for i in range(10)], "random")


def batches(split, batch_size=16, seed=3, workers=0, epochs=(1,), mean=MEAN, without=()) -> list:
    """All batches of the epochs: pairs of images and labels."""
    techniques = data.augmentations(mean, without)
    with data.train_loader(split, techniques, batch_size, seed, workers, CPU) as loader:
        found = []
        for loader.sampler.epoch in epochs:
            found += [(images.clone(), labels.clone()) for images, labels in loader]
    return found


def same(a: list, b: list) -> bool:
    return all(torch.equal(x, y) and torch.equal(s, t) for (x, s), (y, t) in zip(a, b, strict=True))


def test_batches_depend_on_seed_epoch_and_number_alone():
    split = random_split(100)
    first, second = batches(split, epochs=[1]), batches(split, epochs=[2])
    assert [len(labels) for _, labels in first] == [16] * 6 + [4]
    for workers in (1, 2):
        assert same(batches(split, workers=workers, epochs=[1, 2]), first + second)
        assert same(batches(split, workers=workers, epochs=[2]), second)  # as after a resume
    assert not same(first, second)
    assert not same(first, batches(split, seed=4))


def test_workers_end_though_a_traceback_refers_to_the_loader():
    loading, workers = data.train_loader(random_split(100), data.augmentations(MEAN), 8, 0, 1, CPU), []
    with pytest.raises(ZeroDivisionError), loading as loader:
        for _ in loader:
            workers += loader._iterator._workers
            1 / 0  # noqa: B018
    assert len(workers) == 1 and not workers[0].is_alive()


def test_an_epoch_holds_every_image_once_and_labels_stay():
    split = random_split(50)
    # Augmentation keeps a flat image.
    split.images[:] = np.arange(50, dtype=np.uint8)[:, None, None, None] + 100
    seen = batches(split, mean=[1.0, 1.0, 1.0])
    values = torch.cat([images.amin((1, 2, 3)) for images, _ in seen]).long() - 100
    assert values.sort().values.tolist() == list(range(50))
    assert torch.equal(torch.cat([labels for _, labels in seen]), torch.from_numpy(split.labels)[values])


def augmentation_draws(count: int) -> dict[str, np.ndarray]:
    """What was decided for each of `count` copies of one image, read off the pixels."""
    ramp = np.arange(32, dtype=np.uint8) * 4 + 60
    image = np.zeros((32, 32, 3), np.uint8)
    image[..., 0], image[..., 1] = ramp[None, :], ramp[:, None]
    split = data.Split(np.repeat(image[None], count, 0), np.zeros(count, int), ["one"], "one")
    drawn = batches(split, 500, mean=[0, 0, 1.0])  # a blue hole
    pictures = torch.cat([images for images, _ in drawn]).numpy().astype(int)
    cut = pictures[..., 2] == 255
    # Along a row the first channel rises, or falls when flipped; along a column it changes when rotated.
    red = np.ma.array(pictures[..., 0], mask=cut)
    flip, rotate = np.diff(red, axis=2).sum((1, 2)) < 0, (red.max(1) > red.min(1)).any(1)
    corner = np.array([np.argwhere(c)[0] if c.any() else (-1, -1) for c in cut])
    draws = {"flip": flip.filled(), "rotate": rotate.filled(False), "cutout": cut.any((1, 2))}
    return {**draws, "corner": corner, "area": cut.sum((1, 2)), "pictures": pictures}


def chi_square(draws: np.ndarray, values: int) -> float:
    """How far the counts of the draws 0, 1, ... are from equal: its mean is values - 1."""
    counts = np.bincount(draws, minlength=values)
    assert len(counts) == values
    return ((counts - counts.mean()) ** 2 / counts.mean()).sum()


def test_augmentation_statistics_are_as_documented():
    draws = augmentation_draws(4000)
    visible = {"flip": 1, "cutout": 1, "rotate": 1 - 0.45 / data.ROTATE_LIMIT}  # under 0.45° no pixel changes
    for name, share in visible.items():
        chance = getattr(data, f"{name.upper()}_PROBABILITY") * share
        assert abs(draws[name].mean() - chance) < 0.032, name  # four standard deviations
    for a, b in (("flip", "rotate"), ("flip", "cutout"), ("rotate", "cutout")):
        correlation = np.corrcoef(draws[a], draws[b])[0, 1]
        assert abs(correlation) < 0.065, (a, b, correlation)  # 4 / sqrt(4000); one shared seed would give 1
    assert set(draws["area"]) == {0, data.CUTOUT_SIZE**2}
    plain = draws["pictures"][~draws["flip"] & ~draws["rotate"] & ~draws["cutout"]]
    for axis in (0, 1):  # of a probability of 1e-4
        assert chi_square(draws["corner"][draws["cutout"]][:, axis], 17) < 45
        offsets = (plain[:, 16, 16, axis] - 60) // 4 - 16  # the middle pixel tells that of the crop
        assert chi_square(offsets + 4, 9) < 32
    pictures = draws["pictures"][:200].reshape(200, -1)
    assert len(np.unique(pictures, axis=0)) > 150  # the images of a batch differ


@pytest.mark.parametrize("technique, number", [("crop", 2), ("flip", 1), ("rotate", 1), ("cutout", 1)])
def test_a_technique_that_is_left_out_is_missing_and_the_others_stay(technique, number):
    everything, rest = data.augmentations(MEAN), data.augmentations(MEAN, [technique])
    assert len(everything[technique]) == number and list(rest) == [t for t in everything if t != technique]
    assert repr(rest) == repr({name: everything[name] for name in rest})
    split = random_split(8)
    images = torch.cat([images for images, _ in batches(split, without=list(everything))])
    assert same([(images.sort(0).values, images)], [(torch.from_numpy(split.images).sort(0).values, images)])


def test_split_is_stratified_disjoint_and_from_the_seed():
    labels = np.random.default_rng(0).permutation(np.arange(5000) % 10)
    pixels = np.arange(5000, dtype=np.int64)[:, None, None, None]  # an image is its number
    split = data.Split(pixels, labels, [], "")
    training, validation = data.split_validation(split, 0.1, None, 0)
    assert np.bincount(validation.labels).tolist() == [50] * 10
    assert sorted([*training.images.flat, *validation.images.flat]) == list(range(5000))
    assert (labels[training.images.flat] == training.labels).all()
    again, other = data.split_validation(split, 0.1, None, 0), data.split_validation(split, 0.1, None, 1)
    assert (again[1].images == validation.images).all() and (other[1].images != validation.images).any()
    training, validation = data.split_validation(split, 0.1, 1000, 0)
    assert np.bincount(training.labels).tolist() == [90] * 10
    assert np.bincount(validation.labels).tolist() == [10] * 10
    assert not set(training.images.flat) & set(validation.images.flat)
    for share, limit, words in ((0.1, 5001, "--limit 5001"), (0.1, 3, "leaves nothing"), (0.9, 2, "nothing")):
        with pytest.raises(utils.RunError, match=words):
            data.split_validation(split, share, limit, 0)


def test_statistics_and_normalisation_agree_with_numpy():
    images = random_split(40).images // np.array([1, 2, 3], np.uint8)
    mean, std = data.channel_statistics(images)
    np.testing.assert_allclose(mean, (images / 255).mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(std, (images / 255).std((0, 1, 2)), rtol=1e-6)
    normal = data.Normalize(mean, std)(torch.from_numpy(images))
    assert normal.shape == (40, 3, 32, 32) and normal.dtype == torch.float32
    assert normal.is_contiguous(memory_format=torch.channels_last)
    expected = ((images / 255 - mean) / std).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(normal.numpy(), expected, atol=1e-5)


def test_demo_is_the_same_each_time_and_its_boxes_hold_the_shapes():
    images, labels, boxes = data.draw_demo("test")
    again = data.draw_demo("test")
    assert (images == again[0]).all() and images.shape == (500, 32, 32, 3)
    assert np.bincount(labels).tolist() == [50] * 10
    assert len(data.draw_demo("train")[0]) == 2000 and (data.draw_demo("train")[0][:500] != images).any()
    for image, (left, top, right, bottom) in zip(images, boxes, strict=True):
        outside = np.ones((32, 32), bool)
        outside[top:bottom, left:right] = False
        assert 0 <= left < right <= 32 and 0 <= top < bottom <= 32
        if outside.sum() > 50:
            assert image[outside].std(0).max() < 30  # noise and nothing else
            assert abs(image[outside].mean(0) - image[~outside].mean(0)).max() > 20


def test_folder_of_images_is_read_in_order_and_resized(tmp_path):
    for split in ("train", "test"):
        for name, shade in (("b", 200), ("a", 50)):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("L", (70, 40), shade).save(tmp_path / split / name / "one.png")
    loaded = data.load_split(str(tmp_path), "test")
    assert loaded.name == tmp_path.name and loaded.classes == ["a", "b"] and loaded.labels.tolist() == [0, 1]
    assert loaded.images.shape == (2, 32, 32, 3) and loaded.images[:, 0, 0].tolist() == [[50] * 3, [200] * 3]


def test_images_of_any_kind_are_read_as_rgb(tmp_path):
    pixels = random_split(1).images[0]
    colour, grey = Image.fromarray(pixels), Image.fromarray(pixels[..., 0])
    transparent = Image.fromarray(np.dstack([pixels, pixels[..., :1]]))
    colour.save(tmp_path / "animated.png", save_all=True, append_images=[transparent.convert("RGB"), colour])
    for kind, image in {
        "plain": colour,
        "grey": grey,
        "rgba": transparent,
        "grey palette": grey.convert("P"),
        "turned": colour.transpose(Image.Transpose.ROTATE_90),
    }.items():
        image.save(tmp_path / f"{kind}.png", **({"exif": TURNED} if kind == "turned" else {}))
    grey.convert("P").save(tmp_path / "grey clear palette.png", transparency=bytes(range(256)))
    grey.save(tmp_path / "grey.gif", transparency=3)
    for file in tmp_path.iterdir():
        expected = pixels[..., :1] if file.stem.startswith("grey") else pixels
        assert (data.read_image(file) == expected).all(), file


def test_hidden_files_are_no_data_and_others_are_counted(images, tmp_path, capsys):
    folder = shutil.copytree(images, tmp_path / "with .dots")
    (folder / "train").rename(folder / "Train")
    expected = data.load_split(str(images), "train")
    shutil.copytree(folder / "Train/cat", folder / "Train/cat/.ipynb_checkpoints")
    shutil.copytree(folder / "Train/cat", folder / "Train/.ipynb_checkpoints")
    for name in (".DS_Store", "cat/.DS_Store", "cat/._0.png", "dog/b.heic", "dog/c.HEIC", "dog/notes.txt"):
        (folder / "Train" / name).write_bytes(b"no image")
    found = data.load_split(str(folder), "train")
    assert found.classes == expected.classes and (found.labels == expected.labels).all()
    assert (found.images == expected.images).all()
    assert capsys.readouterr().out == f"{folder / 'Train'}: not read are 2 .heic, 1 .txt\n"
    Image.fromarray(expected.images[0]).save(folder / "Train/cat/9.jfif", "jpeg")
    assert len(data.load_split(str(folder), "train").labels) == len(expected.labels) + 1


def test_a_fault_of_the_disk_is_not_taken_for_a_damaged_image(images, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(utils.RunError, match="0.png cannot be read: Input/output error$"):
        data.load_split(str(images), "train")


TURNED = Image.Exif()
TURNED[0x0112] = 6  # the camera was turned: what is shown at the left is the top


BAD_IMAGES = {
    "cut.png": lambda good: good[:60],
    "empty.png": lambda good: b"",
    "text.jpg": lambda good: b"no image",
    "flipped.png": lambda good: good[:300] + bytes([good[300] ^ 255]) + good[301:],
    "grey16.png": lambda good: encoded(np.full((32, 32), 1000, np.uint16)),
    "float.tif": lambda good: encoded(np.ones((32, 32), np.float32), "tiff"),
}


def encoded(pixels: np.ndarray, kind: str = "png") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image_is_named(images, tmp_path, name):
    folder = shutil.copytree(images, tmp_path / "images")
    good = (folder / "train/cat/3.png").read_bytes()
    (folder / "train/cat" / name).write_bytes(BAD_IMAGES[name](good))
    with pytest.raises(utils.RunError, match=f"{name} cannot be read as an image: repair or remove it"):
        data.load_split(str(folder), "train")


def test_folders_that_are_no_data_set_are_named_and_left_alone(images, tmp_path):
    for name in ("empty class", "class missing", "no test", "other names", "training, testing"):
        shutil.copytree(images, tmp_path / name)
    shutil.rmtree(tmp_path / "empty class/train/dog")
    (tmp_path / "empty class/train/dog").mkdir()
    shutil.rmtree(tmp_path / "class missing/test/dog")
    shutil.rmtree(tmp_path / "no test/test")
    (tmp_path / "no test/val").mkdir()
    for split in ("train", "test"):
        (tmp_path / "other names" / split).rename(tmp_path / "other names" / f"my {split}ing images")
        (tmp_path / "training, testing" / split).rename(tmp_path / "training, testing" / f"{split}ing")
    before = sorted(tmp_path.rglob("*"))
    for name, words in {
        "empty class": ["dog"],
        "class missing": ["same class folders, not so dog"],
        "no test": ["holds train, val: expected train/<class>/* and test/<class>/*"],
        "training, testing": ["holds testing, training: expected"],
        "other names": ["holds my testing images, my training images", "train/<class>/* and test/<class>/*"],
        ".": [
            "holds class missing, empty class, no test, other names",
            "CIFAR-10",
            "perhaps",
            "class missing'",
        ],
        "other names/my training images": ["holds cat, dog"],
        "no test/train": ["holds cat, dog", f"perhaps you mean --data '{tmp_path / 'no test'}'"],
        "class missing/train/dog": ["holds 0.png, 1.png"],
        "nowhere": ["no folder", "CIFAR-10"],
    }.items():
        done = call(train, "--data", tmp_path / name, "--output", tmp_path / "output", *TINY)
        assert_one_line_error(done, 1, *words)
        assert len(done.stderr.strip().splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


# ---------------------------------------------------------------- the download


class Server(http.server.BaseHTTPRequestHandler):
    """/good delivers the archive; /silent never ends; /cut half; /corrupt one wrong byte; else 404."""

    archive = b""

    def do_GET(self):
        kind, half = self.path.strip("/"), self.archive[: len(self.archive) // 2]
        bodies = {"good": self.archive, "silent": half, "cut": half, "corrupt": self.archive[:-1] + b"?"}
        if kind not in bodies:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.archive)))
        self.end_headers()
        self.wfile.write(bodies[kind])
        time.sleep(3 if kind == "silent" else 0)

    def log_message(self, *_):
        pass


@pytest.fixture
def small_cifar10(monkeypatch):
    """A CIFAR-10 of ten images per file, with checksums of its own, and a local server that has it."""
    rng, members, classes = np.random.default_rng(0), io.BytesIO(), [f"class{i}" for i in range(10)]
    files = {"batches.meta": pickle.dumps({"label_names": classes})}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        pixels = rng.integers(0, 256, (10, 3072), dtype=np.uint8)
        files[name] = pickle.dumps({"data": pixels, "labels": list(range(10))})
    with tarfile.open(fileobj=members, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    archive, sums = members.getvalue(), {name: hashlib.md5(files[name]).hexdigest() for name in files}
    for attribute, value in {
        "train_list": [[name, sums[name]] for name in files if name.startswith("data")],
        "test_list": [["test_batch", sums["test_batch"]]],
        "meta": {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]},
        "tgz_md5": hashlib.md5(archive).hexdigest(),
    }.items():
        monkeypatch.setattr(data.CIFAR10, attribute, value)
    monkeypatch.setattr(Server, "archive", archive)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(data, "CIFAR10_URLS", [f"http://127.0.0.1:{server.server_port}/good"])
        yield archive
        server.shutdown()


def test_download_goes_on_to_the_address_that_delivers(small_cifar10, tmp_path, monkeypatch, capfd):
    (good,) = data.CIFAR10_URLS
    bad = [good.replace("good", kind) for kind in ("missing", "silent", "cut", "corrupt")]
    monkeypatch.setattr(data, "CIFAR10_URLS", ["http://127.0.0.1:9/none", *bad, good])
    monkeypatch.setattr(data, "SILENCE_LIMIT", 1)
    assert len(data.load_split(str(tmp_path), "train").labels) == 50
    told = capfd.readouterr().err
    assert told.count("downloading") == 6 and told.count("failed") == 5
    assert (tmp_path / "cifar-10-python.tar.gz").read_bytes() == small_cifar10
    assert {path.name for path in tmp_path.iterdir()} == {"cifar-10-python.tar.gz", "cifar-10-batches-py"}
    assert socket.getdefaulttimeout() is None


def test_an_archive_in_the_folder_is_used(small_cifar10, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CIFAR10_URLS", [])
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(small_cifar10)
    assert data.load_split(str(tmp_path), "test").classes[3] == "class3"
    (tmp_path / "cifar-10-batches-py/test_batch").write_bytes(b"damaged")
    assert len(data.load_split(str(tmp_path), "test").images) == 10  # unpacked again
    (tmp_path / "cifar-10-python.tar.gz").unlink()
    assert len(data.load_split(str(tmp_path), "test").images) == 10


def test_a_folder_that_cannot_be_written_is_read_or_named(small_cifar10, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    (tmp_path / "cifar-10-python.tar.gz").write_bytes(small_cifar10)
    with (
        monkeypatch.context() as patch,
        pytest.raises(utils.RunError, match="Read-only.*unpack it elsewhere"),
    ):
        patch.setattr(torchvision.datasets.utils, "extract_archive", refuse)
        data.load_split(str(tmp_path), "train")
    data.load_split(str(tmp_path), "train")
    (tmp_path / "cifar-10-python.tar.gz").unlink()
    for writing in ("mkdir", "makedirs", "replace"):
        monkeypatch.setattr(os, writing, refuse)
    (tmp_path / "cifar-10-batches-py").chmod(0o555)
    for folder in (tmp_path, tmp_path / "cifar-10-batches-py"):  # the inner one is as good
        assert len(data.load_split(str(folder), "train").labels) == 50
    monkeypatch.chdir(tmp_path / "cifar-10-batches-py")
    assert len(data.load_split(".", "test").labels) == 10


def test_a_damaged_archive_is_fetched_again_only_into_our_own_folder(small_cifar10, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("theirs", "data"):
        Path(folder).mkdir()
        Path(folder, "cifar-10-python.tar.gz").write_bytes(small_cifar10[:-5])
    with pytest.raises(utils.RunError, match="theirs holds cifar-10-python.tar.gz.*undamaged"):
        data.load_split("theirs", "train")
    assert Path("theirs/cifar-10-python.tar.gz").read_bytes() == small_cifar10[:-5]
    assert len(data.load_split("data", "train").images) == 50
    assert Path("data/cifar-10-python.tar.gz").read_bytes() == small_cifar10


def test_a_failed_download_damages_nothing_and_names_three_ways_out(small_cifar10, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/cifar-10-python.tar.gz").write_bytes(small_cifar10[:-5])
    monkeypatch.setattr(data, "CIFAR10_URLS", [data.CIFAR10_URLS[0].replace("good", "corrupt")])
    with pytest.raises(utils.RunError, match=r"cifar-10-python.tar.gz into data.*--data;.*--data demo"):
        data.load_split("data", "train")
    assert [path.name for path in Path("data").iterdir()] == ["cifar-10-python.tar.gz"]
    assert Path("data/cifar-10-python.tar.gz").read_bytes() == small_cifar10[:-5]


# ---------------------------------------------------------------- utils.py


def test_precision_follows_the_hardware(monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert utils.choose_precision("auto", cuda) is torch.float16  # a T4
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert utils.choose_precision("auto", cuda) is torch.bfloat16
    for name, amx, avx512, expected in (
        ("AMD EPYC", False, True, torch.bfloat16),
        ("AMD EPYC", False, False, torch.float32),
        ("Intel Xeon", True, True, torch.bfloat16),
        ("Intel Xeon", False, True, torch.float32),  # a virtual machine that hides AMX
    ):
        monkeypatch.setattr(
            torch.cpu, "get_capabilities", lambda name=name: {"cpu_name": name}, raising=False
        )
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx512=avx512: avx512)
        assert utils.choose_precision("auto", cpu) is expected
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # an older PyTorch
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert utils.choose_precision("auto", cpu) is torch.bfloat16
    assert utils.choose_precision("bf16", cpu) is torch.bfloat16
    for device in (cpu, torch.device("mps")):
        with pytest.raises(utils.RunError, match="fp16 needs a GPU with CUDA"):
            utils.choose_precision("fp16", device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(utils.RunError, match="--device cpu"):
        utils.choose_device("cuda")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "file"
    utils.write(file, b"old")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", lambda _: signal.raise_signal(signal.SIGINT))
        utils.write(file, b"new")
    assert file.read_bytes() == b"old" and list(tmp_path.iterdir()) == [file]


def test_a_file_system_without_fsync_will_do_but_its_faults_are_told(tmp_path, monkeypatch):
    file, answers = tmp_path / "file", [errno.EINVAL, errno.ENOTSUP, errno.EIO, *[errno.ENOSPC] * 4]

    def answer(_):
        raise OSError(answers.pop(0), "the answer")

    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(os, "fsync", answer)
    utils.write(file, b"1")
    utils.write(file, b"2")
    with pytest.raises(utils.RunError, match="the answer"):
        utils.write(file, b"3")
    assert file.read_bytes() == b"2" and list(tmp_path.iterdir()) == [file] and not answers


def test_a_checkpoint_is_tried_again_for_seconds_and_a_picture_is_given_up(tmp_path, monkeypatch, capsys):
    """As where a virus scanner or a viewer holds the file."""
    waited, replace = [], os.replace

    def refuse(source, target):
        if sum(waited) < 3:
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setattr(os, "replace", refuse)
    utils.save_figure(Figure(), tmp_path / "curves.png", needed=False)
    assert (
        capsys.readouterr().out.count("curves.png cannot be written (Permission denied): the run goes on")
        == 1
    )
    assert not list(tmp_path.iterdir())
    utils.save_checkpoint({"epoch": 1}, tmp_path / "last.pt")
    assert waited == [0, 0, 1, 2] and [path.name for path in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(
        time, "sleep", lambda _: (tmp_path / f"last.pt.{os.getpid()}.tmp").symlink_to("/dev/full")
    )
    (tmp_path / "last.pt").write_bytes(b"old")
    with pytest.raises(utils.RunError, match="last.pt cannot be written .No space left.*free some space"):
        utils.save_checkpoint({"epoch": 1}, tmp_path / "last.pt")
    assert (tmp_path / "last.pt").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


class Malicious:
    def __reduce__(self):
        return os.system, ("touch /tmp/malicious-code-has-run",)


def test_bad_checkpoints_are_refused_and_run_no_code(finished, tmp_path):
    good, bad, rng = (finished / "checkpoint.pt").read_bytes(), tmp_path / "bad.pt", np.random.default_rng(0)
    cases = [b"", b"text", good[: len(good) // 2], good[:-1], pickle.dumps({"model": 1})]
    for position in rng.integers(1000, len(good) - 20_000, 5):  # inside the tensors
        cases.append(good[:position] + bytes([good[position] ^ 64]) + good[position + 1 :])
    for case in cases:
        bad.write_bytes(case)
        with pytest.raises(utils.RunError, match="bad.pt is damaged"):
            utils.load_checkpoint(bad)
    torch.save({"model": Malicious()}, bad)
    with pytest.raises(utils.RunError, match="bad.pt is damaged"):
        utils.load_checkpoint(bad)
    assert not Path("/tmp/malicious-code-has-run").exists()
    _, checkpoint = gradcam.load_model(finished / "checkpoint.pt")
    wrong_norm = {**checkpoint["settings"], "norm": "layer"}
    plain = {
        name.replace("parametrizations.weight.original", "weight"): of
        for name, of in ResNet18(2, "layer", 8).state_dict().items()
    }  # before weights were standardised
    for state, words in (
        ({"model": {}}, "another kind or version"),
        ([1, 2], "another kind or version"),
        ({**checkpoint, "settings": wrong_norm}, "another network"),
        ({**checkpoint, "settings": wrong_norm, "model": plain}, "another network"),
        ({**checkpoint, "model": {"a": 1}}, "another network"),
        ({**checkpoint, "model": [1]}, "another network"),
    ):
        torch.save(state, bad)
        assert_one_line_error(call(gradcam, "--checkpoint", bad), 1, "bad.pt", words)
    assert_one_line_error(call(gradcam, "--checkpoint", tmp_path), 1, "a directory")
    assert_one_line_error(call(gradcam, "--checkpoint", tmp_path / "none.pt"), 1, "no file", "train.py")
    assert_one_line_error(call(gradcam, "--checkpoint", finished / "last.pt"), 1, "name the checkpoint.pt")


def test_progress_tells_a_terminal_how_far_and_a_file_how_long(capsys, monkeypatch):
    monkeypatch.setattr(utils, "ESTIMATE_SECONDS", 0)
    assert list(utils.progress([5, 6, 7], "reading")) == [5, 6, 7] and capsys.readouterr().out == ""
    for _ in utils.progress(range(4), "training", rounds=50):
        time.sleep(0.02)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.strip() in {f"training will take about 0:00:0{seconds}" for seconds in (4, 5, 6)}
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    for _ in utils.progress(range(2), "reading"):
        time.sleep(0.6)
    shown = capsys.readouterr().out
    assert "reading:  50%, 0:00:01 left" in shown and "\n" not in shown
    assert shown.split("\r")[-2].isspace()  # at the end the line is erased
    assert utils.clock(3725.4) == "1:02:05"


class Writer:
    """All that can be asked of a standard stream of a notebook or an editor."""

    def __init__(self):
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text


@pytest.mark.parametrize("stream", [None, Writer()])
def test_standard_streams_may_be_anything_that_can_write(stream, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with redirect_stdout(stream), redirect_stderr(stream):
        utils.run(lambda: data.main(["--data", str(images)]))
        with pytest.raises(SystemExit):
            utils.run(lambda: data.main(["--data", "nowhere"]))
    if stream:
        assert "Written: augmentations.png" in stream.text and "error: no folder nowhere" in stream.text


def test_main_raises_what_a_caller_can_catch_from_any_thread(images, tmp_path, monkeypatch):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    raised = []

    def attempt(*flags):
        try:
            train.main(["--data", str(images), "--output", str(tmp_path), *TINY, *flags])
        except utils.RunError as error:
            raised.append(str(error))

    for flags in ((), ("--norm", "x"), ("--resume", "--lr", "2"), ("--data", "nowhere", "--overwrite")):
        thread = threading.Thread(target=attempt, args=flags)
        thread.start()
        thread.join()
    for error, words in zip(raised, ("--norm", "--lr 2.0 would", "no folder nowhere"), strict=True):
        assert words in error
    assert len(utils.load_checkpoint(tmp_path / "last.pt")["history"]) == 2
    call(data, "--data", "nowhere")  # as the command line does
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(data, "load_split", lambda *_: torch.zeros(2).view(7))
    with pytest.raises(RuntimeError, match="shape"):  # a fault of the program stays one
        attempt("--overwrite")


def test_only_known_errors_of_pytorch_are_explained():
    """Not those of a user's own transform: the worker it fails in reports it with all its traceback."""
    for message, hint in {
        "CUDA out of memory. Tried to allocate 2.00 GiB": "too little memory",
        "unable to allocate shared memory(shm) for file </torch_1>": "too little memory",
        "DataLoader worker (pid 7) is killed by signal: Killed.": "a worker process died",
        "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback: memory_format": None,
        "CUDA error: an illegal memory access was encountered": None,
    }.items():
        with (
            pytest.raises(RuntimeError if hint is None else utils.RunError, match=hint),
            utils.explained_errors(),
        ):
            raise RuntimeError(message)


def test_an_old_gpu_or_a_pytorch_without_cuda_is_one_line(images, finished, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nMore lines")

    about = utils.load_checkpoint(finished / "checkpoint.pt")
    about["settings"] |= {"width": 64, "device": "auto"}
    for built_with, expected in (("12.8", False), (None, True)):
        monkeypatch.setattr(torch.version, "cuda", built_with)
        with redirect_stdout(io.StringIO()) as out:
            train.print_header(about, tmp_path / "my runs", CPU)
        assert ("without CUDA; with it: https://pytorch.org" in out.getvalue()) == expected
        assert "--resume --output '" in out.getvalue()  # a path with a space as the shell takes it
    monkeypatch.setattr(sys, "platform", "win32")
    quoted = utils.quote(tmp_path / "my runs")
    monkeypatch.undo()
    assert quoted == f'"{tmp_path}/my runs"'
    monkeypatch.setattr(train, "Training", fail)
    done = call(train, "--data", images, "--output", tmp_path / "run", *TINY)
    assert_one_line_error(done, 1, "too old", "--device cpu")


def test_on_mps_memory_is_contiguous_and_copies_wait(finished, images, tmp_path, monkeypatch):
    """Without a Mac: the CPU is told to do as MPS would, and all that enters a module is looked at."""
    assert utils.memory_format(torch.device("mps")) is torch.contiguous_format
    assert utils.memory_format(torch.device("cuda")) is utils.memory_format(CPU) is torch.channels_last
    seen, forward = [], nn.Module.__call__

    def look(module, x, *rest):
        seen.append((module.training, x.is_contiguous() or isinstance(module, data.Normalize)))
        return forward(module, x, *rest)

    monkeypatch.setattr(utils, "memory_format", lambda _: torch.contiguous_format)
    monkeypatch.setattr(nn.Module, "__call__", look)
    monkeypatch.setattr(utils, "choose_precision", lambda *_: torch.float32)
    monkeypatch.setattr(torch, "autocast", None)  # in float32 it is not even entered
    succeed(train, "--data", images, "--output", tmp_path, *TINY, "--epochs", 1)
    succeed(gradcam, "--checkpoint", tmp_path / "checkpoint.pt")
    assert {training for training, _ in seen} == {True, False} and all(fine for _, fine in seen)

    def copy_and_wait(tensor, device, non_blocking):
        assert device.type == "mps" and not non_blocking
        return tensor

    def normalize(images):
        return on_cpu(images)

    on_cpu, mps = data.Normalize(MEAN, STD), torch.device("mps")
    split = data.load_split(str(images), "train")
    normalize.mean = SimpleNamespace(device=mps)
    with data.train_loader(split, data.augmentations(MEAN), 4, 0, None, mps) as loader:
        assert loader.num_workers == 1 and not loader.pin_memory
        training = training_of()
        monkeypatch.setattr(torch.Tensor, "to", copy_and_wait)
        train.train_one_epoch(training, loader, normalize, nn.CrossEntropyLoss(), torch.float32)


AWKWARD = ["猫", "قطة", "caf\u0065\u0301", "a$b^c_d$", "x" * 15]  # accents as macOS writes them


def test_awkward_class_names_are_drawn_as_written_and_tables_stay_aligned(tmp_path, capsys, monkeypatch):
    utils.report_unknown.cache_clear()
    result = {"test_accuracy": 0.5, "epoch": 1, "title": "a run of 犬", "name": "x", "classes": AWKWARD}
    result |= {"confusion": torch.eye(5).int().tolist(), "class_accuracy": [0.5] * 5}
    result |= {"mirrored_accuracy": 0.5, "training_seconds": 1}
    with utils.explained_errors():
        for _ in range(2):
            train.print_result(result, tmp_path)
        heatmaps = gradcam.plot_heatmaps(
            [np.zeros((32, 32, 3))], np.zeros((1, 1, 32, 32)), [AWKWARD[3:]], "t"
        )
        utils.save_figure(heatmaps, tmp_path / "heatmaps.png")
    out = capsys.readouterr().out
    assert out.count("boxes in place of") == 1 and "in place of 犬 猫, which the font" in out
    assert matplotlib.rcParams["text.parse_math"] is True  # as others may want it
    ends = [utils.pad(name, 20) + "|" for name in AWKWARD]
    assert [len(end) for end in ends] == [20, 21, 22, 21, 21]  # code points; on the screen all are 21 wide


@pytest.mark.parametrize("cores, system, expected", [(2, "linux", 2), (40, "linux", 16), (40, "win32", 4)])
def test_workers_follow_the_cores_that_may_be_used(cores, system, expected, monkeypatch):
    monkeypatch.setattr(os, "process_cpu_count", lambda: cores, raising=False)
    monkeypatch.setattr(sys, "platform", system)
    split, chosen = random_split(8), data.augmentations(MEAN)
    loading = data.train_loader(split, chosen, 4, 0, None, torch.device("cuda"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # here may be fewer cores than workers
        with loading as loader:
            assert loader.num_workers == expected
    with data.train_loader(split, chosen, 4, 0, None, CPU) as loader:
        assert loader.num_workers == 1
        assert loader.timeout == 0  # a laptop that sleeps for hours goes on when it wakes
    monkeypatch.delattr(os, "process_cpu_count")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(3), raising=False)
    assert utils.usable_cores() == 3


@pytest.mark.skipif(not Path("/dev/shm").exists(), reason="needs /dev/shm")
def test_too_little_shared_memory_is_told_at_the_start(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 0, 10**6))
    loading = data.train_loader(random_split(8), data.augmentations(MEAN), 128, 0, 2, CPU)
    with (
        pytest.raises(utils.RunError, match="/dev/shm has no room .* 2 workers: use fewer --workers"),
        loading,
    ):
        pass


# ---------------------------------------------------------------- in a notebook


@pytest.fixture(scope="module")
def cell():
    """A function that runs a cell in a notebook's kernel and returns its text and number of pictures."""
    pytest.importorskip("ipykernel")
    kernel, client = pytest.importorskip("jupyter_client.manager").start_new_kernel(cwd=HERE)

    def run_cell(code: str, stop_at: str = "") -> tuple[str, int]:
        """stop_at: press the stop button as soon as these words stand there"""
        seen = {"text": "", "pictures": 0, "stop": stop_at}

        def see(message: dict) -> None:
            content = message["content"]
            seen["text"] += content.get("text", "") + "\n".join(content.get("traceback", []))
            seen["pictures"] += "image/png" in content.get("data", {})
            if seen["stop"] and seen["stop"] in seen["text"]:
                seen["stop"] = ""
                kernel.interrupt_kernel()

        client.execute_interactive(code, output_hook=see, allow_stdin=False, timeout=60)
        return seen["text"], seen["pictures"]

    yield run_cell
    client.stop_channels()
    kernel.shutdown_kernel(now=True)


@pytest.mark.filterwarnings("default")  # of the kernel's packages
def test_a_notebook_trains_explains_and_shows_the_pictures(cell, images, tmp_path):
    flags = f"--data {images} --output {tmp_path} {FLAGS} --epochs 1"
    assert "--epochs" in cell("%run train.py --help")[0]
    # A second run, with workers as on Windows and macOS.
    cell("import torch.multiprocessing as mp; mp.set_start_method('spawn', force=True)")
    text, pictures = cell(f"%run train.py {flags} --workers 1")
    assert "Test accuracy" in text and "\r" in text and pictures == 2, text
    text, pictures = cell(f"%run gradcam.py --n 3 --checkpoint {tmp_path}/checkpoint.pt")
    assert "8 of 16" in text and pictures == 2, text
    text, _ = cell(
        "import train, utils\ntry:\n  train.main(['--lr', 'x'])\nexcept utils.RunError as e: print(e)"
    )
    assert text == "argument --lr: invalid number value: 'x'\n"
    assert "error: " in cell("%run train.py --resume --output nowhere")[0]


@pytest.mark.filterwarnings("default")
def test_the_stop_button_leaves_kernel_and_run_alive(cell, images, tmp_path):
    cell("import train, torch.multiprocessing as mp; mp.set_start_method('fork', force=True)")
    flags = f"--data {images} --output {tmp_path} {FLAGS} --epochs 5000 --workers 1"
    text, _ = cell(f"train.SAVE_SECONDS = -1; train.main('{flags}'.split())", stop_at="3/5000")
    assert "KeyboardInterrupt" in text
    assert cell("print(mp.active_children())")[0] == "[]\n"
    assert "KeyboardInterrupt" in cell("import time; print('begun'); time.sleep(50)", stop_at="begun")[0]
    assert "stopped" in cell(f"%run train.py --output {tmp_path} --resume", stop_at="6/5000")[0]
    epochs = len(utils.load_checkpoint(tmp_path / "last.pt")["history"])
    assert "Test accuracy" in cell(f"%run train.py --output {tmp_path} --resume --epochs {epochs}")[0]


# ---------------------------------------------------------------- train.py


def test_a_run_writes_what_it_promises(finished):
    log = (finished / "log").read_text()
    assert "14 training, 2 validation, 16 test images in 2 classes" in log and re.search(
        r"cpu \(threads: \d+\), float32", log
    )
    assert "ResNet18 of width 8 on" in log and "No GPU" not in log and f"--resume --output {finished}" in log
    assert "  1/2 " in log and "  2/2 " in log and "Test accuracy" in log and "gradcam.py" in log
    assert "Only 8 steps: the learning rate rises for 200" in log
    assert "\r" not in log and re.search(r"left\n +1/2 .* 0:00:\d\d   0:00:\d\d ", log)
    with open(finished / "history.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    for row in rows:
        assert all(np.isfinite(float(value)) for value in row.values())
        assert float(row["images_per_second"]) > 0 and 0 <= float(row["val_accuracy"]) <= 1
    for name in ("curves.png", "confusion.png"):
        assert np.asarray(Image.open(finished / name)).std() > 5
    assert {path.name for path in finished.iterdir()} == {*train.OUTPUT_FILES, "log"}
    _, checkpoint = gradcam.load_model(finished / "checkpoint.pt")
    best = max(rows, key=lambda row: (float(row["val_accuracy"]), -float(row["val_loss"])))
    assert str(checkpoint["epoch"]) == best["epoch"]
    assert checkpoint["val_accuracy"] == float(best["val_accuracy"])
    assert checkpoint["training_seconds"] == sum(float(row["seconds"]) for row in rows)
    assert checkpoint["settings"]["label_smoothing"] == 0.1 and "width 8" in checkpoint["title"]
    assert checkpoint["plateau"]["threshold"] == 0.01 and "RandomCrop(" in checkpoint["augmentation"]["crop"]
    assert f"torch {torch.__version__.partition('+')[0]}," in checkpoint["versions"]


def test_the_figures_of_the_test_set_can_be_computed_again(finished):
    log = (finished / "log").read_text()
    model, checkpoint = gradcam.load_model(finished / "checkpoint.pt")
    test = data.load_split(checkpoint["settings"]["data"], "test")
    images = data.Normalize(checkpoint["mean"], checkpoint["std"])(torch.from_numpy(test.images))
    with torch.no_grad():
        probabilities, mirrored = model(images).softmax(1).numpy(), model(images.flip(3)).softmax(1).numpy()
    predicted, both = probabilities.argmax(1), (probabilities + mirrored).argmax(1)
    assert checkpoint["test_accuracy"] == (predicted == test.labels).mean()
    assert checkpoint["mirrored_accuracy"] == pytest.approx((both == test.labels).mean())
    assert f"Test accuracy on {checkpoint['name']}: {checkpoint['test_accuracy']:.2%}" in log
    assert f"augmentation): {checkpoint['mirrored_accuracy']:.2%}" in log
    for label, name in enumerate(test.classes):
        accuracy = (predicted == label)[test.labels == label].mean()
        assert re.search(rf"{name} +{accuracy:.2%}", log)
        assert checkpoint["class_accuracy"][label] == pytest.approx(accuracy)
        for guess in range(2):
            count = ((test.labels == label) & (predicted == guess)).sum()
            assert checkpoint["confusion"][label][guess] == count


def assert_same_run(*folders: Path) -> None:
    """Two output folders hold the same files, and the same numbers bit for bit, but for times."""
    whole, other = (utils.load_checkpoint(folder / "last.pt") for folder in folders)
    for name in ("model", "averaged"):
        for key, value in whole["training"][name].items():
            assert torch.equal(value, other["training"][name][key]), (name, key)
    for name in ("plateau", "warmup", "scaler"):
        assert whole["training"][name] == other["training"][name]
    momenta = [state["training"]["optimizer"]["state"].values() for state in (whole, other)]
    assert all(torch.equal(a["momentum_buffer"], b["momentum_buffer"]) for a, b in zip(*momenta, strict=True))
    for a, b in zip(whole["history"], other["history"], strict=True):
        for key in ("epoch", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy"):
            assert a[key] == b[key]
    best = [utils.load_checkpoint(folder / "checkpoint.pt") for folder in folders]
    for key in ("epoch", "val_accuracy", "test_accuracy", "mirrored_accuracy", "confusion"):
        assert best[0][key] == best[1][key]
    assert all(torch.equal(value, best[1]["model"][key]) for key, value in best[0]["model"].items())
    rows = [len((folder / "history.csv").read_text().splitlines()) for folder in folders]
    assert rows[0] == rows[1] == len(whole["history"]) + 1
    names = [{file.name for file in folder.iterdir()} - {"log"} for folder in folders]
    assert names[0] == names[1]


def test_resume_is_bit_identical(finished, images, tmp_path):
    succeed(train, "--data", images, "--output", tmp_path, *TINY, "--epochs", 1)
    succeed(train, "--output", tmp_path, "--resume", "--epochs", 2, "--workers", 1)
    assert_same_run(finished, tmp_path)
    assert "Test accuracy" in succeed(train, "--output", tmp_path, "--resume")  # of a finished run
    assert_same_run(finished, tmp_path)


def test_the_plateau_cuts_after_the_warmup_and_a_resumed_run_knows_how_long_it_has_waited(
    images, tmp_path, monkeypatch
):
    """An epoch has four steps, so the warm-up ends in the second; no progress is ever enough."""
    monkeypatch.setattr(train, "WARMUP_STEPS", 6)
    monkeypatch.setattr(train, "PLATEAU_THRESHOLD", 0.99)
    flags = ("--data", images, *TINY, "--output")
    succeed(train, *flags, tmp_path / "whole", "--epochs", 8)
    state = utils.load_checkpoint(tmp_path / "whole/last.pt")
    rates = [row["lr"] for row in state["history"]]
    np.testing.assert_allclose(rates[1:], [0.1, 0.1, 0.1, 0.03, 0.03, 0.009, 0.009])
    succeed(train, *flags, tmp_path / "resumed", "--epochs", 3)
    for epochs in (5, 8):
        succeed(train, "--output", tmp_path / "resumed", "--resume", "--epochs", epochs)
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")


def test_the_average_begins_anew_after_the_first_epoch(finished, images, tmp_path):
    succeed(train, "--data", images, "--output", tmp_path, *TINY, "--epochs", 1)
    for folder, same in ((tmp_path, True), (finished, False)):  # of one epoch, of two
        training = utils.load_checkpoint(folder / "last.pt")["training"]
        pairs = zip(training["model"].values(), training["averaged"].values(), strict=True)
        assert all(torch.equal(*pair) for pair in pairs) == same


def test_a_run_on_two_machines_names_both(images, tmp_path, monkeypatch):
    def hardware(threads, *flags):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        succeed(train, "--output", tmp_path, *flags)
        return utils.load_checkpoint(tmp_path / "checkpoint.pt")["hardware"]

    assert hardware(1, "--data", images, *TINY, "--epochs", 1) == "cpu (threads: 1), float32"
    both = "cpu (threads: 1), float32; from epoch 2 cpu (threads: 2), float32"
    assert hardware(2, "--resume", "--epochs", 2) == both
    assert hardware(2, "--resume", "--epochs", 3) == both == hardware(3, "--resume")  # no epoch is left


def test_a_finished_run_is_prolonged_from_its_end_not_from_its_best_epoch(images, tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "best_epoch", lambda history: history[0])
    flags = ("--data", images, *TINY, "--output")
    succeed(train, *flags, tmp_path / "whole", "--epochs", 3)
    succeed(train, *flags, tmp_path / "prolonged", "--epochs", 2)
    log = succeed(train, "--output", tmp_path / "prolonged", "--resume", "--epochs", 3)
    assert "Going on: 2 of 3 epochs are saved." in log
    assert_same_run(tmp_path / "whole", tmp_path / "prolonged")


@needs_signals
@pytest.mark.parametrize("write", [1, 6])
def test_a_run_killed_between_two_writes_goes_on_as_if_it_had_not_been(write, finished, images, tmp_path):
    """Just before it is to put that file in its place: the first last.pt of epoch 0, or a later one."""
    code = "import os, signal; replace, done = os.replace, []\n"
    code += "def count(*paths):\n    done.append(paths)\n"
    code += f"    if len(done) > {write}: os.kill(os.getpid(), signal.SIGKILL)\n    replace(*paths)\n"
    process = start(f"{code}os.replace = count; {TRAIN}", "--data", images, "--output", tmp_path, *TINY)
    assert process.communicate() and process.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob("*.tmp"))) == 1
    succeed(train, "--output", tmp_path, "--resume")
    assert_same_run(finished, tmp_path)


@needs_signals
def test_a_run_killed_at_any_moment_goes_on_as_if_it_had_not_been(finished, images, tmp_path):
    process = start_until("left", TRAIN, "--data", images, "--output", tmp_path, *TINY)
    time.sleep(np.random.default_rng().uniform(0, 1))
    process.kill()
    process.communicate()
    succeed(train, "--output", tmp_path, "--resume")
    assert_same_run(finished, tmp_path)


def test_a_second_run_takes_over_from_one_in_its_first_epoch(finished, images, tmp_path, monkeypatch):
    train_one_epoch, flags = train.train_one_epoch, ("--data", images, "--output", tmp_path, *TINY)

    def interrupted_by_a_second_run(*rest):
        monkeypatch.setattr(train, "train_one_epoch", train_one_epoch)
        succeed(train, *flags)
        return train_one_epoch(*rest)

    monkeypatch.setattr(train, "train_one_epoch", interrupted_by_a_second_run)
    first = call(train, *flags, "--seed", 1)
    assert_one_line_error(first, 1, f"another run now writes to {tmp_path}, so this one stops")
    assert_same_run(finished, tmp_path)


def test_a_finished_run_is_refused_and_overwritten_only_when_told(finished, images, tmp_path, monkeypatch):
    run = shutil.copytree(finished, tmp_path / "run")
    for name in ("gradcam.png", "last.pt.123.tmp", "notes.txt", "last.pt.backup"):
        (run / name).write_text("of the old run")
    before = {path: path.read_bytes() for path in run.iterdir()}
    flags = ("--output", run, *TINY)
    assert_one_line_error(call(train, *flags, "--data", images), 1, "holds a run", "--resume", "--overwrite")
    for names in (["last.pt"], ["checkpoint.pt", "last.pt"]):  # as if deleted to save space
        for name in names:
            (run / name).rename(run / f"{name}.away")
        done = call(train, *flags, "--data", images)
        assert_one_line_error(done, 1, "holds a run: use --overwrite or another")
        for name in names:
            (run / f"{name}.away").rename(run / name)
    assert_one_line_error(call(train, *flags, "--data", tmp_path / "none", "--overwrite"), 1, "no folder")
    assert_one_line_error(call(train, *flags, "--data", images, "--limit", 99, "--overwrite"), 1, "--limit")
    assert {path: path.read_bytes() for path in run.iterdir()} == before
    succeed(train, *flags, "--data", images, "--overwrite", "--epochs", 1)
    assert {path.name for path in run.iterdir()} == {
        *train.OUTPUT_FILES,
        "log",
        "notes.txt",
        "last.pt.backup",
    }
    assert len(utils.load_checkpoint(run / "last.pt")["history"]) == 1


def test_overwriting_removes_our_report_and_keeps_an_edited_one(finished, images, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    ours = utils.seal(b"text\n") + b"\ntext\n"
    for ending, report in (("", ours + b"My own words."), ("-2", ours)):
        (run / f"report{ending}.md").write_bytes(report)
        for picture in ("misclassified", "gradcam"):
            (run / f"{picture}{ending}.png").write_text("of the old run")
    succeed(train, "--data", images, "--output", run, *TINY, "--epochs", 1, "--overwrite")
    kept = {"log", "report.md", "misclassified.png", "gradcam.png"}
    assert {path.name for path in run.iterdir()} == {*train.OUTPUT_FILES, *kept}


def test_files_are_written_together_at_most_twice_a_minute(images, tmp_path):
    lines = succeed(train, "--data", images, "--output", tmp_path, *TINY, "--epochs", 1)
    before = (tmp_path / "last.pt").stat().st_mtime_ns
    state = utils.load_checkpoint(tmp_path / "last.pt")
    assert "1/1" in lines and len(state["history"]) == 1
    saved, save = [], train.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "save", lambda *rest: saved.append(len(rest[4])) or save(*rest))
        succeed(train, "--output", tmp_path, "--resume", "--epochs", 4)
        assert saved == [4, 4] and (tmp_path / "last.pt").stat().st_mtime_ns > before
        os.utime(tmp_path / "last.pt", (1, 1))  # as if written long ago
        succeed(train, "--output", tmp_path, "--resume", "--epochs", 7)
        assert saved == [4, 4, 5, 7, 7]  # at the end before and after the test


def test_resume_refuses_by_name_what_would_change_the_run(finished, images, tmp_path):
    before = (finished / "last.pt").read_bytes()
    for change in (
        "--lr 0.2",
        "--batch-size 128",
        "--norm layer",
        "--width 64",
        "--seed 1",
        "--limit 5",
        "--without flip",
    ):
        done = call(train, "--output", finished, "--resume", *change.split())
        assert_one_line_error(done, 2, change.split()[0], "leave it out")
    assert_one_line_error(call(train, "--output", finished, "--resume", "--overwrite"), 2, "--overwrite")
    assert_one_line_error(call(train, "--output", finished, "--resume", "--data", "demo"), 1, "--data demo")
    assert_one_line_error(call(train, "--output", tmp_path, "--resume"), 1, "no file", "last.pt")
    with pytest.MonkeyPatch.context() as patch:  # as if the files were called otherwise
        split = data.load_split(str(images), "train")
        patch.setattr(data, "load_split", lambda *_: split.subset(np.r_[7:-1:-1, 8:16]))
        done = call(train, "--output", finished, "--resume")
    assert_one_line_error(done, 1, "--data", "not in the same order")
    state = utils.load_checkpoint(finished / "last.pt")
    del state["brightness"]  # as of an older version
    utils.save_checkpoint(state, tmp_path / "last.pt")
    assert "Test accuracy" in succeed(train, "--output", tmp_path, "--resume")
    state["training"]["model"] = ResNet18(2, "layer", 8).state_dict()  # as if model.py had been edited
    utils.save_checkpoint(state, tmp_path / "last.pt")
    assert_one_line_error(call(train, "--output", tmp_path, "--resume"), 1, "another network", "--overwrite")
    assert (finished / "last.pt").read_bytes() == before


def test_a_narrow_network_or_a_missing_technique_is_named_everywhere(images, tmp_path, monkeypatch, capsys):
    flags = ("--data", images, "--output", tmp_path, *TINY, "--epochs", 1, "--without", "crop", "cutout")
    assert "ResNet18 of width 8 on" in (log := succeed(train, *flags)) and "without crop and cutout" in log
    model, checkpoint = gradcam.load_model(tmp_path / "checkpoint.pt")
    assert model.name == "ResNet18 of width 8" and model.feature.stem[0].out_channels == 8
    assert "width 8" in checkpoint["title"] and "without crop and cutout" in checkpoint["title"]
    assert list(checkpoint["augmentation"]) == ["flip", "rotate"]
    assert checkpoint["command"].endswith(
        "--without crop cutout --width 8 --workers 0 --device cpu --precision fp32"
    )
    headings, plot_grid = [], utils.plot_grid
    monkeypatch.setattr(utils, "plot_grid", lambda *rest: headings.append(rest[3]) or plot_grid(*rest))
    succeed(gradcam, "--checkpoint", tmp_path / "checkpoint.pt")
    assert len(headings) == 2 and all(checkpoint["title"] in heading for heading in headings)
    checkpoint["settings"] |= {"width": 64, "device": "auto"}
    train.print_header(checkpoint, tmp_path, CPU)
    assert "No GPU is in use" in capsys.readouterr().out
    del checkpoint["settings"]["width"]  # as of a run before there was a choice
    checkpoint["model"] = ResNet18(2).state_dict()
    del checkpoint["command"], checkpoint["title"]
    torch.save(checkpoint, tmp_path / "older.pt")
    assert "report" not in succeed(gradcam, "--checkpoint", tmp_path / "older.pt", "--n", 1)
    assert gradcam.load_model(tmp_path / "older.pt")[0].name == "ResNet18"


def training_of(*flags) -> train.Training:
    return train.Training(train.get_parser().parse_args([*flags, "--width", "8"]), 2, CPU, False)


def test_the_plateau_cuts_the_rate_and_says_so(capsys):
    training = training_of("--patience", "1", "--factor", "0.3")
    plateau, optimizer = training.plateau, training.optimizer
    optimizer.param_groups[0]["lr"] = 0.1  # as after the warm-up
    rates = []
    for loss in (1.0, 0.9, 0.895, 0.8945, 0.8, 0.799, 0.798):  # progress under 1 % counts as none
        plateau.step(loss)
        rates.append(optimizer.param_groups[0]["lr"])
    np.testing.assert_allclose(rates, [0.1, 0.1, 0.1, 0.03, 0.03, 0.03, 0.009])
    for _ in range(50):
        plateau.step(1.0)
    assert optimizer.param_groups[0]["lr"] == 1e-4 == plateau.eps * 1e4
    low = training_of("--lr", "1e-6")
    low.optimizer.param_groups[0]["lr"] = 1e-6
    for _ in range(50):
        low.plateau.step(1.0)
    assert low.optimizer.param_groups[0]["lr"] == pytest.approx(1e-9)
    row = dict.fromkeys(("train_loss", "train_accuracy", "val_loss", "val_accuracy"), 0.5)
    train.print_epoch({"epoch": 3, "lr": 0.1, **row, "images_per_second": 9, "seconds": 61}, 40, False, 0.03)
    shown = capsys.readouterr().out
    assert "plateau: the learning rate is cut from 0.1 to 0.03" in shown
    assert "0:01:01   0:37:37" in shown  # 61 s, and as much for each of the 37 epochs left


def test_the_rate_warms_up_then_stays():
    training, rates = training_of(), []
    for _ in range(train.WARMUP_STEPS + 20):
        training.optimizer.step()
        training.warmup.step()
        rates.append(training.optimizer.param_groups[0]["lr"])
    assert rates[0] < 0.002 and rates == sorted(rates)
    np.testing.assert_allclose(rates[train.WARMUP_STEPS :], 0.1)


def test_a_loss_that_is_not_finite_stops_the_run(images, tmp_path):
    done = call(train, "--data", images, "--output", tmp_path, *TINY, "--lr", 1e6)
    assert_one_line_error(done, 1, "no longer a finite number", "--lr")
    assert {path.name for path in tmp_path.iterdir()} == {"last.pt", "augmentations.png"}


def test_the_weights_kept_are_the_average_of_those_after_each_step(images):
    """The oracle: average = decay * average + (1 - decay) * weights with decay = 1 - 1 / steps, by hand."""
    training, split, after_steps = training_of(), data.load_split(str(images), "train"), []
    beginning = copy.deepcopy(training.averaged.state_dict())
    training.optimizer.register_step_post_hook(
        lambda *_: after_steps.append(copy.deepcopy(training.model.state_dict()))
    )
    with data.train_loader(split, data.augmentations(MEAN), 4, 0, 0, CPU) as loader:
        train.train_one_epoch(
            training, loader, data.Normalize(MEAN, STD), nn.CrossEntropyLoss(), torch.float32
        )
    assert len(after_steps) == len(loader) == 4
    for name, kept in training.averaged.state_dict().items():
        if kept.is_floating_point():
            expected = beginning[name]
            for weights in after_steps:
                expected = 0.75 * expected + 0.25 * weights[name]
            torch.testing.assert_close(kept, expected)


def test_a_state_without_a_scaler_resumes_with_one_and_the_other_way_round():
    args = train.get_parser().parse_args(["--width", "8"])
    for before, after in ((False, True), (True, False)):
        state = train.Training(args, 2, CPU, fp16=before).state_dict()
        train.Training(args, 2, CPU, fp16=after).load_state_dict(state)


def test_a_run_can_be_resumed_without_compilation(finished, tmp_path):
    state = utils.load_checkpoint(finished / "last.pt")
    state["settings"]["compile"] = True
    utils.save_checkpoint(state, tmp_path / "last.pt")
    flags = ["--output", str(tmp_path), "--resume"]
    assert train.parse_args(flags)[0].compile
    assert not train.parse_args([*flags, "--no-compile"])[0].compile


def test_help_shows_every_flag_and_its_default():
    for module in (train, gradcam):
        text = module.get_parser().format_help()
        assert text.count("(default") >= 3 and not any(
            f"(default: {no}" in text for no in ("None", "[]", "False")
        )
    assert "(default: 0)" in train.get_parser().format_help()
    flags = "data output epochs batch-size lr weight-decay factor patience label-smoothing val-split limit "
    flags += "without norm width workers seed device precision compile resume overwrite"
    for flag in flags.split():
        assert f"--{flag} " in train.get_parser().format_help()


def test_a_flag_is_written_whole_and_an_output_that_is_a_file_is_one_line(images, tmp_path):
    assert_one_line_error(call(train, "--data", images, "--epoch", 1), 2, "unrecognized arguments: --epoch")
    assert_one_line_error(call(train, "--seed", 2**32), 2, "is not from 0 to 4294967295")
    (tmp_path / "file").write_bytes(b"theirs")
    done = call(train, "--data", images, *TINY, "--output", tmp_path / "file")
    assert_one_line_error(done, 1, f"no folder can be made at {tmp_path / 'file'}", "name another --output")
    assert (tmp_path / "file").read_bytes() == b"theirs"


NUMBERS = "epochs batch-size lr factor val-split width limit patience workers"


@pytest.mark.parametrize("flag", NUMBERS.split())
def test_bad_numbers_of_train_are_named(flag):
    for value in ("-1", "1e30", "nan", "text", "") + (() if flag in ("patience", "workers") else ("0",)):
        assert_one_line_error(call(train, f"--{flag}={value}"), 2, f"--{flag}")


@pytest.mark.parametrize(
    "module, flags",
    [(train, flags) for flags in ("--seed -1", "--norm x", "--without x", "--weight-decay 2", "--device tpu")]
    + [(gradcam, flags) for flags in ("--n 0", "--n 101", "--n x", "--layer layer9", "--seed -1")],
)
def test_other_bad_flags_are_named(module, flags):
    assert_one_line_error(call(module, *flags.split()), 2, flags.split()[0])


def test_other_bad_input_is_one_line(images, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = call(train, "--data", images, "--output", tmp_path, "--device", "cuda")
    assert_one_line_error(done, 1, "--device cuda", "--device cpu")
    (tmp_path / "file").write_text("")
    done = call(train, "--data", images, "--output", tmp_path / "file/o", *TINY)
    assert_one_line_error(done, 1, str(tmp_path / "file"))


@needs_signals
@pytest.mark.parametrize(
    "stop", [lambda pid: os.kill(pid, signal.SIGINT), lambda pid: os.killpg(pid, signal.SIGTERM)]
)
def test_a_stopped_run_ends_with_one_line_and_can_go_on(stop, images, tmp_path):
    """Stopped by Ctrl-C, or by a scheduler that ends the whole group of processes."""
    flags = ("--data", images, "--output", tmp_path, *TINY, "--epochs", 5000, "--workers", 1)
    process = start_until("2/5000", TRAIN, *flags, start_new_session=True)
    stop(process.pid)
    _, err = process.communicate(timeout=60)  # until no worker holds the output open
    assert process.returncode in (1, 130) and "stopped" in err and len(err.strip().splitlines()) == 1
    epochs = len(utils.load_checkpoint(tmp_path / "last.pt")["history"])
    log = succeed(train, "--output", tmp_path, "--resume", "--epochs", epochs)  # only the test is left
    assert "Test accuracy" in log and f"{epochs}/{epochs}" not in log


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_a_killed_worker_ends_the_run_with_one_line(images, tmp_path):
    flags = ("--data", images, "--output", tmp_path, *TINY, "--epochs", 5000, "--workers", 1)
    process = start_until("2/5000", TRAIN, *flags)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    done = subprocess.CompletedProcess(flags, process.returncode, out, err)
    assert_one_line_error(done, 1, "a worker process died", "--workers")
    assert len(err.strip().splitlines()) == 1
    utils.load_checkpoint(tmp_path / "last.pt")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_a_long_run_leaves_nothing_behind(images, tmp_path, monkeypatch):
    """Open files, threads, figures and memory after the third epoch and after the last."""
    seen, print_epoch = [], train.print_epoch

    def print_and_look(*rest):
        print_epoch(*rest)
        gc.collect()
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        figures = sum(type(item) is Figure for item in gc.get_objects())
        files, threads = len(os.listdir("/proc/self/fd")), int(status["Threads"])
        seen.append((files, threads, figures, int(status["VmRSS"].split()[0])))

    monkeypatch.setattr(train, "print_epoch", print_and_look)
    monkeypatch.setattr(train, "SAVE_SECONDS", -1)
    succeed(train, "--data", images, "--output", tmp_path, *TINY, "--epochs", 6, "--workers", 1)
    assert seen[2][:3] == seen[-1][:3]
    assert seen[-1][3] - seen[2][3] < 60_000  # kB


# ---------------------------------------------------------------- gradcam.py


def textbook_gradcam(model: ResNet18, layer: str, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Equations 1 and 2 of the paper, an image at a time, with the whole network differentiated."""
    maps = []
    for image, label in zip(images, labels, strict=True):
        x, kept = image[None], None
        for name, stage in model.feature.named_children():
            x = stage(x)
            if name == layer:
                kept = x
                kept.retain_grad()
        model.classifier(x)[0, label].backward()
        channels, height, width = kept.shape[1:]
        heatmap = kept.new_zeros(height, width)
        for k in range(channels):
            heatmap += kept.grad[0, k].sum() / (height * width) * kept[0, k].detach()
        heatmap = heatmap.clamp(min=0)
        if heatmap.max() > 0:
            heatmap = heatmap / heatmap.max()
        size = (32, 32)
        maps.append(nn.functional.interpolate(heatmap[None, None], size, mode="bilinear")[0, 0])
    model.zero_grad()
    return torch.stack(maps)


def mistakes(count: int, name: str = "cat") -> list[gradcam.Mistake]:
    return [gradcam.Mistake(i, image, name, name, 1.0) for i, image in enumerate(random_split(count).images)]


@pytest.fixture(scope="module")
def network() -> ResNet18:
    torch.manual_seed(0)
    model = ResNet18(width=16)
    model(torch.randn(32, 3, 32, 32))  # running statistics that are not those of the start
    return model.eval()


@pytest.mark.parametrize("layer", gradcam.LAYERS)
def test_heatmaps_equal_the_textbook(network, layer):
    images, labels = torch.randn(4, 3, 32, 32).double(), torch.tensor([0, 3, 3, 9])
    network = copy.deepcopy(network).double()
    maps = gradcam.GradCAM(network, layer).heatmaps(images, labels)
    assert maps.shape == (4, 32, 32) and maps.min() >= 0 and maps.max() <= 1
    torch.testing.assert_close(maps, textbook_gradcam(network, layer, images, labels), atol=1e-5, rtol=0)


def test_at_layer4_gradcam_is_cam(network):
    """Zhou et al. 2016: before pooling and a linear layer the map is the class weights times activations."""
    images, labels = torch.randn(6, 3, 32, 32), torch.arange(6)
    with torch.no_grad():
        activations = network.feature(images)
    cam = torch.einsum("nchw,nc->nhw", activations, network.classifier[2].weight[labels]).relu()
    peak = cam.amax((1, 2), keepdim=True)
    cam = torch.where(peak > 0, cam / peak, 0)[:, None]
    cam = nn.functional.interpolate(cam, (32, 32), mode="bilinear")[:, 0].detach()
    maps = gradcam.GradCAM(network, "layer4").heatmaps(images, labels)
    torch.testing.assert_close(maps, cam, atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def trained() -> tuple[ResNet18, data.Normalize]:
    """A network that has learned to tell four shapes apart."""
    chosen = [list(data.DEMO_SHAPES).index(name) for name in ("bars", "cross", "pillars", "ring")]
    images, labels, _ = data.draw_demo("train")
    images, labels = (part[np.isin(labels, chosen)][:600] for part in (images, labels))
    normalize = data.Normalize(*data.channel_statistics(images))
    images, labels = normalize(torch.from_numpy(images)), torch.from_numpy(labels)
    torch.manual_seed(0)
    model = ResNet18(width=16).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, 0.9, nesterov=True)
    for _ in range(4):
        for batch in torch.randperm(600).split(16):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval(), normalize


@pytest.mark.parametrize("layer", ["layer3", "layer4"])
def test_heatmaps_point_at_the_object_of_the_class(layer, trained):
    """The pointing game (Zhang et al. 2016): two shapes side by side, and each must be found by its class.

    A map that does not depend on the class is wrong every second time, so a blob in the middle or the edges
    cannot pass; nor can one that does not depend on the weights (Adebayo et al. 2018).
    """
    (model, normalize), (images, labels, _) = trained, data.draw_demo("test")
    shapes = list(data.DEMO_SHAPES).index("bars"), list(data.DEMO_SHAPES).index("pillars")
    bars, pillars = (images[labels == shape] for shape in shapes)
    pictures = normalize(torch.from_numpy(np.concatenate([bars, pillars], 2)))  # (50, 3, 32, 64)

    def share_found(model) -> float:
        found = []
        for shape, (low, high) in zip(shapes, ((0, 32), (32, 64)), strict=True):
            maps = gradcam.GradCAM(model, layer).heatmaps(pictures, torch.full((50,), shape))
            column = maps.flatten(1).argmax(1) % 64
            found.append((low <= column) & (column < high))
        return torch.cat(found).float().mean().item()

    assert share_found(model) > 0.9
    assert share_found(ResNet18(width=16).eval()) < 0.75


def test_heatmaps_leave_the_network_as_it_was(network):
    network.feature.layer2.train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([1, 2])
    maps = gradcam.GradCAM(network).heatmaps(images, labels)
    for without_gradients in (torch.no_grad, torch.inference_mode):
        with without_gradients():
            assert torch.equal(gradcam.GradCAM(network).heatmaps(images.clone(), labels.clone()), maps)
    assert modes == [module.training for module in network.modules()]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in network.parameters())
    network.eval()


def test_images_on_another_device_than_the_network_are_named():
    cam = gradcam.GradCAM(ResNet18(width=8).to("meta"))
    with pytest.raises(ValueError, match="images on cpu, labels on cpu, network on meta: move all to one"):
        cam.heatmaps(torch.randn(1, 3, 32, 32), torch.tensor([1]))


def test_a_map_without_positive_evidence_is_zero_and_not_nan(network):
    cam = gradcam.GradCAM(network, "layer4")
    weights = network.classifier[2].weight
    with torch.no_grad():
        kept = weights[5].clone()
        weights[5] = -1
        maps = cam.heatmaps(torch.randn(2, 3, 32, 32), torch.tensor([5, 5]))
        weights[5] = kept
    assert torch.equal(maps, torch.zeros(2, 32, 32))
    figure = gradcam.plot_heatmaps([mistakes(1)[0].image], maps.numpy()[None], [("1", "2", "3")], "heading")
    assert [axis.get_title() for axis in figure.axes] == [
        "1",
        *(f"{n}\n(nothing speaks for it)" for n in (2, 3)),
    ]


def test_the_interface_of_the_course(network):
    cam = gradcam.GradCAM(network, "layer3")
    images = torch.randn(3, 3, 32, 32)
    assert cam.classes == 10 and cam.gradients is None
    logits = cam(images)
    torch.testing.assert_close(logits, network(images))
    logits[:, 4].sum().backward()
    activations = cam.get_activations(images)
    assert cam.get_activations_gradient().shape == activations.shape == (3, 64, 8, 8)
    torch.testing.assert_close(cam.classifier(cam.features_conv(images)), logits)
    network.zero_grad()
    with pytest.raises(ValueError, match="layer5"):
        gradcam.GradCAM(network, "layer5")


def test_errors_are_chosen_by_confidence_or_at_random():
    logits = torch.tensor([[9.0, 0], [0, 1], [0, 5], [3, 0], [0, 9]])
    labels = torch.tensor([0, 0, 0, 1, 1])  # wrong: 1, 2, 3, of confidence .73, .993, .95
    assert gradcam.choose_errors(logits, labels, 2, None).tolist() == [2, 3]
    drawn = [gradcam.choose_errors(logits, labels, 9, seed).tolist() for seed in range(20)]
    assert {tuple(sorted(d)) for d in drawn} == {(1, 2, 3)} and len({tuple(d) for d in drawn}) > 1
    assert gradcam.choose_errors(logits, labels, 9, 3).tolist() == drawn[3]


def test_gradcam_draws_the_errors_there_are_and_no_empty_grid(finished, images, tmp_path):
    file, output = tmp_path / "checkpoint.pt", tmp_path / "one"
    _, checkpoint = gradcam.load_model(finished / "checkpoint.pt")
    checkpoint["model"]["classifier.2.weight"].zero_()
    checkpoint["model"]["classifier.2.bias"] = torch.tensor([5.0, 0.0])  # everything is a cat
    utils.save_checkpoint(checkpoint, file)
    log = succeed(gradcam, "--n", 20, "--checkpoint", file)
    assert "8 of 16" in log and "Only 8 of the 20" in log and log.count("99.3%") == 8
    assert succeed(gradcam, "--n", 1, "--checkpoint", file, "--output", output).count("99.3%") == 1
    for picture in (*tmp_path.glob("*.png"), *output.glob("*.png")):
        assert np.asarray(Image.open(picture)).std() > 5
    assert {path.name for path in output.iterdir()} == {"misclassified.png", "gradcam.png", "report.md"}
    shutil.copytree(images, tmp_path / "data")
    shutil.rmtree(tmp_path / "data/test/dog")
    wrong = call(gradcam, "--checkpoint", file, "--data", tmp_path / "data")
    assert_one_line_error(wrong, 1, "cat, dog", "--data")
    checkpoint["model"]["classifier.2.bias"] = torch.tensor([5.0])
    checkpoint["model"]["classifier.2.weight"] = checkpoint["model"]["classifier.2.weight"][:1]
    checkpoint |= {"classes": ["cat"], "class_accuracy": [1.0], "confusion": [[8]]}
    utils.save_checkpoint(checkpoint, file)
    flags = ("--checkpoint", file, "--data", tmp_path / "data", "--output", tmp_path / "none")
    assert "nothing to show" in succeed(gradcam, *flags)
    assert [path.name for path in (tmp_path / "none").iterdir()] == ["report.md"]


def test_gradcam_finds_the_images_from_any_folder_or_asks_for_them(images, tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    shutil.copytree(images, there / "photos")
    monkeypatch.chdir(there)
    succeed(train, "--data", "photos", *TINY, "--epochs", 1)
    monkeypatch.chdir(here)
    assert "16 test images" in succeed(gradcam, "--checkpoint", "../there/outputs/checkpoint.pt")
    (there / "photos").rename(there / "moved")
    done = call(gradcam, "--checkpoint", "../there/outputs/checkpoint.pt")
    assert_one_line_error(done, 1, f"no folder {there / 'photos'}: name another with --data")
    assert not list(here.iterdir()) and not (there / "photos").exists()


def test_the_example_of_the_readme_runs(finished, images, tmp_path, monkeypatch):
    code = re.search(r"```python\n(import torch.*?)```", (HERE / "README.md").read_text(), re.S)[1]
    monkeypatch.chdir(tmp_path)
    shutil.copy(images / "test/cat/0.png", "photo.jpg")
    names = {}
    exec(code.replace("outputs/checkpoint.pt", str(finished / "checkpoint.pt")), names)
    assert names["heatmap"].shape == (32, 32) and 0.5 < names["heatmap"].max() <= 1


def test_own_pictures_are_explained_as_the_network_saw_them(finished, images, tmp_path):
    picture = Image.open(images / "test/dog/1.png")
    picture.resize((640, 400)).save(tmp_path / "my dog.jpg")
    figures, plot_grid = [], utils.plot_grid
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "plot_grid", lambda *rest: figures.append(rest) or plot_grid(*rest))
        flags = ("--checkpoint", finished / "checkpoint.pt", "--output", tmp_path)
        log = succeed(gradcam, *flags, "--image", tmp_path / "my dog.jpg", images / "test/cat/0.png")
    (tiles, titles, _, heading, heats), seen = figures[0], data.read_image(tmp_path / "my dog.jpg")
    assert all((tile == seen).all() for tile in tiles[:3]) and len(tiles) == 6
    model, checkpoint = gradcam.load_model(finished / "checkpoint.pt")
    assert "layer4" in heading and checkpoint["title"] in heading
    image = data.Normalize(checkpoint["mean"], checkpoint["std"])(torch.from_numpy(seen[None]))
    probabilities, labels = model(image).softmax(1).topk(2)
    said = [
        f"{checkpoint['classes'][i]}, {p:.0%}" for p, i in zip(*(probabilities[0], labels[0]), strict=True)
    ]
    assert titles[:3] == ["my dog.jpg", *said] and f"my dog.jpg: {said[0]}; {said[1]}\n" in log
    expected = gradcam.GradCAM(model).heatmaps(image.repeat(2, 1, 1, 1), labels[0])  # of layer4
    np.testing.assert_allclose(np.stack(heats[1:3]), expected.numpy(), atol=0.05)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my dog.jpg", "own.png"]
    assert_one_line_error(
        call(gradcam, *flags, "--image", "none.jpg"), 1, "none.jpg cannot be read: No such file"
    )


def tables(report: str) -> dict[str, list[list[str]]]:
    """The rows of the first table under each heading, as a reader sees them."""
    found = {}
    for section in report.split("\n## ")[1:]:
        heading, _, body = section.partition("\n")
        rows = re.findall(r"^\| (.*) \|$", body, re.M)
        cells = [re.split(r"(?<!\\) \| ", row) for row in rows]
        found[heading] = [[re.sub(r"\\(.)", r"\1", cell) for cell in row] for row in cells if row[0] != "---"]
    return found


AWKWARD_NAMES = ["*d* <b>&amp; $1$", "a|b _c_"]


@pytest.fixture(scope="module")
def reported(images, tmp_path_factory) -> tuple[Path, str]:
    """A run with awkward class names whose network takes all for the first class, and its report."""
    folder = shutil.copytree(images, tmp_path_factory.mktemp("reported") / "names")
    for split, (old, new) in itertools.product(
        ("train", "test"), zip(("cat", "dog"), AWKWARD_NAMES, strict=True)
    ):
        (folder / split / old).rename(folder / split / new)
    run = folder.parent / "my run"
    succeed(train, "--data", folder, "--output", run, *TINY, "--without", "flip", "--epochs", 3)
    log = succeed(gradcam, "--checkpoint", run / "checkpoint.pt", "--n", 9, "--seed", 5)
    assert "report.md" in log
    return run, log


def test_the_report_says_what_the_run_left_and_nothing_else(reported):
    run, log = reported
    report = (run / "report.md").read_text()
    c = utils.load_checkpoint(run / "checkpoint.pt")
    rows = list(csv.DictReader((run / "history.csv").read_text().splitlines()))
    found = tables(report)
    assert list(found) == [
        *(
            "Highlights",
            "About the model",
            "Techniques used",
            "Graphs",
            "Training log",
            "Images",
            "References",
        )
    ]
    model, test = gradcam.load_model(run / "checkpoint.pt")[0], data.load_split(c["settings"]["data"], "test")
    logits, labels = utils.predict(model, test, data.Normalize(c["mean"], c["std"]), torch.float32)
    predicted, best = logits.argmax(1), max(float(row["val_accuracy"]) for row in rows)
    assert dict(found["Highlights"][1:]) == {
        "test accuracy": f"{(predicted == labels).float().mean():.2%}",
        "averaged with the mirrored image (test-time augmentation)": f"{c['mirrored_accuracy']:.2%}",
        "training time": utils.clock(sum(float(row["seconds"]) for row in rows)),
        "validation accuracy": f"{best:.2%} in epoch {c['epoch']}, which is kept",
        "epochs": "3 of 3",
        "images": "14 training, 2 validation, 16 test images in 2 classes",
        "hardware": c["hardware"],
        "parameters": f"{count_parameters(model):,}",
        "versions": c["versions"],
        "seed": "0",
    }
    again = re.search(r"```\n(python train.py .*)\n(python gradcam.py .*)\n```", report)
    args = train.get_parser().parse_args(shlex.split(again[1])[2:])
    settings = {name: value for name, value in vars(args).items() if name not in train.NOT_SETTINGS}
    assert settings == c["settings"] and again[2] == "python gradcam.py --n 9 --seed 5"
    assert model_script.summary(model) in report
    techniques = {row[0]: row[2] for row in found["Techniques used"][1:]}
    transforms = data.augmentations(c["mean"])
    assert "HorizontalFlip" not in techniques and techniques["CutOut"] == repr(transforms["cutout"][0])
    assert techniques["RandomCrop"] == ", ".join(map(repr, transforms["crop"]))
    assert techniques["ReduceLROnPlateau"] == "factor 0.3, patience 1, threshold 0.01"
    assert "4 images a step" in techniques["SGD"] and "1 - 1/4" in techniques["averaging"]
    accuracies = [f"{(predicted == labels)[labels == i].float().mean():.2%}" for i in (0, 1)]
    assert found["Graphs"][1:] == [list(pair) for pair in zip(AWKWARD_NAMES, accuracies, strict=True)]
    for true, said in ((0, 1), (1, 0)):
        count = int(((labels == true) & (predicted == said)).sum())
        names = [gradcam.escape(AWKWARD_NAMES[i]) for i in (true, said)]
        assert (f"* {names[0]} taken for {names[1]}: {count} of 8\n" in report) == (count > 0)
    for shown, row in zip(found["Training log"][1:], rows, strict=True):
        values = {name: float(value) for name, value in row.items()}
        assert shown[:2] == [row["epoch"], f"{values['lr']:.3g}"]
        assert shown[2:4] == [f"{values['train_loss']:.4f}", f"{values['train_accuracy']:.2%}"]
        assert shown[4:] == [
            *(f"{values['val_loss']:.4f}", f"{values['val_accuracy']:.2%}", utils.clock(values["seconds"]))
        ]
    wrong = (predicted != labels).sum()
    shown = f"; shown here: {min(9, wrong)}, picked at random (seed 5)."
    assert f"{wrong} of 16 test images are misclassified ({wrong / 16:.2%}){shown}" in report
    errors = [
        re.split(r"  +", line.strip()) for line in log.splitlines() if line.endswith("%") and "  " in line
    ]
    assert found["Images"][1:] == errors and len(errors) == min(9, wrong)
    links = re.findall(r"!\[.*?\]\((.*?)\)", report)
    assert len(links) == 5 and all((run / link).exists() for link in links)


def test_a_stop_while_drawing_leaves_the_earlier_pictures_together(reported, monkeypatch):
    run, drawn, render = reported[0], [], utils.render
    before = {path: path.read_bytes() for path in run.iterdir()}

    def render_one_and_stop(figure):
        if drawn:
            raise KeyboardInterrupt
        drawn.append(figure)
        return render(figure)

    monkeypatch.setattr(utils, "render", render_one_and_stop)
    assert call(gradcam, "--checkpoint", run / "checkpoint.pt", "--n", 1).returncode == 130
    assert drawn and {path: path.read_bytes() for path in run.iterdir()} == before


def test_the_pictures_of_another_run_are_left_alone(reported, finished):
    done = call(gradcam, "--checkpoint", reported[0] / "checkpoint.pt", "--output", finished)
    assert_one_line_error(done, 1, f"{finished} holds another run", "--output")


def test_an_edited_report_is_kept_and_ours_is_replaced(reported, tmp_path):
    flags = ("--checkpoint", reported[0] / "checkpoint.pt", "--output", tmp_path, "--n")
    succeed(gradcam, *flags, 1)
    ours = (tmp_path / "report.md").read_text()
    for name in ("curves.png", "confusion.png", "augmentations.png", "history.csv"):
        assert (tmp_path / name).read_bytes() == (reported[0] / name).read_bytes()
    assert "report.md" in succeed(gradcam, *flags, 2) and (tmp_path / "report.md").read_text() != ours
    (tmp_path / "report.md").write_bytes((tmp_path / "report.md").read_bytes().replace(b"\n", b"\r\n"))
    succeed(gradcam, *flags, 1)
    assert (tmp_path / "report.md").read_text() == ours  # other line endings are no edit
    before = {path: path.read_bytes() for path in tmp_path.glob("[gm]*.png")}
    (tmp_path / "report.md").write_text(ours + "My own words.")
    for number in (3, 2):  # that report's pictures stay, too, and those of the next are replaced
        log = succeed(gradcam, *flags, number)
        assert "misclassified-2.png, gradcam-2.png, report-2.md" in log
    assert (tmp_path / "report.md").read_text() == ours + "My own words." and len(before) == 2
    assert {path: path.read_bytes() for path in before} == before
    links = re.findall(r"!\[.*?\]\((.*?)\)", (tmp_path / "report-2.md").read_text())
    assert {"misclassified-2.png", "gradcam-2.png"} < set(links) and all(
        (tmp_path / link).exists() for link in links
    )
    (tmp_path / "report-2.md").write_bytes(b"\xff\xfe")
    assert "report-3.md" in succeed(gradcam, *flags, 1) and len(list(tmp_path.glob("report*"))) == 3


def test_a_report_leaves_out_what_the_run_has_not(reported, tmp_path):
    c = utils.load_checkpoint(reported[0] / "checkpoint.pt")
    headline = f"| test accuracy | {c['test_accuracy']:.2%} |"
    errors, c["confusion"] = 16 - round(16 * c["test_accuracy"]), [[7, 1], [2, 6]]  # as if counted elsewhere
    text = gradcam.make_report(c, [], "", [], f"{errors} of 16 test images are misclassified", "layer3")
    assert headline in text and "in the test after the training it was 3.)" in text
    c["settings"]["norm"] = "layer"
    layer_text = gradcam.make_report(c, [], "", [], "3 of 16 test images are misclassified", "layer3")
    assert "standardised filters" in layer_text and "standardised" not in text
    c["settings"]["norm"] = "batch"
    c["augmentation"]["my own"] = "Blur(p=0.5)"  # by one more entry in data.augmentations
    for key in ("test_accuracy", "mirrored_accuracy", "class_accuracy", "confusion", "training_seconds"):
        del c[key]  # as of a run that has not ended
    utils.save_checkpoint(c, tmp_path / "checkpoint.pt")
    shutil.copy(reported[0] / "history.csv", tmp_path)
    succeed(gradcam, "--checkpoint", tmp_path / "checkpoint.pt")
    report = (tmp_path / "report.md").read_text()
    assert not tables(report)["Graphs"] and "test accuracy" not in report and "training time" not in report
    assert re.findall(r"!\[.*?\]\((.*?)\)", report) == ["misclassified.png", "gradcam.png"]
    assert ["my own", "", "Blur(p=0.5)"] in tables(report)["Techniques used"]


def save_and_check_margins(figure, path: Path) -> None:
    """Nothing is cut off: the outermost pixels of the saved picture are white."""
    utils.save_figure(figure, path)
    pixels = np.asarray(Image.open(path).convert("L"))
    assert min(pixels[0].min(), pixels[-1].min(), pixels[:, 0].min(), pixels[:, -1].min()) == 255


def test_plots_show_what_they_say(tmp_path):
    columns = ("epoch", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy")
    rows = [(1, 0.1, 2, 0.2, 2, 0.3), (2, 0.1, 1, 0.4, 2, 0.6), (3, 0.03, 0, 0.5, 2, 0.5)]
    history = [dict(zip(columns, row, strict=True)) for row in rows]
    figure = utils.plot_curves(history, "title of the run")
    labels = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    assert "best: epoch 2, 60.00%" in labels and "cut by the plateau" in labels
    assert figure.axes[2].get_yscale() == "log"
    save_and_check_margins(figure, tmp_path / "curves.png")
    for rates in ([0.1], [0.008, 0.015, 0.023, 0.038], [0.1, 0.03, 0.0081, 1e-4], [100, 30]):
        rows = [{**history[0], "epoch": i + 1, "lr": lr} for i, lr in enumerate(rates)]
        figure = utils.plot_curves(rows, "title of the run")
        save_and_check_margins(figure, tmp_path / "curves.png")
        low, high = figure.axes[2].get_ylim()
        ticks = zip(figure.axes[2].get_yticks(), figure.axes[2].get_yticklabels(), strict=True)
        shown = [(value, text.get_text().replace("−", "-")) for value, text in ticks if low <= value <= high]
        assert 1 <= len(shown) <= 12 and all(float(text) == pytest.approx(value) for value, text in shown)
        assert not any(text.get_text() for text in figure.axes[2].get_yticklabels(minor=True))
        epochs = [float(text.get_text()) for text in figure.axes[0].get_xticklabels()]
        assert epochs == [round(epoch) for epoch in epochs]
    figure = utils.plot_confusion({"confusion": [[3, 1], [0, 4]], "classes": ["cat", "dog"]}, "t")
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["cat  75.0%", "dog  100.0%"]
    assert [t.get_text() for t in figure.axes[0].texts] == ["3", "1", "4"]
    for names in (
        ["cat", "dog"],
        [f"a class with a long name {i}" for i in range(10)],
        [f"c{i}" for i in range(100)],
    ):
        counts = torch.eye(len(names), dtype=torch.int64).tolist()
        figure = utils.plot_confusion({"confusion": counts, "classes": names}, "t")
        assert len(figure.axes[0].texts) == (0 if len(names) == 100 else len(names))
        save_and_check_margins(figure, tmp_path / "confusion.png")
    history = [{**history[0], "epoch": epoch, "lr": 0.1 * 0.9**epoch} for epoch in range(1, 61)]
    for epochs in (2, 60):
        assert_texts_have_room(utils.plot_curves(history[:epochs], "title of the run"))
    for without in ([], ["crop"]):
        techniques = data.augmentations(MEAN, without)
        figure = data.plot_augmentations(random_split(9), techniques)
        (axis,) = figure.axes
        assert "random" in axis.get_title()
        assert axis.images[0].get_array().shape == (4 * 34, (3 + len(techniques)) * 34, 3)
        titles = [label.get_text().split("\n")[0] for label in axis.get_xticklabels()]
        assert titles == ["original", *techniques, "all together,", "all together,"]
        assert_texts_have_room(figure)
    save_and_check_margins(figure, tmp_path / "augmentations.png")


def assert_texts_have_room(figure) -> None:
    """No text leaves the page, and none lies over another."""
    texts, draw = [], Text.draw
    figure.draw_without_rendering()  # as when it is saved, the layout settles in the second drawing
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", lambda text, renderer: texts.append(text) or draw(text, renderer))
        figure.draw_without_rendering()
    texts = [text for text in texts if text.get_text() and text.get_visible()]
    boxes = [text.get_window_extent() for text in texts]
    for i, box in enumerate(boxes):
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 and box.y1 <= figure.bbox.y1, texts[i]
        for k in range(i):
            assert not box.overlaps(boxes[k]), (texts[i], texts[k])


LONG, WIDE = "a class with a name of forty characters,", "A CLASS WITH A NAME OF FORTY CAPITALS, W"


@pytest.mark.parametrize("n, name", [(1, "x"), (1, WIDE), (3, LONG), (10, WIDE), (25, LONG)])
def test_pages_show_every_image_once_and_texts_have_room(n, name):
    errors, maps = mistakes(n, name), np.ones((n, 2, 32, 32), np.float32)
    images = [error.image for error in errors]
    grid = utils.plot_grid(images, [f"{m.said}\nis {m.true}" for m in errors], min(5, n), "heading")
    titles = [(f"test image {m.index}", m.said, f"is {m.true}") for m in errors]
    for figure, times in ((grid, 1), (gradcam.plot_heatmaps(images, maps, titles, "heading"), 3)):
        shown = [axis.images[0].get_array() for axis in figure.axes if axis.images]
        assert len(shown) == times * n
        assert all((picture == image).all() for picture, image in zip(shown[::times], images, strict=True))
        assert_texts_have_room(figure)
    said = [axis.get_title() for axis in figure.axes if axis.get_title()][1]  # in words, at the tile itself
    assert said.replace("\n", "").replace(" ", "") == f"said{name},100%".replace(" ", "")
    assert all(len(axis.images) == 2 for axis in figure.axes[1:3])  # photo and heat
    (line,) = figure.axes[1].collections  # closed along the edge, and within the image
    points = line.get_paths()[0].vertices
    assert (points[0] == points[-1]).all() and points.min() > -0.5 and points.max() < 31.5
    assert np.ptp(points, axis=0).min() > 31


# ---------------------------------------------------------------- as a user


def test_the_scripts_run_from_any_folder_with_workers(images, tmp_path):
    for words in (
        ("train.py", "--data", images, *TINY, "--epochs", 1, "--workers", 2, "--norm", "layer"),
        ("gradcam.py", "--n", 2),
    ):
        command = [sys.executable, HERE / words[0], *map(str, words[1:])]
        done = subprocess.run(command, cwd=tmp_path, timeout=120, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, done.stderr
    written = {path.name for path in (tmp_path / "outputs").iterdir()}
    assert written == {*train.OUTPUT_FILES, "misclassified.png", "gradcam.png", "report.md"}
