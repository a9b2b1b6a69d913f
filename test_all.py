"""Tests of every promise; no network, 90 seconds on two cores.

python -m pytest -q test_all.py
"""

import copy
import csv
import hashlib
import http.server
import io
import math
import os
import pickle
import re
import runpy
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter, OrderedDict
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

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

torch.set_num_threads(1)  # of networks this small a second thread only waits, beside other work for long
pytestmark = pytest.mark.filterwarnings("error", "ignore:This DataLoader will create")
needs_signals = pytest.mark.skipif(os.name != "posix", reason="needs signals")
HERE = Path(__file__).parent
CPU = torch.device("cpu")
MEAN, STD = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]  # of CIFAR-10
FLAGS = "--epochs 2 --batch-size 4 --workers 0 --width 8 --device cpu --precision fp32"
TINY = FLAGS.split()


@contextmanager
def started(code: str, *words, **options):
    """Python code in a process of its own, with the scripts at hand; it ends with the block."""
    before = f"import sys, signal; sys.path.insert(0, {str(HERE)!r}); "
    before += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # nohup and some CI ignore it
    options = {"env": {**os.environ, "OMP_NUM_THREADS": "1"}, "text": True, **options}
    command = [sys.executable, "-c", before + code, *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def call(module, *words, pictures=False) -> subprocess.CompletedProcess:
    """A script as a user calls it, but in this process and without drawing, which saves seconds."""
    out, err, status = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        if not pictures:
            for name in ("plot_curves", "plot_confusion", "plot_grid"):
                patch.setattr(utils, name, lambda *_: Figure())
            patch.setattr(utils, "save_figure", lambda _, path, needed=True: utils.write(path, b"-"))
        try:
            utils.run(lambda: module.main([*map(str, words)]))
        except SystemExit as stop:
            status = stop.code
            if isinstance(status, str):  # as Python itself does
                err.write(f"{status}\n")
                status = 1
    out.seek(0)
    return subprocess.CompletedProcess(words, status, out.read(), err.getvalue())


def succeed(module, *words, pictures=False) -> str:
    """What the script prints."""
    done = call(module, *words, pictures=pictures)
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


@pytest.fixture(scope="session")
def finished(images, tmp_path_factory) -> Path:
    """The output folder of a run of two epochs on eight images per class."""
    output = tmp_path_factory.mktemp("finished")
    (output / "log").write_text(succeed(train, "--data", images, "--output", output, *TINY))
    return output


def random_split(count: int) -> data.Split:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return data.Split(pixels, rng.integers(0, 10, count), [str(i) for i in range(10)], "random")


# ---------------------------------------- model.py
def test_network_is_the_known_resnet18(capsys):
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
    runpy.run_path(str(HERE / "model.py"), run_name="__main__")
    table = capsys.readouterr().out
    assert table.startswith("ResNet18\n") and "11,173,962" in table and "512 x 4 x 4" in table


def test_layer_norm_normalises_each_image_and_standardises_the_filters():
    model = ResNet18(7, norm="layer", width=8)
    x = torch.randn(3, 8, 8, 8) * torch.tensor([1.0, 5.0, 9.0]).view(3, 1, 1, 1)
    variance = x.var((1, 2, 3), keepdim=True, correction=0)
    by_hand = (x - x.mean((1, 2, 3), keepdim=True)) / (variance + 1e-5).sqrt()
    torch.testing.assert_close(model.feature.stem[1](x), by_hand)
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(model(images)[:1], model(images[:1]), atol=1e-5, rtol=1e-4)  # each for itself
    convolutions, logits = [m for m in model.modules() if isinstance(m, nn.Conv2d)], model(images)
    assert len(convolutions) == 20  # the stem, two in each of eight blocks, three projections
    for convolution in convolutions:
        (trained,) = convolution.parameters()
        filters = trained.detach().flatten(1)
        by_hand = (filters - filters.mean(1, keepdim=True)) / filters.std(1, keepdim=True, correction=0)
        torch.testing.assert_close(convolution.weight.flatten(1), by_hand, atol=1e-3, rtol=1e-3)
        with torch.no_grad():  # neither the scale nor the mean of a filter matters
            trained.mul_(torch.rand(len(trained), 1, 1, 1) + 0.5).add_(0.1)
    torch.testing.assert_close(model(images), logits, atol=1e-3, rtol=1e-3)


# ---------------------------------------- data.py
def batches(split, batch_size=16, seed=3, workers=0, epochs=(1,), mean=MEAN, without=()) -> list:
    """All batches of the epochs: pairs of images and labels."""
    techniques, found = data.augmentations(mean, without), []
    loader = data.train_loader(split, techniques, batch_size, seed, workers, CPU)
    for loader.sampler.epoch in epochs:
        found += [(images.clone(), labels.clone()) for images, labels in loader]
    return found


def same(a: list, b: list) -> bool:
    return all(torch.equal(x, y) and torch.equal(s, t) for (x, s), (y, t) in zip(a, b, strict=True))


def test_batches_depend_on_seed_epoch_and_number_and_hold_each_image_once_with_its_label():
    split = random_split(100)
    first, second = batches(split, epochs=[1]), batches(split, epochs=[2])
    assert [len(labels) for _, labels in first] == [16] * 6 + [4]
    for workers in (1, 2):
        assert same(batches(split, workers=workers, epochs=[1, 2]), first + second)
        assert same(batches(split, workers=workers, epochs=[2]), second)  # as after a resume
    assert not same(first, second)
    assert not same(first, batches(split, seed=4))
    split.images[:] = (
        np.arange(100, dtype=np.uint8)[:, None, None, None] + 100
    )  # augmentation keeps a flat image
    seen = batches(split, mean=[1.0, 1.0, 1.0])
    values = torch.cat([images.amin((1, 2, 3)) for images, _ in seen]).long() - 100
    assert values.sort().values.tolist() == list(range(100)) != values.tolist()
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
    turn = (red.max(1) - red.min(1)).max(1)  # four levels for each pixel that a side is moved
    return {**draws, "corner": corner, "area": cut.sum((1, 2)), "pictures": pictures, "turn": turn}


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
    assert set(draws["area"]) == {0, data.CUTOUT_SIZE**2} and 10 < draws["turn"].max() < 14  # 5 degrees
    plain = draws["pictures"][~draws["flip"] & ~draws["rotate"] & ~draws["cutout"]]
    for axis in (0, 1):  # of a probability of 1e-4
        assert chi_square(draws["corner"][draws["cutout"]][:, axis], 17) < 45
        offsets = (plain[:, 16, 16, axis] - 60) // 4 - 16  # the middle pixel tells that of the crop
        assert chi_square(offsets + 4, 9) < 32
    pictures = draws["pictures"][:200].reshape(200, -1)
    assert len(np.unique(pictures, axis=0)) > 150  # the images of a batch differ


def test_split_is_stratified_disjoint_and_from_the_seed():
    labels = np.random.default_rng(0).permutation(np.arange(5000) % 10)
    pixels = np.arange(5000, dtype=np.int64)[:, None, None, None]  # an image is its number
    split = data.Split(pixels, labels, [], "")
    for limit, count in ((None, 5000), (1000, 1000)):
        training, validation = data.split_validation(split, 0.1, limit, 0)
        assert np.bincount(validation.labels).tolist() == [count / 100] * 10
        assert np.bincount(training.labels).tolist() == [9 * count / 100] * 10
        assert len({*training.images.flat, *validation.images.flat}) == count
        assert (labels[training.images.flat] == training.labels).all()
    again, other = (data.split_validation(split, 0.1, 1000, seed)[1].images for seed in (0, 1))
    assert (again == validation.images).all() and (other != validation.images).any()
    with pytest.raises(utils.RunError, match="0.1 of 3 images leaves nothing"):
        data.split_validation(split, 0.1, 3, 0)


def lay_out(folder: Path, files: str) -> Path:
    """Make these images and, where a name has no dot, folders."""
    for path in [folder / name for name in files.split(" ")]:
        (path.parent if "." in path.name else path).mkdir(parents=True, exist_ok=True)
        if "." in path.name:
            Image.new("L", (70, 40), 50 + len(path.name)).save(path, "png")
    return folder


def test_images_directly_in_class_folders_are_read_in_order_and_others_are_counted(tmp_path, capsys):
    folder, accents = tmp_path / "with .dots", ("cafe\u0301", "caf\u00e9")  # on a Mac, and elsewhere
    lay_out(folder, f"Train/a/1.png Train/{accents[0]}/1.png validation/a/1.png")
    lay_out(folder / "test/a", "10.gif 2.JPG .git/0.png .DS_Store B.HEIC b.heic more/1/2.png ../.git/0.png")
    lay_out(folder / "test" / accents[1], "1.png c.jfif notes.txt")
    if os.name == "posix":
        (folder / "test/a/loop").symlink_to("..")
    train_split, test = (data.load_split(str(folder), split) for split in ("train", "test"))
    out = capsys.readouterr().out
    assert out.startswith(f"{folder}: train and test are used, not validation\n") and out.count("\n") == 2
    assert re.search(r"test: not read are 2 .heic, \d+ in folders inside a class, 1 .txt\n", out)
    assert train_split.classes == test.classes == ["a", accents[1]] and test.name == "with .dots"
    assert test.files == ["a/10.gif", "a/2.JPG", f"{accents[1]}/1.png", f"{accents[1]}/c.jfif"]
    assert test.labels.tolist() == [0, 0, 1, 1] and test.labels.dtype == np.int64
    assert test.images.shape == (4, 32, 32, 3) and test.images.dtype == np.uint8
    assert data.channel_statistics(test.images[:1])[1] == [1 / 255] * 3  # it will divide by no zero
    assert test.images[:, 0, 0].tolist() == [[50 + length] * 3 for length in (6, 5, 5, 6)]


def test_folders_that_are_no_data_set_are_named_and_left_alone(tmp_path):
    cases = {  # what lies there: words of the message
        "train/cat/1.png train/dog test/cat/1.png": "train/<class>/* must be images: none of dog",
        "train test/cat/1.png": "train/<class>/* must be images: none of any class",
        "train/cat/1.png test/cat/1.png test/dog/1.png": "must have the same classes, not so 'dog'",
        "train/cat/1.png test/cat\xa0/1.png": r"not so 'cat', 'cat\xa0'",  # a space that does not break
        "train/cat/1.png val/cat/1.png": "train, val: expected train/<class>/* and test/<class>/*",
        "": "expected train/<class>/* and test/<class>/*, or CIFAR-10",
    }
    for number, (files, words) in enumerate(cases.items()):
        folder = lay_out(tmp_path / f"images{number}", files)
        before = sorted(tmp_path.rglob("*"))
        done = call(train, "--data", folder, "--output", tmp_path / "output", *TINY)
        assert_one_line_error(done, 1, str(folder), words)
        assert len(done.stderr.splitlines()) == 1 and sorted(tmp_path.rglob("*")) == before


def test_images_of_any_kind_are_read_upright_and_as_rgb_and_bad_ones_are_named(tmp_path):
    pixels, path, bad = random_split(1).images[0], tmp_path / "photo", [b"", b"no image"]
    colour, grey = Image.fromarray(pixels), Image.fromarray(pixels[..., 0])
    turned, clear = colour.transpose(Image.Transpose.ROTATE_90), np.dstack([pixels, pixels[..., :1]])
    # Orientation 6: the camera was turned. XResolution: the signed rational -1 / 0, as some programs write.
    tags = (b"Exif\0\0MM", 42, 8, 2, 0x0112, 3, 1, 6, 0, 0x011A, 10, 1, 38, 0, -1, 0)
    exif = struct.pack(">8sHIH HHIHH HHII Iii", *tags)
    for image, expected, kind, options in (
        (grey, pixels[..., :1], "gif", {"transparency": 3}),
        (grey.convert("P"), pixels[..., :1], "png", {"transparency": bytes(range(256))}),
        (turned, pixels, "jpeg", {"exif": exif, "quality": 100, "subsampling": 0}),
        (colour, pixels, "png", {"save_all": True, "append_images": [turned, colour]}),
        (Image.fromarray(clear), pixels, "png", {}),
    ):
        image.save(path, kind, **options)
        difference = abs(data.read_image(path).astype(int) - expected).max()
        assert difference <= (8 if kind == "jpeg" else 0), (image.mode, kind)
    good = path.read_bytes()
    bad += [good[:60], good[:300] + bytes([good[300] ^ 255]) + good[301:]]
    for kind in (np.uint16, np.int32, np.float32):  # more than 8 bits: all above 255 would be white
        Image.fromarray(np.full((32, 32), 1000, kind)).save(path, "tiff")
        bad.append(path.read_bytes())
    for content in bad:
        path.write_bytes(content)
        with pytest.raises(utils.RunError, match="photo cannot be read as an image: repair or remove it"):
            data.read_image(path)


class Server(http.server.SimpleHTTPRequestHandler):
    """It serves the files of a folder; before any called silent it is silent for seconds."""

    asked = []

    def send_head(self):
        self.asked.append(self.path)
        time.sleep(5 if "silent" in self.path else 0)
        return super().send_head()


@pytest.fixture
def small_cifar10(monkeypatch, tmp_path):
    """A CIFAR-10 of 20 and 10 images, a server that has its archive, whole and corrupt."""
    served, names, labels = tmp_path / "served", ("first", "second", "test", "meta"), list(range(10))
    batch = {"data": np.zeros((10, 3072), np.uint8), "labels": labels, "label_names": list("abcdefghij")}
    (served / "cifar-10-batches-py").mkdir(parents=True)
    for name in names:
        (served / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(batch))
    archive = Path(shutil.make_archive(served / "whole", "gztar", served, "cifar-10-batches-py")).read_bytes()
    (served / "silent.tar.gz").write_bytes(archive)
    (served / "corrupt.tar.gz").write_bytes(archive[:-1] + b"?")
    inside, whole = (hashlib.md5(content).hexdigest() for content in (pickle.dumps(batch), archive))
    lists = [[name, inside] for name in names]
    cifar10 = {"train_list": lists[:2], "test_list": lists[2:3], "tgz_md5": whole, "url": ""}
    cifar10["meta"] = {"filename": "meta", "key": "label_names", "md5": inside}
    for attribute, value in cifar10.items():
        monkeypatch.setattr(data.CIFAR10, attribute, value)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Server, "asked", [])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, directory=served)) as server:
        threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
        monkeypatch.setattr(data, "CIFAR10_URLS", [f"http://127.0.0.1:{server.server_port}/whole.tar.gz"])
        yield archive
        server.shutdown()


def test_a_download_goes_on_to_the_address_that_delivers(small_cifar10, monkeypatch, capsys):
    """Into data/, though MNIST is there, and by its full path, too."""
    (good,), folder = data.CIFAR10_URLS, lay_out(Path("data"), "MNIST/raw/1.png")
    bad = [good.replace("whole", kind) for kind in ("silent", "corrupt", "missing")] + ["http:nonsense"]
    monkeypatch.setattr(data, "SILENCE_LIMIT", 0.3)
    monkeypatch.setattr(data, "CIFAR10_URLS", bad)
    with pytest.raises(utils.RunError, match=r"cifar-10-python.tar.gz into data, .*--data demo"):
        data.load_split("data", "train")
    assert capsys.readouterr().out.count("no CIFAR-10 from ") == len(bad) == 4
    bad.append(good)  # and over what the corrupt one has left
    split = data.load_split(str(folder.resolve()), "train")
    assert len(split.labels) == 20 and split.labels.dtype == np.int64 and split.name == "CIFAR-10"
    assert socket.getdefaulttimeout() is None
    Server.asked.clear()
    assert data.load_split("data", "test").classes[2] == "c" and not Server.asked


def test_elsewhere_an_archive_is_unpacked_and_nothing_is_downloaded(small_cifar10, monkeypatch):
    archive = lay_out(Path("theirs"), "more") / "cifar-10-python.tar.gz"
    archive.write_bytes(small_cifar10[:-5])
    with pytest.raises(utils.RunError, match="cifar-10-python.tar.gz into theirs"):
        data.load_split("theirs", "train")
    assert archive.read_bytes() == small_cifar10[:-5]
    archive.write_bytes(small_cifar10)
    assert data.load_split("theirs", "test").classes[2] == "c"
    Path("theirs/cifar-10-batches-py/test").write_bytes(b"damaged")
    assert len(data.load_split("theirs", "test").images) == 10  # unpacked again
    archive.unlink()
    assert len(data.load_split("theirs/cifar-10-batches-py", "train").labels) == 20  # the inner one will do
    monkeypatch.chdir("theirs/cifar-10-batches-py")
    assert len(data.load_split(".", "test").labels) == 10 and not Server.asked


# ---------------------------------------- utils.py
def test_device_precision_memory_and_workers_follow_the_hardware(monkeypatch):
    patch, cuda, mps = monkeypatch.setattr, torch.device("cuda"), torch.device("mps")
    private = {"amx_bf16": "_is_amx_tile_supported", "avx512_bf16": "_is_avx512_bf16_supported"}
    for has in ("amx_bf16", "avx512_bf16", "avx512_f"):
        expected = torch.bfloat16 if has in private else torch.float32
        patch(torch.cpu, "get_capabilities", lambda has=has: {has: True}, raising=False)
        assert utils.choose_precision("auto", CPU) is expected
        assert utils.choose_precision("auto", mps) is torch.float32
        monkeypatch.delattr(torch.cpu, "get_capabilities")  # an older PyTorch
        for name, function in private.items():
            patch(torch.cpu, function, partial(bool, name == has), raising=False)
        assert utils.choose_precision("auto", CPU) is expected
    patch(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)  # a T4
    assert utils.choose_precision("auto", cuda) is torch.float16
    patch(torch.cuda, "is_available", lambda: False)
    patch(torch.backends.mps, "is_available", lambda: True)
    assert utils.choose_device("auto") == mps
    for device, cores, expected in ((cuda, 2, 2), (cuda, 40, 4), (CPU, 40, 1), (mps, 40, 1)):
        patch(torch, "get_num_threads", partial(int, cores))
        loader = data.train_loader(random_split(8), {}, 4, 0, None, device)
        assert loader.num_workers == expected and loader.pin_memory == (device == cuda)
    assert utils.memory_format(mps) is torch.contiguous_format
    assert utils.memory_format(cuda) is utils.memory_format(CPU) is torch.channels_last
    patch(torch, "autocast", None)
    utils.autocast(mps, torch.float32)  # is not even entered, as one that is off still warns there


def test_in_fp16_a_first_step_that_overflows_is_skipped_without_a_warning():
    training = train.Training(train.get_parser().parse_args(["--width", "8"]), 2, CPU, fp16=True)
    weights, seen, factors = training.model.classifier[2].weight, [], iter((1e30, 1.0))
    batch = torch.from_numpy(random_split(4).images), torch.tensor([0, 1, 0, 1])

    def criterion(logits, labels):
        seen.append(weights.detach().clone())
        return nn.functional.cross_entropy(logits, labels) * next(factors)

    train.train_one_epoch(training, [batch] * 2, data.Normalize(MEAN, STD), criterion, torch.float16)
    assert torch.equal(*seen) and not torch.equal(seen[0], weights) and weights.isfinite().all()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    patch, replace, file = monkeypatch.setattr, os.replace, tmp_path / "file"
    patch(os, "fsync", Mock(side_effect=OSError))  # a drive without it will do
    utils.write(file, b"old")
    patch(os, "replace", Mock(side_effect=PermissionError(13, "it is open")))  # as to a virus scanner
    utils.write(file, b"new", needed=False)
    assert f"{file} cannot be written (it is open): the run goes on without it" in capsys.readouterr().out
    patch(time, "sleep", lambda _: None)
    with pytest.raises(utils.RunError, match="file cannot be written .it is open.: free some space"):
        utils.write(file, b"new")
    patch(time, "sleep", lambda seconds: seconds > 2 and patch(os, "replace", replace))  # then it lets go
    assert file.read_bytes() == b"old" and not utils.write(file, b"new") and file.read_bytes() == b"new"


class Malicious(str):  # the path of a folder that is made when this is unpickled
    def __reduce__(self):
        return os.mkdir, (str(self),)


def test_bad_checkpoints_are_refused_and_run_no_code(finished, tmp_path):
    good, rng = (finished / "checkpoint.pt").read_bytes(), np.random.default_rng(0)
    bad, malicious = tmp_path / "bad.pt", {"model": Malicious(tmp_path / "code has run")}
    cases = [b"", b"text", good[: len(good) // 2], good[:-1], pickle.dumps(malicious)]
    for position in rng.integers(1000, len(good) - 20_000, 5):  # inside the tensors
        cases.append(good[:position] + bytes([good[position] ^ 64]) + good[position + 1 :])
    for state in (malicious, {"epoch": 1}, [1, 2]):
        torch.save(state, bad)
        cases.append(bad.read_bytes())
    for case in cases:
        bad.write_bytes(case)
        with pytest.raises(utils.RunError, match=r"bad.pt is damaged or of another kind .*: do something"):
            utils.load_checkpoint(bad, ("model",), "do something")
    assert list(tmp_path.iterdir()) == [bad]


def test_pictures_are_drawn_in_one_style_whatever_the_user_has_set(tmp_path):
    row = dict.fromkeys(("epoch", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy"), 0.5)
    maps, names = [None, np.linspace(0, 1, 1024).reshape(32, 32)], ["with $x_$, no formula", "dog"]

    def drawn(path: Path) -> list[bytes]:
        grid = utils.plot_grid(random_split(2).images, names, 2, "heading", maps)
        confusion = utils.plot_confusion(torch.tensor([[3, 1], [0, 4]]), names, "title")
        figures = grid, confusion, utils.plot_curves([row, row], "title")
        return [utils.save_figure(figure, path) or path.read_bytes() for figure in figures]

    plain = drawn(tmp_path / "picture.png")
    users = {"text.usetex": True, "font.sans-serif": ["none"], "savefig.dpi": 30}
    with matplotlib.style.context(["dark_background", users]):
        assert drawn(tmp_path / "picture.png") == plain and matplotlib.rcParams["savefig.dpi"] == 30


def test_a_notebook_trains_explains_and_shows_the_pictures(images, tmp_path):
    pytest.importorskip("ipykernel")
    start_kernel = pytest.importorskip("jupyter_client.manager").start_new_kernel
    kernel, client = start_kernel(cwd=HERE, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def cell(code: str) -> tuple[str, int]:
        texts, pictures = [], []

        def see(message: dict) -> None:
            content = message["content"]
            texts.extend([content.get("text", ""), *content.get("traceback", [])])
            pictures.extend(kind for kind in content.get("data", {}) if kind == "image/png")

        client.execute_interactive(code, output_hook=see, allow_stdin=False, timeout=60)
        return "".join(texts), len(pictures)

    flags = f"--data {images} --output {tmp_path} {FLAGS} --epochs 1"
    try:
        assert "--epochs" in cell("%run train.py --help")[0]
        # A second run, with workers as on Windows and macOS.
        cell("import torch.multiprocessing as mp; mp.set_start_method('spawn', force=True)")
        text, pictures = cell(f"%run train.py {flags} --workers 1")
        assert "test accuracy" in text and "\r" in text and pictures == 2, text
        text, pictures = cell(f"%run gradcam.py --n 1 --checkpoint {tmp_path}/checkpoint.pt")
        assert "of 16 test images are misclassified" in text and pictures == 2, text
        assert "error: " in cell("%run train.py --resume --output none")[0]
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)


# ---------------------------------------- train.py
DEFAULTS = "--epochs 40 --batch-size 128 --lr 0.1 --weight-decay 0.0005 --factor 0.3 --patience 1 --width 64"
DEFAULTS += " --label-smoothing 0.1 --val-split 0.1 --norm batch --seed 0 "
# In this run the warm-up ends in the second epoch, the plateau cuts and the best epoch is not the last one.
STORY = "--epochs 8 --batch-size 24 --lr 0.06 --weight-decay 0.002 --factor 0.5 --patience 0 --limit 200 "
STORY += "--label-smoothing 0.2 --val-split 0.2 --width 8 --seed 1 --without cutout"
ROW = ["epoch", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy"]


def loaded(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def told_again(root, warmup: int, threshold: float, flags: str) -> tuple[list, int, dict, np.ndarray]:
    """What train.py computes, in one plain loop: history, best epoch, its weights, confusion matrix."""
    s = train.get_parser().parse_args((DEFAULTS + flags).split())
    everything, test = (data.load_split(str(root), split) for split in ("train", "test"))
    mean, std = (everything.images / 255).mean((0, 1, 2)), (everything.images / 255).std((0, 1, 2))
    training, validation = data.split_validation(everything, s.val_split, s.limit, s.seed)
    loader = data.train_loader(training, data.augmentations(mean, s.without), s.batch_size, s.seed, 0, CPU)
    torch.manual_seed(s.seed)
    model = ResNet18(len(test.classes), s.norm, s.width).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0, 0.9, weight_decay=s.weight_decay, nesterov=True)
    criterion = nn.CrossEntropyLoss(label_smoothing=s.label_smoothing)

    def ask(network, images: torch.Tensor) -> torch.Tensor:
        return network(((images / 255 - torch.Tensor(mean)) / torch.Tensor(std)).permute(0, 3, 1, 2))

    @torch.no_grad()
    def judge(weights: dict, split) -> tuple[float, float, torch.Tensor]:
        network, labels = copy.deepcopy(model).eval(), torch.from_numpy(split.labels)
        network.load_state_dict(weights)
        logits = ask(network, torch.from_numpy(split.images))
        said = logits.argmax(1)
        return criterion(logits, labels).item(), (said == labels).double().mean().item(), said

    averaged, top, step, lowest, waited = copy.deepcopy(model.state_dict()), s.lr, 0, math.inf, 0
    history, kept, rates = [], [], [top / warmup]
    for epoch in range(1, s.epochs + 1):
        loader.sampler.epoch, seen = epoch, []
        model.train()
        for images, labels in loader:
            optimizer.param_groups[0]["lr"] = rates[-1]
            logits = ask(model, images)
            loss = criterion(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            rates.append(top * min(1, (1 + (warmup - 1) * step / warmup) / warmup))
            for name, weights in model.state_dict().items():
                if weights.is_floating_point():
                    averaged[name] = averaged[name] + (weights - averaged[name]) / len(loader)
            seen.append([loss.item() * len(labels), (logits.argmax(1) == labels).sum().item()])
        if epoch == 1:  # the random weights of the start are no part of it
            averaged = copy.deepcopy(model.state_dict())
        kept.append(copy.deepcopy(averaged))
        val_loss, val_accuracy, _ = judge(averaged, validation)
        history.append([epoch, rates[-1], *np.sum(seen, 0) / len(training.labels), val_loss, val_accuracy])
        if step >= warmup:
            waited = 0 if val_loss < lowest * (1 - threshold) else waited + 1
            lowest = lowest if waited else val_loss
            if waited > s.patience:
                top, waited = max(top * s.factor, s.lr / 1000), 0
                rates.append(top)
    highest = max(row[-1] for row in history)
    best = min((loss, epoch) for epoch, *_, loss, accuracy in history if accuracy == highest)[1]
    confusion = np.zeros((len(test.classes), len(test.classes)), int)
    np.add.at(confusion, (test.labels, judge(kept[best - 1], test)[2]), 1)
    return history, best, kept[best - 1], confusion


def assert_told_again(output: Path, log: str, *run) -> None:
    history, best, kept, confusion = told_again(*run)
    c, lines = loaded(output / "checkpoint.pt"), log.split("left\n")[1].splitlines()
    for expected, row, after in zip(history, c["history"], [*history[1:], history[-1]], strict=True):
        assert [row[name] for name in ROW] == pytest.approx(expected, rel=1e-3), row
        words, cut = lines.pop(0).split(), f"is cut from {expected[1]:.3g} to {after[1]:.3g}"
        assert words[0] == f"{row['epoch']}/{len(history)}" and ("best" in words or row["epoch"] != best)
        assert [float(word) for word in words[1:6]] == pytest.approx(expected[1:], rel=5e-3, abs=1e-4)
        assert after[1] >= expected[1] or cut in lines.pop(0)
    in_file = csv.DictReader((output / "history.csv").read_text().splitlines())
    assert [{name: float(value) for name, value in row.items()} for row in in_file] == c["history"]
    assert c["epoch"] == best and c["val_accuracy"] == history[best - 1][-1]
    for name in [name for name, weights in kept.items() if weights.is_floating_point()]:
        torch.testing.assert_close(c["model"][name], kept[name], rtol=1e-2, atol=1e-3)
    accuracy, shares = confusion.trace() / confusion.sum(), confusion.diagonal() / confusion.sum(1)
    assert c["confusion"] == confusion.tolist() and c["test_accuracy"] == pytest.approx(accuracy)
    assert f"test accuracy {accuracy:.2%}, with the weights of epoch {best}" in log
    for name, share in zip(c["classes"], shares, strict=True):
        assert re.search(rf"^ +{name} +{share:.2%}$", log, re.M)


@pytest.fixture(scope="session")
def story(tmp_path_factory) -> Path:
    """The output folder of a run on the demo with a setting of its own for everything."""
    output, words = tmp_path_factory.mktemp("story"), "--data demo --workers 0 --device cpu --precision fp32"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "WARMUP_STEPS", 8)
        patch.setattr(train, "PLATEAU_THRESHOLD", 0.1)
        log = succeed(train, *words.split(), *STORY.split(), "--output", output)
    (output / "log").write_text(log)
    return output


def test_a_run_is_what_a_plain_loop_computes(story):
    assert_told_again(story, (story / "log").read_text(), "demo", 8, 0.1, STORY)
    c = loaded(story / "checkpoint.pt")
    assert c["epoch"] < 8 and utils.find_cuts(c["history"])  # else this would not see what it is for


def assert_same_run(*folders: Path) -> None:
    states, kept = ([loaded(folder / name) for folder in folders] for name in ("last.pt", "checkpoint.pt"))
    whole, other = (state["training"] for state in states)
    for part in ("model", "averaged"):
        assert all(torch.equal(value, other[part][name]) for name, value in whole[part].items()), part
    assert all(whole[part] == other[part] for part in ("plateau", "warmup", "scaler"))
    momenta = [training["optimizer"]["state"].values() for training in (whole, other)]
    assert all(torch.equal(a["momentum_buffer"], b["momentum_buffer"]) for a, b in zip(*momenta, strict=True))
    rows = [[[row[name] for name in ROW] for row in state["history"]] for state in states]
    assert rows[0] == rows[1]
    for key in ("epoch", "val_accuracy", "test_accuracy", "confusion"):
        assert kept[0][key] == kept[1][key]
    assert all(torch.equal(value, kept[1]["model"][name]) for name, value in kept[0]["model"].items())
    lines = [len((folder / "history.csv").read_text().splitlines()) for folder in folders]
    assert lines == 2 * [len(rows[0]) + 1]
    names = [{file.name for file in folder.iterdir()} - {"log"} for folder in folders]
    assert names[0] == names[1]


def test_a_prolonged_run_is_what_a_plain_loop_computes(images, tmp_path, monkeypatch):
    """An epoch has four steps. No progress is ever enough, so the plateau cuts the rate down to its floor."""
    monkeypatch.setattr(train, "WARMUP_STEPS", 6)
    monkeypatch.setattr(train, "PLATEAU_THRESHOLD", 0.99)
    given, (whole, resumed) = "--norm layer --factor 0.02 --seed 3 --epochs", (tmp_path / "w", tmp_path / "r")
    flags = ("--data", images, *TINY, *given.split())
    log = succeed(train, *flags, 7, "--output", whole)
    assert_told_again(whole, log, images, 6, 0.99, f"--batch-size 4 --width 8 {given} 7")
    rates = [row["lr"] for row in loaded(whole / "last.pt")["history"]]
    np.testing.assert_allclose(rates[1:], [0.1, 0.1, 0.1, 0.002, 0.002, 0.0001])
    succeed(train, *flags, 3, "--output", resumed)
    for epochs in (5, 7):  # within the patience, and after it
        succeed(train, "--resume", "--epochs", epochs, "--output", resumed)
    assert_same_run(whole, resumed)


def test_resume_is_bit_identical_whatever_becomes_of_last_pt(finished, images, tmp_path, monkeypatch):
    log, last = (finished / "log").read_text(), tmp_path / "last.pt"
    for words in ("14 training, 2 validation, 16 test", "Only 8 steps: the learning rate rises for 200"):
        assert words in log
    assert f'--resume --output "{finished}"' in log and f'--checkpoint "{finished / "checkpoint.pt"}"' in log
    first, again = ("--data", images, *TINY, "--epochs", 1), ("--resume", "--epochs", 2, "--workers", 1)
    touch, delete = (lambda *_: os.utime(last, (1, 1))), (lambda *_: last.unlink())  # while the run goes on
    for flags, meanwhile in ((first, touch), (again, delete), (again, touch)):  # the last of a finished run
        monkeypatch.setattr(train, "print_header", meanwhile)
        succeed(train, "--output", tmp_path, *flags)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 3)  # from now on another machine
        assert flags is first or not assert_same_run(finished, tmp_path)
    c, command = loaded(tmp_path / "checkpoint.pt"), f"python train.py --output {tmp_path}"
    commands = [f"{command} --data {images} {FLAGS} --epochs 1"]
    assert c["commands"] == commands + 2 * [f"{command} --resume --epochs 2 --workers 1"]
    assert c["facts"]["hardware"] == "cpu (threads: 1), float32, then cpu (threads: 3), float32"


TRAIN = """import os, train, utils
train.SAVE_SECONDS = -1  # saves after every epoch
utils.save_figure = lambda figure, path, needed=True: utils.write(path, b"picture")
"""


@needs_signals
def test_a_run_killed_between_two_writes_goes_on_as_if_it_had_not_been(finished, images, tmp_path):
    code = TRAIN + "replace, done = os.replace, []\ndef count(*paths):\n    done.append(paths)\n"
    code += "    if len(done) > 9: os.kill(os.getpid(), signal.SIGKILL)\n    replace(*paths)\n"
    flags = ("--data", images, "--output", tmp_path, *TINY)
    with started(f"{code}os.replace = count; utils.run(train.main)", *flags) as process:
        process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL and (tmp_path / "last.pt.tmp").exists()
    log = succeed(gradcam, "--checkpoint", tmp_path / "checkpoint.pt", "--output", tmp_path / "shown")
    assert "test images are misclassified" in log and "report.md" not in log  # there was no test yet
    shutil.rmtree(tmp_path / "shown")
    succeed(train, "--output", tmp_path, "--resume")
    assert_same_run(finished, tmp_path)


@needs_signals
def test_ctrl_c_ends_with_one_line_leaves_no_process_and_the_run_can_go_on(images, tmp_path):
    flags = ("--data", images, "--output", tmp_path, *TINY, "--epochs", 5000, "--workers", 1)
    with started(f"{TRAIN}utils.run(train.main)", *flags, start_new_session=True) as process:
        while "2/5000" not in process.stdout.readline():
            assert process.poll() is None, process.stderr.read()
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes of the group
        _, err = process.communicate(timeout=60)  # until no worker holds the output open
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
    assert process.returncode == 1 and err.strip() == "stopped"
    epochs = len(loaded(tmp_path / "last.pt")["history"])
    log = succeed(train, "--output", tmp_path, "--resume", "--epochs", epochs)  # only the test is left
    assert "test accuracy" in log and f"{epochs}/{epochs}" not in log


def test_resume_refuses_what_would_change_the_run(finished, images, tmp_path):
    before, resume = (finished / "last.pt").read_bytes(), ("--output", finished, "--resume")
    changes = "--lr 0.2, --batch-size 128, --norm layer, --width 64, --seed 1, --limit 5, --without flip, "
    for change in (changes + "--val-split 0.2, --patience 2, --factor 0.5, --label-smoothing 0").split(", "):
        assert_one_line_error(call(train, *resume, *change.split()), 2, change.split()[0], "leave it out")
    renamed = shutil.copytree(images, tmp_path / "renamed")
    for path in sorted(renamed.glob("train/*/*.png")):  # 0 to 7 become 17 to 10
        path.rename(path.with_name(f"{17 - int(path.stem)}.png"))
    for root in ("demo", renamed):
        done = call(train, *resume, "--data", root)
        assert_one_line_error(done, 1, "--data: not the images of the run, or not in the same order")
    assert (finished / "last.pt").read_bytes() == before


def test_a_folder_that_holds_a_run_is_refused_and_overwritten_only_when_told(finished, images, tmp_path):
    run, flags = tmp_path / "run", ("--data", images, "--output", tmp_path / "run", *TINY, "--epochs", 1)
    run.mkdir()
    for name in ("last.pt", "checkpoint.pt"):
        shutil.move(shutil.copy(finished / name, tmp_path), run)
        assert_one_line_error(call(train, *flags), 1, "holds a run", "--resume", "--overwrite", "--output")
        (run / name).unlink()
    shutil.copytree(finished, run, dirs_exist_ok=True)
    ours, old = utils.seal("text\n"), dict.fromkeys(("notes.txt", "last.pt.old", *train.GRADCAM_FILES), "old")
    for name, text in (old | {"report.md": ours + "My words.", "report-new.md": ours}).items():
        (run / name).write_text(text)
    before = {path: path.read_bytes() for path in run.iterdir()}
    assert call(train, *flags, "--data", tmp_path / "none", "--overwrite").returncode == 1
    assert call(train, *flags, "--limit", 2, "--val-split", 0.9, "--overwrite").returncode == 1
    assert {path: path.read_bytes() for path in run.iterdir()} == before
    succeed(train, *flags, "--overwrite")
    kept = {"log", "report.md", "notes.txt", "last.pt.old"}
    assert {path.name for path in run.iterdir()} == {*train.OUTPUT_FILES, *kept}
    assert (run / "report.md").read_text() == ours + "My words."


BAD_FLAGS = """--epochs 0, --epochs 1e30, --epoch 1, --batch-size x, --lr nan, --lr 0, --factor 1, --limit 1,
    --val-split 0, --width 0, --patience -1, --workers -1, --weight-decay 2, --label-smoothing 1, --norm x,
    --seed -1, --seed 4294967296, --device x, --without x"""
BAD_COMMANDS = """train --resume --overwrite: 2, not allowed with
    train --resume: 1, no file outputs/last.pt
    train --resume --output bad: 1, bad/last.pt is damaged, --overwrite, another --output
    train --device cuda: 1, --device cuda, --device cpu
    train --precision fp16 --device cpu: 1, choose auto
    train --data none: 1, none, expected train/<class>/*
    train --data=~/none: 1, home/none, expected train/<class>/*
    train --data demo --output=~/file/run --device cpu --width 8: 1, home/file
    gradcam --checkpoint=~/none.pt: 1, no file, home/none.pt
    gradcam --checkpoint good.pt --image ~/none.jpg ~$b.jpg: 1, home/none.jpg cannot be read
    gradcam --checkpoint good.pt --image ~$b.jpg: 1, ~$b.jpg cannot be read
    train --data {images} --output loss --lr 1e6 {flags}: 1, no longer a finite number, --lr
    gradcam: 1, no file outputs/checkpoint.pt, run train.py first
    gradcam --checkpoint bad/last.pt: 1, bad/last.pt is damaged, name the checkpoint.pt of a run
    gradcam --checkpoint good.pt --data demo: 1, demo, the classes cat, dog, --data
    gradcam --checkpoint good.pt --output bad: 1, bad holds another run, another --output
    gradcam --image {files}: 2, --image: 101 files are more than 100"""


def test_a_bad_command_is_one_line_that_says_what_to_do(finished, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # of ~, as the shell leaves it in --data=~/none
    Path("bad").mkdir()
    Path("home").mkdir()
    Path("home/file").touch()
    content = bytearray((finished / "last.pt").read_bytes())
    content[len(content) // 2] ^= 1  # a bit fell over
    Path("bad/last.pt").write_bytes(content)
    shutil.copy(finished / "checkpoint.pt", "good.pt")
    for module, flags in ((train, BAD_FLAGS), (gradcam, "--n 0, --n 101, --layer layer9, --seed -1, --nn 1")):
        for flag, value in [words.split() for words in flags.split(",")]:
            assert_one_line_error(call(module, flag, value), 2, flag)
        assert "default: " in succeed(module, "--help")
    commands = BAD_COMMANDS.format(images=images, flags=FLAGS, files=" ".join(101 * ["x.png"]))
    for command, expected in [line.split(": ", 1) for line in commands.splitlines()]:
        (script, *flags), (status, *words) = command.split(), expected.split(", ")
        done = call(train if script == "train" else gradcam, *flags)
        assert_one_line_error(done, int(status), *words)
    assert {path.name for path in tmp_path.iterdir()} == {"bad", "home", "good.pt", "loss"}
    assert sorted(os.listdir("loss")) == ["augmentations.png", "last.pt"]  # before the first epoch


# ---------------------------------------- gradcam.py
def textbook_gradcam(model: ResNet18, layer: str, images: torch.Tensor, labels) -> torch.Tensor:
    """Equations 1 and 2 of the paper, an image at a time, with the whole network differentiated."""
    maps = []
    for image, label in zip(images, labels, strict=True):
        x = image[None]
        for name, stage in model.feature.named_children():
            x = stage(x)
            if name == layer:
                kept = x
        (gradient,) = torch.autograd.grad(model.classifier(x)[0, label], kept)
        heat = sum(gradient[0, k].mean() * kept[0, k].detach() for k in range(kept.shape[1])).clamp(min=0)
        heat = heat / heat.max() if heat.max() > 0 else heat
        maps.append(nn.functional.interpolate(heat[None, None], (32, 32), mode="bilinear")[0, 0])
    return torch.stack(maps)


@pytest.fixture(scope="module")
def network() -> ResNet18:
    torch.manual_seed(0)
    model = ResNet18(width=16)
    model(torch.randn(32, 3, 32, 32))  # running statistics that are not those of the start
    return model.eval()


@pytest.mark.parametrize("layer", gradcam.LAYERS)
def test_heatmaps_equal_the_textbook_and_at_layer4_cam(network, layer):
    images, labels = torch.randn(4, 3, 32, 32).double(), torch.tensor([0, 3, 3, 9])
    network = copy.deepcopy(network).double()
    maps = gradcam.GradCAM(network, layer).heatmaps(images, labels)
    assert maps.shape == (4, 32, 32) and maps.min() >= 0 and maps.max() <= 1
    torch.testing.assert_close(maps, textbook_gradcam(network, layer, images, labels), atol=1e-5, rtol=0)
    # Zhou et al. 2016: before pooling and a linear layer it is the class weights times the activations.
    weights = network.classifier[2].weight[labels]
    cam = torch.einsum("nchw,nc->nhw", network.feature(images), weights).relu()[:, None]
    cam = torch.where(cam.amax((2, 3), keepdim=True) > 0, cam / cam.amax((2, 3), keepdim=True), 0)
    cam = nn.functional.interpolate(cam, (32, 32), mode="bilinear")[:, 0].detach()
    assert layer != "layer4" or torch.allclose(maps, cam, atol=1e-5)


def test_heatmaps_point_at_the_object_of_the_class():
    """The pointing game (Zhang et al. 2016): of two shapes side by side each must be found by its class."""
    demo, test, names = data.draw_demo("train"), data.draw_demo("test"), ("bars", "cross", "pillars", "ring")
    chosen = np.isin(demo.labels, [demo.classes.index(name) for name in names])
    normalize = data.Normalize(*data.channel_statistics(demo.images))
    images, labels = (torch.from_numpy(part[chosen][:400]) for part in (demo.images, demo.labels))
    torch.manual_seed(0)
    model = ResNet18(width=8).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, 0.9, nesterov=True)
    for batch in [batch for _ in range(4) for batch in torch.randperm(400).split(16)]:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(normalize(images[batch])), labels[batch]).backward()
        optimizer.step()
    shapes = demo.classes.index("bars"), demo.classes.index("pillars")
    bars, pillars = (test.images[test.labels == shape] for shape in shapes)
    pictures = normalize(torch.from_numpy(np.concatenate([bars, pillars], 2)))  # (50, 3, 32, 64)

    def share_found(model, layer) -> float:
        cam, found = gradcam.GradCAM(model, layer), []
        for shape, low in zip(shapes, (0, 32), strict=True):
            column = cam.heatmaps(pictures, torch.full((50,), shape)).flatten(1).argmax(1) % 64
            found.append((low <= column) & (column < low + 32))
        return torch.cat(found).float().mean().item()

    for layer in ("layer3", "layer4"):
        assert share_found(model, layer) > 0.9 and share_found(ResNet18(width=8), layer) < 0.75


def test_the_interface_of_the_course_leaves_the_network_as_it_was(network):
    network.feature.layer2.train()
    before, modes = copy.deepcopy(network.state_dict()), [module.training for module in network.modules()]
    cam, images, labels = gradcam.GradCAM(network, "layer3"), torch.randn(2, 3, 32, 32), torch.tensor([1, 9])
    assert cam.classes == 10 and cam.gradients is None and cam.heatmaps(images, labels).any()
    assert modes == [module.training for module in network.modules()]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    network.eval()
    logits = cam(images)
    logits[:, 4].sum().backward()
    assert cam.get_activations_gradient().shape == cam.get_activations(images).shape == (2, 64, 8, 8)
    torch.testing.assert_close(cam.classifier(cam.features_conv(images)), logits)
    torch.testing.assert_close(network(images), logits)
    with pytest.raises(ValueError, match="layer5"):
        gradcam.GradCAM(network, "layer5")


def test_the_example_of_the_readme_runs(finished, images, tmp_path, monkeypatch):
    code = re.search(r"```python\n(import torch.*?)```", (HERE / "README.md").read_text("utf-8"), re.S)[1]
    monkeypatch.chdir(tmp_path)
    shutil.copy(images / "test/cat/0.png", "photo.jpg")
    names = {}
    exec(code.replace("outputs/checkpoint.pt", str(finished / "checkpoint.pt")), names)
    assert names["heatmap"].shape == (32, 32) and 0.5 < names["heatmap"].max() <= 1


def drawn(*words) -> tuple[dict[str, Figure], str]:
    """The figures that gradcam.py saves, by the names of their files, and what it prints."""
    figures = {}

    def keep(figure, path, needed=True):
        figures[path.name] = figure
        utils.write(path, b"picture")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "save_figure", keep)
        return figures, succeed(gradcam, *words, pictures=True)


def tiles(figure: Figure, columns: int = 1) -> list[list[tuple]]:
    """Title, image and map (or 0) of each tile of a page, in groups of so many tiles."""
    found = []
    for axis in [axis for axis in figure.axes if axis.images]:
        image, *heat = [np.asarray(shown.get_array()) for shown in axis.images]
        found.append((axis.get_title(), image, heat[0][..., 3] / utils.HEAT_OPACITY if heat else 0))
    return [found[i : i + columns] for i in range(0, len(found), columns)]


class Network:
    def __init__(self, file: Path):
        self.model, c = gradcam.load_model(file)
        self.normal = lambda images: (images / 255 - np.array(c["mean"])) / np.array(c["std"])

    @torch.no_grad()
    def shares(self, normal: np.ndarray) -> np.ndarray:
        return self.model(torch.from_numpy(normal).float().permute(0, 3, 1, 2)).softmax(1).numpy()

    def map_of(self, image: np.ndarray, label: int, layer: str) -> np.ndarray:
        x = torch.from_numpy(self.normal(image)).float().permute(2, 0, 1)
        return textbook_gradcam(self.model, layer, x[None], [label])[0].numpy()

    def blurred(self, image: np.ndarray, marked: np.ndarray, label: int) -> float:
        """Probability of a class with that part of an image blurred: kernel 21, sigma 5, mirrored edges."""
        bell = np.exp(-(np.arange(-10, 11) ** 2) / (2 * 5**2))
        soft = np.pad(self.normal(image), ((10, 10), (10, 10), (0, 0)), "reflect")
        for axis in (0, 1):
            soft = np.apply_along_axis(np.convolve, axis, soft, bell / bell.sum(), "valid")
        return self.shares(np.where(marked[None, ..., None], soft, self.normal(image)))[0, label]

    def assert_explained(self, group: list[tuple], image: np.ndarray, labels, words, layer: str) -> None:
        """A picture, and its maps of the classes `labels`: each under those words and tested by blurring."""
        assert all((shown == image).all() for _, shown, _ in group)
        for (title, _, heat), label, word in zip(group[1:], labels, words, strict=True):
            expected, (said, note) = self.map_of(image, label, layer), title.split("\n", 1)
            np.testing.assert_allclose(heat, expected, atol=1e-3)
            after = 100 * self.blurred(image, expected >= 0.5, label)
            told = re.fullmatch(r"blurred there: (\d+)%|\(nothing speaks for it\)", note)[1]
            assert said == word and (told is not None) == expected.any()
            assert told is None or float(told) == pytest.approx(after, abs=1)


@pytest.fixture(scope="session")
def explained(story, tmp_path_factory) -> SimpleNamespace:
    """The folder of `story` after gradcam.py, its log and figures, and the network's answers by hand."""
    test, run = data.draw_demo("test"), shutil.copytree(story, tmp_path_factory.mktemp("explained") / "run")
    figures, log = drawn("--n", 7, "--checkpoint", run / "checkpoint.pt")
    network = Network(run / "checkpoint.pt")
    shares = network.shares(network.normal(test.images))
    answers = {"network": network, "shares": shares, "said": shares.argmax(1)}
    return SimpleNamespace(run=run, test=test, figures=figures, log=log, **answers)


@pytest.mark.parametrize("flags, layer", [("", "layer3"), ("--seed 5 --layer layer2", "layer2")])
def test_errors_are_shown_with_the_maps_of_what_was_said_and_what_is_true(explained, tmp_path, flags, layer):
    e, words = explained, ("--n", 7, "--checkpoint", explained.run / "checkpoint.pt", "--output", tmp_path)
    figures, log = drawn(*words, *flags.split()) if flags else (e.figures, e.log)
    assert drawn(*words, *flags.split())[1] == log or not flags  # the same ones, by the same seed
    plain, heated = tiles(figures["misclassified.png"]), tiles(figures["gradcam.png"], 3)
    shown = [int(np.flatnonzero((e.test.images == tile[1]).all((1, 2, 3)))[0]) for (tile,) in plain]
    wrong = sorted(np.flatnonzero(e.said != e.test.labels), key=lambda i: -e.shares[i].max())
    assert set(shown) <= set(wrong) and len(set(shown)) == 7 and (flags or shown == wrong[:7])
    order = "picked at random (seed 5)" if flags else "most confident first"
    assert f"{len(wrong)} of 500 test images are misclassified; 7 shown, {order}" in log
    lines = [line for line in log.splitlines() if line.startswith("test image ")]
    for i, line, (tile,), group in zip(shown, lines, plain, heated, strict=True):
        labels, name = (e.said[i], e.test.labels[i]), f"test image {i}"
        said, true = (e.test.classes[label] for label in labels)
        assert line.split()[2:7] == [str(i), "is", true, "said", said]
        assert f" {e.shares[i, labels[0]]:.1%}; blurred there " in line
        words = [f"said {said}, {e.shares[i, labels[0]]:.0%}", f"is {true}, {e.shares[i, labels[1]]:.0%}"]
        assert tile[0].split("\n") == [name, *words] and group[0][0] == name and not np.any(group[0][2])
        e.network.assert_explained(group, e.test.images[i], labels, words, layer)
    headings = [" ".join(figure.get_suptitle().split()) for figure in figures.values()]
    title = "ResNet18 of width 8 on demo, batch norm, without cutout, seed 1"
    assert all(title in heading for heading in headings) and f"Grad-CAM ({layer}): " in headings[1]
    assert "the line is at half of the full colour" in headings[1]


def test_the_blurring_of_all_maps_agrees_with_one_by_hand(explained, tmp_path):
    """Class 0 gets a fifth of all images, with weights that speak for nothing: zero maps do not count."""
    c, means, network = loaded(explained.run / "checkpoint.pt"), [], explained.network
    normal = torch.from_numpy(network.normal(explained.test.images)).float().permute(0, 3, 1, 2)
    bias = network.model(normal)[:, 1:].amax(1).quantile(0.2).item()
    c["model"]["classifier.2.weight"][0], c["model"]["classifier.2.bias"][0] = -1e-3, bias
    utils.save_checkpoint(c, tmp_path / "checkpoint.pt")
    file, network = tmp_path / "checkpoint.pt", Network(tmp_path / "checkpoint.pt")
    figures, log = drawn("--checkpoint", file, "--n", 16, "--seed", 0, "--layer", "layer4")
    for group in tiles(figures["gradcam.png"], 3):
        image = group[0][1]
        label = network.shares(network.normal(image[None]))[0].argmax()
        if (marked := network.map_of(image, label, "layer4") >= 0.5).any():
            parts = (np.zeros((32, 32), bool), marked, np.roll(marked, (16, 16), (0, 1)))
            means.append([network.blurred(image, part, label) for part in parts])
        assert (label == 0) == (group[1][0].endswith("(nothing speaks for it)")) == (not marked.any())
    assert 0 < len(means) < 16
    sentence = r"Blurring the marked parts takes the predicted class from (\d+)% to (\d+)% on average; "
    told = re.search(sentence + r"parts of the same form elsewhere, to (\d+)%\.", log).groups()
    assert [int(share) for share in told] == pytest.approx(100 * np.mean(means, 0), abs=0.7)


def test_own_pictures_are_explained_as_the_network_saw_them(explained, tmp_path):
    files = [tmp_path / "my picture.jpg", tmp_path / "small.png"]
    for file, pixels, size in zip(files, explained.test.images[3:], ((640, 400), (32, 32)), strict=False):
        Image.fromarray(pixels).resize(size).save(file)
    flags = ("--checkpoint", explained.run / "checkpoint.pt", "--output", tmp_path, "--image", *files)
    figures, log = drawn(*flags)
    for file, group in zip(files, tiles(figures["own.png"], 3), strict=True):
        seen = data.read_image(file)
        (shares,) = explained.network.shares(explained.network.normal(seen[None]))
        likely = np.argsort(-shares)[:3]
        words = [f"{explained.test.classes[label]}, {shares[label]:.0%}" for label in likely]
        assert f"{file}: {'; '.join(words)}\n" in log and group[0][0] == file.name
        explained.network.assert_explained(group, seen, likely[:2], words[:2], "layer4")
    heading = " ".join(figures["own.png"].get_suptitle().split())
    assert "Grad-CAM (layer4) of own pictures ResNet18 of width 8 on demo" in heading
    assert {path.name for path in tmp_path.iterdir()} == {"my picture.jpg", "own.png", "small.png"}


def tables(report: str) -> dict[str, list[list[str]]]:
    """The rows, but for the head, of the table under each heading."""
    sections = [section.partition("\n") for section in report.split("\n## ")[1:]]
    rows = {heading: re.findall(r"^\| (.*) \|$", body, re.M)[2:] for heading, _, body in sections}
    return {heading: [row.split(" | ") for row in of_table] for heading, of_table in rows.items()}


def test_the_report_says_what_the_run_left(explained):
    e, report, c = explained, (explained.run / "report.md").read_text(), loaded(explained.run / "last.pt")
    found, history, right, names = tables(report), c["history"], e.said == e.test.labels, e.test.classes
    best = max(history, key=lambda row: (row["val_accuracy"], -row["val_loss"]))
    lines = [f"validation accuracy {best['val_accuracy']:.2%} in epoch {best['epoch']} of 8", "seed 1"]
    lines += [f"training time {utils.clock(sum(row['seconds'] for row in history))}"]
    lines += ["images 160 training, 40 validation, 500 test", "hardware cpu (threads: 1), float32"]
    assert {f"test accuracy {right.mean():.2%}", *lines} <= {" ".join(row) for row in found["Highlights"]}
    assert model_script.summary(e.network.model) in report and "The demo: shapes" in report
    assert re.search(rf"\npython train.py --data demo .*{STORY}.*\npython gradcam.py --n 7 .*\n", report)
    accuracies = [f"{right[e.test.labels == label].mean():.2%}" for label in range(10)]
    assert found["Graphs"] == [list(pair) for pair in zip(names, accuracies, strict=True)]
    errors = Counter(pair for pair in zip(e.test.labels, e.said, strict=True) if pair[0] != pair[1])
    told = re.findall(r"(\w+) for (\w+) \((\d+)\)", report)
    counts = [errors[names.index(true), names.index(said)] for true, said, _ in told]
    assert counts == [int(count) for *_, count in told] == sorted(errors.values(), reverse=True)[:5]
    for shown, row in zip(found["Training log"], history, strict=True):
        form = "{epoch} {train_loss:.3f} {train_accuracy:.1%} {val_loss:.3f} {val_accuracy:.2%} {lr:.2g}"
        assert shown[:6] == form.format(**row).split()
    lines = [line.split() for line in e.log.splitlines() if line.startswith("test image")]
    assert lines == ["{} is {} said {} {}; blurred there {}".format(*row).split() for row in found["Images"]]
    assert re.search(r"^Blurring the marked parts.*$", e.log, re.M)[0] in report.splitlines()
    cuts = ", ".join(str(a["epoch"]) for a, b in zip(history, history[1:], strict=False) if b["lr"] < a["lr"])
    techniques = " ".join(" ".join(row) for row in found["Techniques used"])
    expected = f"cut after epoch {cuts}, from 0.06 to {history[-1]['lr']:.2g}; share of 0.2; momentum 0.9; "
    expected += "24 images; weight decay 0.002; factor 0.5, patience 0, threshold 10%; layer3; HorizontalFlip"
    assert all(words in techniques for words in expected.split("; ")) and "CutOut" not in techniques
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", report)
    assert len(pictures) == 5 and all((e.run / name).exists() for name in pictures)


def test_a_report_of_own_images_has_files_no_folders_and_no_exponents(images, tmp_path, monkeypatch):
    run, link, small = tmp_path / "run", tmp_path / "elsewhere/link.pt", "--lr 0.00002 --weight-decay 0.00003"
    succeed(train, f"--data={images}", *TINY, *small.split(), "--output", run)
    link.parent.mkdir()
    monkeypatch.chdir(link.parent)
    link.symlink_to("../run/checkpoint.pt")
    log = succeed(gradcam, "--checkpoint", "link.pt", "--data", images, "--n", 3)
    report = (run / "report.md").read_text().partition("\n## References")[0].partition("\n")[2]
    assert f"--data={images.name} " in report and f"--data {images.name} " in report
    assert str(images.parent) not in report and str(tmp_path) not in report
    (command,) = loaded(run / "checkpoint.pt")["commands"]  # as typed
    assert command == f"python train.py --data={images} {FLAGS} {small} --output {run}"
    assert re.search(r"^(cat|dog)/\d.png +is ", log, re.M) and re.search(r"^\| (cat|dog)/\d", report, re.M)
    assert "8 steps the rate only rose, to 0.00000" in report and "own images, in 2 classes" in report
    assert "factor 0.3, patience 1, threshold 1%" in report and "weight decay 0.00003" in report
    assert not re.search(r"\d[eE][-+]?\d", report)
    assert [path.name for path in link.parent.iterdir()] == ["link.pt"]


def test_a_run_without_errors_has_a_report_that_says_so_and_an_edited_one_stays(explained, tmp_path):
    e, shown = explained, tmp_path / "shown"
    for label, name in enumerate(e.test.classes):
        (tmp_path / "test" / name).mkdir(parents=True)
        right = np.flatnonzero((e.test.labels == label) & (e.said == label))[0]
        Image.fromarray(e.test.images[right]).save(tmp_path / "test" / name / "right.png")
    flags, report = ("--checkpoint", e.run / "checkpoint.pt", "--output", shown), shown / "report.md"
    log = succeed(gradcam, *flags, "--data", tmp_path)
    assert all("0 of 10 test images are misclassified" in text for text in (log, report.read_text()))
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", report.read_text())
    assert {path.name for path in shown.iterdir()} == {"report.md", *pictures}
    for name in ("augmentations.png", "curves.png", "confusion.png"):
        assert (shown / name).read_bytes() == (e.run / name).read_bytes()
    report.write_bytes(report.read_bytes().replace(b"\n", b"\r\n"))  # other ends of lines are no edit
    assert "so it stays" not in succeed(gradcam, *flags, "--n", 2) and "; 2 shown" in report.read_text()
    for edited in (report.read_bytes() + b"My own words.", b"all mine"):
        report.write_bytes(edited)
        assert f"{report} was edited, so it stays" in succeed(gradcam, *flags, "--n", 3)
        assert report.read_bytes() == edited and "; 3 shown" in (shown / "report-new.md").read_text()


def assert_texts_have_room(figure: Figure) -> None:
    """No text leaves the page, and none lies over another."""
    texts, draw = [], Text.draw
    figure.draw_without_rendering()  # as when it is saved, the layout settles in the second drawing
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", lambda text, renderer: texts.append(text) or draw(text, renderer))
        figure.draw_without_rendering()
    boxes = [(text, text.get_window_extent()) for text in texts if text.get_text() and text.get_visible()]
    for i, (text, box) in enumerate(boxes):
        assert min(*box.p0, *(figure.bbox.p1 - box.p1)) > -2, text  # a page that is saved has a margin
        for other, other_box in boxes[:i]:
            slanted = text.get_rotation() % 90 and other.get_rotation() % 90  # their boxes say little
            assert slanted or not box.overlaps(other_box), (text, other)


def test_curves_show_the_history_the_best_epoch_and_the_cuts():
    rows = [(1, 0.1, 2, 0.2, 2.1, 0.3), (2, 0.1, 1, 0.4, 2, 0.6), (3, 0.03, 0.5, 0.5, 2, 0.5)]
    history = [dict(zip(ROW, row, strict=True)) for row in rows]
    figure = utils.plot_curves(history, "title of the run")
    shown = [{line.get_label(): [*line.get_ydata()] for line in axis.lines} for axis in figure.axes]
    assert shown[0].items() >= {"training (augmented)": [2, 1, 0.5], "validation": [2.1, 2, 2]}.items()
    assert shown[1]["training (augmented)"] == [0.2, 0.4, 0.5] and shown[1]["validation"] == [0.3, 0.6, 0.5]
    assert shown[1]["best: epoch 2, 60.00%"] == [0.6] and shown[2]["learning rate"] == [0.1, 0.1, 0.03]
    assert {*figure.axes[2].lines[-1].get_xdata()} == {2.5}  # the cut
    history = [{**history[0], "epoch": epoch, "lr": 0.1 * 0.9**epoch} for epoch in range(1, 61)]
    for page in (figure, utils.plot_curves(history, "title of the run")):
        assert_texts_have_room(page)


@pytest.mark.parametrize("count", [2, 10, 30, 1000])
def test_a_confusion_matrix_can_be_read_and_drawn(count, tmp_path):
    names = [f"a class with a long name {i}" if count < 30 else f"class {i}" for i in range(count)]
    start, confusion = time.process_time(), 3 * torch.eye(count, dtype=torch.int64)
    confusion[0, 1] = 1
    figure = utils.plot_confusion(confusion, names, "title")
    numbers = {text.get_position(): int(text.get_text()) for text in figure.axes[0].texts}
    if count == 1000:
        utils.save_figure(figure, tmp_path / "confusion.png")
        assert time.process_time() - start < 10 and max(figure.get_size_inches()) < 20 and not numbers
        return
    assert numbers == {(i, i): 3 for i in range(count)} | {(1, 0): 1}  # (what was said, what is true)
    rows = [" ".join(text.get_text().split()) for text in figure.axes[0].get_yticklabels()]
    assert rows[:2] == [f"{names[0]} 75.0%", f"{names[1]} 100.0%"]
    assert_texts_have_room(figure)


LONG, WIDE = "a class with a name of forty characters,", "A CLASS WITH A NAME OF FORTY CAPITALS, W"


@pytest.mark.parametrize("n, name", [(1, "x"), (3, "A CLASS OF CAPITALS"), (10, "a class with a long name")])
def test_the_texts_of_pages_have_room(n, name):
    images, maps = random_split(n).images, np.pad(np.ones((n, 2, 8, 32)), ((0, 0), (0, 0), (0, 24), (0, 0)))
    titles = [(f"test image {i}", f"said {name}, 100%", f"is {name}, 0%") for i in range(n)]
    heated = gradcam.plot_heatmaps(images, maps, titles, np.full((n, 2), 0.5), "heading")
    plain = utils.plot_grid(images, ["\n".join(words) for words in titles], min(5, n), "heading")
    assert_texts_have_room(heated)
    assert_texts_have_room(plain)
    (line,) = heated.axes[1].collections[0].get_paths()  # closed, around the upper eight rows
    assert (line.vertices[0] == line.vertices[-1]).all() and 7 < line.vertices[:, 1].max() < 8


def test_imports_do_nothing_and_the_scripts_run_from_any_folder_with_workers(images, tmp_path):
    """Also in a process of a notebook, which sets MPLBACKEND to a package that may not be there."""
    code = """import importlib.metadata as metadata, os, runpy, torch, model; seed = torch.initial_seed()
assert not {"albumentations", "matplotlib", "cv2", "torchvision"} & set(sys.modules)
metadata.entry_points, sys.modules["matplotlib_inline"] = lambda **_: metadata.EntryPoints(), None
import data, utils, train, gradcam; assert seed == torch.initial_seed() and not os.listdir()
for sys.argv in (sys.argv[2:], sys.argv[1:2]): runpy.run_path(sys.argv[0], run_name='__main__')"""
    variables = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore:This DataLoader will"}  # of few cores
    variables["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    flags = ("--data", os.path.relpath(images, tmp_path), *TINY, "--epochs", 1, "--workers", 2)
    words = (HERE / "gradcam.py", HERE / "train.py", *flags)
    with started(code, *words, cwd=tmp_path, env=os.environ | variables) as process:
        assert not process.communicate(timeout=120)[1] and process.returncode == 0
    expected = [*train.OUTPUT_FILES, "misclassified.png", "gradcam.png", "report.md"]
    assert sorted(os.listdir(tmp_path / "outputs")) == sorted(expected)
