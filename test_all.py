"""Tests in the order of the pipeline; no network, about 90 seconds on two cores.

python -m pytest -q test_all.py
"""

import ast
import copy
import csv
import hashlib
import io
import math
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import unicodedata
from contextlib import contextmanager, redirect_stderr, redirect_stdout
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
from torch.nn import functional as F

import data
import gradcam
import model as model_script
import train
import utils
from model import ResNet18, count_parameters

THREADS = 1  # for networks this small a second thread only waits
torch.set_num_threads(THREADS)
pytestmark = pytest.mark.filterwarnings("error", "ignore:This DataLoader will create")
needs_signals = pytest.mark.skipif(os.name != "posix", reason="needs signals")
HERE = Path(__file__).parent
CPU = torch.device("cpu")
FP32 = utils.autocast(CPU, torch.float32)
MEAN = [0.4914, 0.4822, 0.4465]  # of CIFAR-10
STD = [0.2470, 0.2435, 0.2616]
TINY = "--epochs 2 --batch-size 4 --workers 0 --width 8 --device cpu --precision fp32"


# ---------------------------------------- helpers
def run_code(code, command, **options):
    """Python code in a process of its own, which can import the scripts."""
    start = f"import sys, torch; sys.path.insert(0, {str(HERE)!r}); torch.set_num_threads({THREADS})"
    command = [sys.executable, "-c", f"{start}\n{code}", *command.split()]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


def call(command, pictures=False):
    """A script as a user calls it, but in this process and, to save time, without drawing."""
    script, *words = command.split()
    out = io.StringIO()
    err = io.StringIO()
    status = 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        if not pictures:
            for name in ("plot_curves", "plot_confusion", "plot_grid"):
                patch.setattr(utils, name, lambda *_: Figure())
            patch.setattr(utils, "save_figure", lambda _, path, needed=True: utils.write(path, b"-"))
        try:
            utils.run(lambda: sys.modules[script].main(words))
        except SystemExit as stop:
            status = stop.code
            if isinstance(status, str):  # as Python itself does
                err.write(f"{status}\n")
                status = 1
    return SimpleNamespace(
        status=status,
        out=out.getvalue(),
        err=err.getvalue(),
    )


def succeed(command, pictures=False):
    """What the script prints."""
    done = call(command, pictures)
    assert done.status == 0, done.err
    return done.out


def assert_one_line_error(done, status, *words):
    assert done.status == status, done.out + done.err
    assert "Traceback" not in done.err
    message = done.err.strip().splitlines()[-1]
    assert "error: " in message
    for word in words:
        assert word in message


def assert_same(a, b):
    """Nested dicts and lists of tensors and values, bit for bit; only times may differ."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a.keys() - {"seconds", "images_per_second"}:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def random_split(count):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    labels = rng.integers(0, 10, count)
    return data.Split(pixels, labels, list("0123456789"), "random", "Random pixels.")


def to_input(pixels):
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255


def loaded(path):
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder with eight images per class, which differ in brightness."""
    folder = tmp_path_factory.mktemp("images")
    for i, pixels in enumerate(random_split(32).images // 2):
        path = folder / f"{'train' if i < 16 else 'test'}/{'cat' if i % 2 else 'dog'}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels + 120 * (i % 2 == 0)).save(path)
    return folder


@pytest.fixture(scope="session")
def finished(images, tmp_path_factory):
    """The output folder of a run of two epochs on eight images per class."""
    output = tmp_path_factory.mktemp("finished")
    log = succeed(f"train --data {images} --output {output} {TINY}")
    assert f'To resume: python train.py --resume --output "{output}"' in log
    assert "Only 8 steps: the learning rate rises for 200, so" in log
    return output


# ---------------------------------------- network
def test_network_is_the_known_resnet18():
    """The oracle is torchvision's ResNet18 with the CIFAR stem: equal parameters in order, equal function."""
    known = torchvision.models.resnet18(num_classes=10)
    known.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    known.maxpool = nn.Identity()
    for name, values in known.state_dict().items():
        if "bn" in name and values.is_floating_point():
            values.uniform_(0.5, 1.5)  # so that every parameter matters
    ours = ResNet18()
    names = [name for name in ours.state_dict() if "normalize" not in name]
    weights = dict(zip(names, known.state_dict().values(), strict=True))
    ours.load_state_dict(weights, strict=False)
    x = torch.randn(4, 3, 32, 32)

    logits = ours.eval()(x)

    torch.testing.assert_close(logits, known.eval()(x), atol=1e-3, rtol=1e-3)
    assert count_parameters(ours) == 11_173_962


def test_layer_norm_normalizes_each_image_and_standardizes_the_filters():
    modules = list(ResNet18(norm="layer", width=8).modules())
    norms = [module for module in modules if isinstance(module, nn.GroupNorm)]
    convolutions = [module for module in modules if isinstance(module, nn.Conv2d)]

    assert len(norms) == len(convolutions) == 20  # the stem, eight blocks of two, three projections
    for norm, convolution in zip(norms, convolutions, strict=True):
        assert norm.num_groups == 1  # over all channels and positions
        filters = convolution.weight.flatten(1)
        assert abs(filters.mean(1)).max() < 1e-3
        assert abs(filters.std(1, correction=0) - 1).max() < 1e-2


@pytest.mark.parametrize("threads", [1, 2])
def test_this_machine_computes_the_same_gradients_in_channels_last(threads):
    """Where this fails, PyTorch's convolutions are wrong (oneDNN issue 6035), and so is every training."""
    torch.manual_seed(0)
    images = torch.rand(16, 3, 32, 32)
    plain = ResNet18(width=8)
    other = copy.deepcopy(plain).to(memory_format=torch.channels_last)

    torch.set_num_threads(threads)
    plain(images).square().sum().backward()
    other(images.to(memory_format=torch.channels_last)).square().sum().backward()
    torch.set_num_threads(THREADS)

    for a, b in zip(plain.parameters(), other.parameters(), strict=True):
        assert (a.grad - b.grad).norm() < 0.05 * a.grad.norm()


# ---------------------------------------- images
def lay_out(folder, files):
    """Make these images and, where a name has no dot, folders."""
    for file in files.split():
        path = folder / file
        if "." in file:
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (70, 40), 50 + len(path.name)).save(path, "png")
        else:
            path.mkdir(parents=True)
    return folder


def test_images_in_class_folders_are_read_in_order_and_others_are_counted(tmp_path, capsys):
    composed = "caf\u00e9"
    decomposed = unicodedata.normalize("NFD", composed)  # as a Mac writes it
    lay_out(tmp_path, f"train/a/1.png train/{decomposed}/1.png test/.git/0.png test/a/.DS_Store")
    lay_out(tmp_path, "test/a/10.gif test/a/2.JPG test/a/B.HEIC test/a/c.heic test/a/more/1/2.png")
    lay_out(tmp_path, f"test/{composed}/1.png test/{composed}/c.jfif test/{composed}/notes.txt")

    training, test = data.load_splits(str(tmp_path))

    assert capsys.readouterr().out == f"{tmp_path}/test: skipped: 2 .heic, 1 more, 1 .txt\n"
    assert training.classes == test.classes == ["a", composed]
    assert test.files == ["a/10.gif", "a/2.JPG", f"{composed}/1.png", f"{composed}/c.jfif"]
    assert test.labels.tolist() == [0, 0, 1, 1]


NO_DATA_SETS = [  # what lies there, and words of the message
    ("train/cat/1.png train/dog test/cat/1.png", "train/<class>/* must be images: none found in dog"),
    ("train test/cat/1.png", "train/<class>/* must be images: none found in any class"),
    ("train/cat/1.png test/cat/1.png test/dog/1.png", "found in only one of them: 'dog'"),
    (
        "train/cat/1.png val/cat/1.png",
        "does not contain train/<class>/* and test/<class>/*, or an undamaged cifar",
    ),
    ("", "is missing or empty"),
    ("train/a/1.png train/b/1.png test/a/1.png test/b/1.png", "no class has a second image"),
]


@pytest.mark.parametrize("files, words", NO_DATA_SETS)
def test_a_folder_that_is_no_data_set_is_named_and_left_alone(tmp_path, files, words):
    lay_out(tmp_path / "images", files)
    before = sorted(tmp_path.rglob("*"))

    done = call(f"train --data {tmp_path}/images --output {tmp_path}/output {TINY}")

    assert_one_line_error(done, 1, words)
    assert sorted(tmp_path.rglob("*")) == before


def pixels_of(image, path, kind="png", **options):
    image.save(path, kind, **options)
    return data.read_image(path).astype(int)


def test_transparent_pixels_are_mid_gray(tmp_path):
    """Otherwise a black drawing, or a white one, would be a square of one color."""
    drawing = Image.new("RGBA", (32, 32))
    drawing.paste("black", (0, 0, 32, 16))

    pixels = pixels_of(drawing, tmp_path / "drawing")

    assert {*pixels[:16].flat} == {0}
    assert {*pixels[16:].flat} == {128}


def test_a_photo_is_turned_upright_in_spite_of_damaged_tags(tmp_path):
    pixels = random_split(1).images[0]
    turned = Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: the camera was turned
    exif[0x011A] = 1.0
    damaged = exif.tobytes().replace(b"\x01\x1a\x00\x05", b"\x01\x1a\x00\x0a")  # a signed resolution

    upright = pixels_of(
        turned,
        tmp_path / "photo",
        "jpeg",
        exif=damaged,
        quality=100,
        subsampling=0,
    )

    assert abs(upright - pixels).max() <= 8


def test_a_damaged_image_is_named(tmp_path):
    path = tmp_path / "photo"
    deep = Image.fromarray(np.full((32, 32), 1000, np.uint16))
    deep.save(path, "tiff")  # with 8 bits, all of it would be white
    bad = [b"", path.read_bytes()]
    deep.convert("L").save(path, "png")
    bad.append(path.read_bytes()[:60])

    for content in bad:
        path.write_bytes(content)
        with pytest.raises(utils.RunError, match="photo cannot be read as an image"):
            data.read_image(path)


def test_a_download_tries_the_next_address(monkeypatch, capsys):
    cifar10 = Mock(side_effect=[OSError, OSError, None, OSError, OSError, OSError])
    monkeypatch.setattr(data, "CIFAR10", cifar10)

    data.download_cifar10(Path("data"))

    assert cifar10.url == data.CIFAR10_URLS[2]
    assert capsys.readouterr().out.count("no CIFAR-10 from https://") == 2
    assert socket.getdefaulttimeout() is None
    with pytest.raises(utils.RunError, match="into data, or use --data FOLDER or --data demo"):
        data.download_cifar10(Path("data"))


def test_an_archive_of_cifar10_is_unpacked(tmp_path, monkeypatch):
    inside = lay_out(tmp_path, "served/cifar-10-batches-py") / "served/cifar-10-batches-py"
    batch = {
        "data": np.zeros((10, 3072), np.uint8),
        "labels": list(range(10)),
        "label_names": list("abcdefghij"),
    }
    for name in ("first", "second", "test", "meta"):
        (inside / name).write_bytes(pickle.dumps(batch))
    archive = Path(shutil.make_archive(tmp_path / "whole", "gztar", inside.parent, inside.name))
    md5 = hashlib.md5((inside / "test").read_bytes()).hexdigest()
    monkeypatch.setattr(data.CIFAR10, "train_list", [["first", md5], ["second", md5]])
    monkeypatch.setattr(data.CIFAR10, "test_list", [["test", md5]])
    monkeypatch.setattr(data.CIFAR10, "meta", {"filename": "meta", "key": "label_names", "md5": md5})
    monkeypatch.setattr(data.CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    with pytest.raises(utils.RunError, match="does not contain .*undamaged cifar-10-python.tar.gz"):
        data.load_splits(tmp_path)
    theirs = lay_out(tmp_path, "theirs") / "theirs"
    archive.rename(theirs / "cifar-10-python.tar.gz")

    training, test = data.load_splits(theirs)

    assert len(training.labels) == 20
    assert len(test.labels) == 10
    assert test.classes[2] == "c"


def numbered_split(labels):
    """Each image is its number."""
    numbers = np.arange(len(labels))[:, None, None, None]
    names = [str(label) for label in np.unique(labels)]
    return data.Split(numbers, labels, names, "", "")


@pytest.mark.parametrize("limit, count", [(None, 5000), (1000, 1000)])
def test_the_split_is_stratified_and_disjoint(limit, count):
    labels = np.random.default_rng(0).permutation(np.arange(5000) % 10)

    training, validation = data.split_validation(numbered_split(labels), 0.1, limit, 0)

    assert np.bincount(validation.labels).tolist() == [count / 100] * 10
    assert len({*training.images.flat, *validation.images.flat}) == count
    assert (labels[training.images.flat] == training.labels).all()


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9])
def test_every_class_of_two_images_or_more_is_in_validation_and_in_training(share, capsys):
    labels = np.repeat(np.arange(5), [100, 100, 5, 2, 1])
    unchanged = data.stratified_order(labels, 3)[: round(208 * share)]

    training, validation = data.split_validation(numbered_split(labels), share, None, 3)

    assert {*validation.labels} == {0, 1, 2, 3}
    assert {*training.labels} == {0, 1, 2, 3, 4}
    assert sorted([*training.images.flat, *validation.images.flat]) == list(range(208))
    assert len({*unchanged} ^ {*validation.images.flat}) <= 5  # one for each class at most
    assert "4 has only one image, which is used for training" in capsys.readouterr().out


# ---------------------------------------- batches
def batches(split, batch_size=16, seed=3, workers=0, epochs=(1,), mean=MEAN):
    """All batches of the epochs: images and labels in turn."""
    loader = data.train_loader(split, data.augmentations(mean), batch_size, seed, workers, CPU)
    found = []
    for epoch in epochs:
        loader.sampler.epoch = epoch
        for images, labels in loader:
            found += [images.clone(), labels.clone()]
    return found


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_workers_or_on_earlier_epochs(workers):
    split = random_split(100)
    first = batches(split, epochs=[1])
    second = batches(split, epochs=[2])

    assert_same(batches(split, workers=workers, epochs=[1, 2]), first + second)
    assert_same(batches(split, workers=workers, epochs=[2]), second)  # as after a resume
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(first[0], batches(split, seed=4)[0])


def test_an_epoch_has_each_image_once_with_its_label_in_an_order_of_its_own():
    split = random_split(100)
    split.images[:] = np.arange(100, 200)[:, None, None, None]  # augmentation keeps a flat image
    orders = [list(range(100))]
    for epoch in (1, 2):
        found = batches(split, epochs=[epoch], mean=[1.0, 1.0, 1.0])
        numbers = torch.cat(found[::2]).amin((1, 2, 3)).int() - 100
        assert torch.cat(found[1::2]).tolist() == split.labels[numbers].tolist()
        assert sorted(numbers) == orders[0]
        orders.append(numbers.tolist())

    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_each_image_gets_draws_of_its_own_for_each_technique():
    split = random_split(2000)
    split.images[:] = np.arange(60, 188, 4)[:, None]  # rises along a row, or falls when flipped

    pictures = torch.cat(batches(split, 500, mean=[0, 0, 1.0])[::2]).numpy()

    flip = pictures[:, 0, 31, 0] < pictures[:, 0, 0, 0]
    cutout = (pictures == (0, 0, 255)).all(3).any((1, 2))
    column = pictures[~cutout, :, 16, 0]  # near the middle
    rotated = column[:, 4] != column[:, 27]
    assert flip.mean() == pytest.approx(0.5, abs=0.1)
    assert cutout.mean() == pytest.approx(0.5, abs=0.1)
    assert rotated.mean() == pytest.approx(0.45, abs=0.15)  # the smallest angles change nothing
    assert len({*column[:, 16]}) >= 9  # places of the crop
    assert abs(np.corrcoef(flip, cutout)[0, 1]) < 0.1  # with one seed for both it would be 1


def test_the_report_gets_the_numbers_of_the_augmentations_in_use():
    techniques = data.augmentations(MEAN, without=["flip"])
    techniques["mine"] = [data.A.Rotate(limit=20, p=1)]

    crop, rotate, cutout, mine = data.describe_augmentations(techniques)

    assert crop[0] == "RandomCrop"
    assert crop[2] == "Pad(padding=4, p=1.0), RandomCrop(height=32, width=32, p=1.0)"
    assert rotate[2] == "Rotate(limit=(-5.0, 5.0), p=0.5)"
    assert "num_holes_range=(1, 1), hole_height_range=(16, 16), hole_width_range=(16, 16), p=0.5" in cutout[2]
    assert "limit=(-20.0, 20.0)" in mine[2]


# ---------------------------------------- device and precision
def test_precision_follows_the_hardware(monkeypatch):
    capabilities = Mock(
        side_effect=[
            {"amx_bf16": True},
            {"avx512_bf16": True},
            {"avx512_f": True},
        ]
    )
    monkeypatch.setattr(torch.cpu, "get_capabilities", capabilities, raising=False)

    assert utils.choose_precision("auto", CPU) is torch.bfloat16
    assert utils.choose_precision("auto", CPU) is torch.bfloat16
    assert utils.choose_precision("auto", CPU) is torch.float32


# ---------------------------------------- training
DEFAULTS = "--epochs 40 --batch-size 128 --lr 0.1 --weight-decay 0.0005 --factor 0.3 --patience 1 --width 64 "
DEFAULTS += "--label-smoothing 0.1 --val-split 0.1 --norm batch --seed 0 "
STORY = "--epochs 8 --batch-size 24 --lr 0.06 --weight-decay 0.002 --factor 0.5 --patience 0 --limit 200 "
STORY += "--label-smoothing 0.2 --val-split 0.2 --width 8 --seed 1 --without cutout"
SCRIPT = [  # validation loss and accuracy of each epoch, so that no machine decides
    (2.0, 0.2),
    (1.9, 0.3),
    (1.8, 0.6),  # less than 10% below the best loss is no progress: the learning rate is reduced
    (1.5, 0.5),
    (1.45, 0.6),  # the best epoch, as accurate as the third at a lower loss; here it is reduced, too
    (1.2, 0.4),
    (1.19, 0.3),  # and here
    (1.0, 0.5),
]
ROW = ["epoch", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy"]


@contextmanager
def scripted(script):
    """Validation ends as in the script; yields all calls of train.evaluate, with the real loss."""
    calls = []
    results = iter(script)
    evaluate = train.evaluate

    def stand_in(model, split, criterion):
        loss, accuracy, confusion = evaluate(model, split, criterion)
        weights = copy.deepcopy(model.state_dict())
        calls.append(
            SimpleNamespace(
                weights=weights,
                images=split.images,
                loss=loss,
            )
        )
        return *next(results, (loss, accuracy)), confusion

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "evaluate", stand_in)
        yield calls


def plain_run(root, warmup, threshold, script, flags):
    """What train.py computes, in one plain loop: history, averaged weights and their validation."""
    s = train.get_parser().parse_args(flags.split())
    everything, test = data.load_splits(str(root))
    std, mean = torch.std_mean(torch.tensor(everything.images / 255), (0, 1, 2), correction=0)
    training, validation = data.split_validation(everything, s.val_split, s.limit, s.seed)
    augmentations = data.augmentations(mean.tolist(), s.without)
    loader = data.train_loader(training, augmentations, s.batch_size, s.seed, 0, CPU)
    torch.manual_seed(s.seed)
    model = ResNet18(len(test.classes), s.norm, s.width).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(),
        0,
        0.9,
        weight_decay=s.weight_decay,
        nesterov=True,
    )
    criterion = nn.CrossEntropyLoss(label_smoothing=s.label_smoothing)

    def ask(network, images):
        return network(((images / 255 - mean.float()) / std.float()).permute(0, 3, 1, 2))

    @torch.no_grad()
    def judge(weights, split):
        """Loss and predicted classes."""
        network = copy.deepcopy(model).eval()
        weights = {name: value for name, value in weights.items() if "normalize" not in name}
        network.load_state_dict(weights, strict=False)
        labels = torch.from_numpy(split.labels)
        logits = ask(network, torch.from_numpy(split.images))
        return criterion(logits, labels).item(), logits.argmax(1)

    def rate():
        return top * min(1, (1 + (warmup - 1) * steps / warmup) / warmup)

    run = SimpleNamespace(
        rows=[],
        averages=[],
        judge=judge,
        validation=validation,
        test=test,
    )
    averaged = copy.deepcopy(model.state_dict())
    top = s.lr
    steps = 0
    lowest = math.inf
    waited = 0
    for epoch, (val_loss, _) in enumerate(script, 1):
        loader.sampler.epoch = epoch
        losses = []
        right = []
        model.train()
        for images, labels in loader:
            optimizer.param_groups[0]["lr"] = rate()
            logits = ask(model, images)
            loss = criterion(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += 1
            for name, weights in model.state_dict().items():
                if weights.is_floating_point():
                    averaged[name] = averaged[name] + (weights - averaged[name]) / len(loader)
            losses += [loss.item()] * len(labels)
            right += (logits.argmax(1) == labels).tolist()
        if epoch == 1:  # the random weights of the start are no part of it
            averaged = copy.deepcopy(model.state_dict())
        run.rows.append([epoch, rate(), np.mean(losses), np.mean(right)])
        run.averages.append(copy.deepcopy(averaged))
        if steps >= warmup:
            waited += 1
            if val_loss < lowest * (1 - threshold):
                lowest = val_loss
                waited = 0
            if waited > s.patience:
                top = max(top * s.factor, s.lr / 1000)
                waited = 0
    return run


def assert_computed(output, calls, plain):
    """Tolerances are far above what rounding makes of two computations."""
    history = loaded(output / "checkpoint.pt")["history"]
    for row, expected in zip(history, plain.rows, strict=True):
        assert [row[name] for name in ROW[:3]] == pytest.approx(expected[:3], rel=2e-3)
        assert row["train_accuracy"] == pytest.approx(expected[3], abs=0.02)
    for done, average in zip(calls, plain.averages, strict=False):
        assert (done.images == plain.validation.images).all()
        assert done.loss == pytest.approx(plain.judge(average, plain.validation)[0], rel=5e-3)
        for name, expected in average.items():
            if expected.is_floating_point() and "normalize" not in name:
                torch.testing.assert_close(done.weights[name], expected, rtol=1e-2, atol=2e-3)


@pytest.fixture(scope="session")
def story(tmp_path_factory):
    """A run on the demo with a setting of its own for everything, and the script for validation."""
    output = tmp_path_factory.mktemp("story")
    with pytest.MonkeyPatch.context() as patch, scripted(SCRIPT) as calls:
        patch.setattr(train, "WARMUP_STEPS", 8)
        patch.setattr(train, "PLATEAU_THRESHOLD", 0.1)
        log = succeed(f"train --data demo {TINY} {STORY} --output {output}")
    plain = plain_run("demo", 8, 0.1, SCRIPT, STORY)
    return SimpleNamespace(
        output=output,
        log=log,
        calls=calls,
        plain=plain,
    )


@pytest.fixture(scope="session")
def checkpoint(story):
    return loaded(story.output / "checkpoint.pt")


def test_a_run_is_what_a_plain_loop_computes(story):
    assert_computed(story.output, story.calls, story.plain)


def test_validation_decides_on_reductions_and_on_the_best_epoch(story, checkpoint):
    history = checkpoint["history"]
    assert [(row["val_loss"], row["val_accuracy"]) for row in history] == SCRIPT
    assert utils.find_reductions(history) == [3, 5, 7]
    assert checkpoint["epoch"] == 5
    assert_same(checkpoint["model"], dict(story.calls[4].weights))


def test_the_test_set_is_read_once_with_the_weights_of_the_best_epoch(story, checkpoint):
    test = story.plain.test
    last = story.calls[-1]
    confusion = np.array(checkpoint["result"]["confusion"])

    assert len(story.calls) == 9
    assert (last.images == test.images).all()
    assert_same(last.weights, story.calls[4].weights)
    predicted = story.plain.judge(last.weights, test)[1]
    for true, counts in enumerate(confusion):
        expected = predicted[test.labels == true].bincount(minlength=10)
        assert abs(counts - expected.numpy()).sum() < 5
    accuracy = confusion.trace() / 500
    assert checkpoint["result"]["test_accuracy"] == pytest.approx(accuracy)
    assert f"demo: test accuracy {accuracy:.2%} with the weights of epoch 5" in story.log


def test_log_and_csv_tell_the_history(story, checkpoint):
    lines = story.log.split("left\n")[1].split("\n\n")[0].splitlines()
    epochs = [line.split() for line in lines if "plateaued" not in line]
    rows = csv.DictReader((story.output / "history.csv").read_text().splitlines())

    for words, row, in_file in zip(epochs, checkpoint["history"], rows, strict=True):
        assert words[0] == f"{row['epoch']}/8"
        numbers = [float(word) for word in words[1:6]]
        assert numbers == pytest.approx([row[name] for name in ROW[1:]], rel=5e-3)
        assert in_file == {name: str(value) for name, value in row.items()}
    assert [words[0] for words in epochs if words[-1] == "best"] == ["1/8", "2/8", "3/8", "5/8"]
    assert lines[3].strip() == "validation loss plateaued: learning rate reduced from 0.06 to 0.03"


def assert_same_run(whole, other):
    for name in ("last.pt", "checkpoint.pt"):
        a = loaded(whole / name)
        b = loaded(other / name)
        for key in a.keys() - {"settings", "facts", "commands"}:
            assert_same(a[key], b[key])
    assert {path.name for path in other.iterdir()} == {*train.OUTPUT_FILES}


def test_an_extended_run_is_what_a_plain_loop_computes(images, tmp_path, monkeypatch):
    """An epoch has four steps. No progress is ever enough, so the learning rate sinks to its lowest."""
    monkeypatch.setattr(train, "WARMUP_STEPS", 6)
    monkeypatch.setattr(train, "PLATEAU_THRESHOLD", 0.99)
    script = [(1.0, 0.5)] * 7
    flags = "--norm layer --lr 0.05 --factor 0.02 --seed 3 --batch-size 4 --width 8"
    whole = tmp_path / "whole"
    with scripted(script) as calls:
        succeed(f"train --data {images} {TINY} {flags} --epochs 7 --output {whole}")
    assert_computed(whole, calls, plain_run(images, 6, 0.99, script, flags))
    rates = [row["lr"] for row in loaded(whole / "last.pt")["history"]]
    lowest = 0.00005
    assert rates[1:] == pytest.approx([0.05, 0.05, 0.05, 0.001, 0.001, lowest])

    resumed = tmp_path / "resumed"
    with scripted(script[:3]):
        succeed(f"train --data {images} {TINY} {flags} --epochs 3 --output {resumed}")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)  # from now on another machine
    for epochs, validations in (
        (5, 2),
        (7, 2),
        (7, 0),
    ):  # within the patience, after it, and when it has ended
        with scripted(script[:validations]):
            log = succeed(f"train --resume --epochs {epochs} --workers 1 --output {resumed}")

    assert "Resuming after epoch 7." in log
    assert_same_run(whole, resumed)
    c = loaded(resumed / "checkpoint.pt")
    assert c["commands"][3] == f"python train.py --resume --epochs 7 --workers 1 --output {resumed}"
    assert c["facts"]["hardware"] == f"cpu (threads: {THREADS}), float32, then cpu (threads: 3), float32"


# ---------------------------------------- resume
KILL = """import os, signal, train, utils
train.SAVE_SECONDS = -1  # saves after every epoch
utils.save_figure = lambda figure, path, needed=True: utils.write(path, b"picture")
replace, done = os.replace, []
def count(*paths):
    done.append(paths)
    if len(done) > 9:  # of the second epoch all but last.pt is written
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*paths)
os.replace = count
utils.run(train.main)
"""


@needs_signals
def test_a_run_killed_between_two_writes_continues_as_if_it_had_not_been(finished, images, tmp_path):
    killed = run_code(KILL, f"--data {images} --output {tmp_path} {TINY}")
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "last.pt.tmp").exists()

    log = succeed(f"gradcam --checkpoint {tmp_path}/checkpoint.pt --output {tmp_path}/shown")
    assert "No report: this file has no test result" in log
    shutil.rmtree(tmp_path / "shown")
    succeed(f"train --output {tmp_path} --resume")
    assert_same_run(finished, tmp_path)


def test_ctrl_c_ends_with_one_line(images, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "train_one_epoch", Mock(side_effect=KeyboardInterrupt))
    done = call(f"train --data {images} --output {tmp_path} {TINY}")
    assert done.status == 1
    assert done.err == "\nstopped\n"


CHANGES = "--lr 0.2, --batch-size 128, --norm layer, --width 64, --seed 1, --limit 5, --without flip, "
CHANGES += "--val-split 0.2, --patience 2, --factor 0.5, --label-smoothing 0, --weight-decay 0"


@pytest.mark.parametrize("change", CHANGES.split(", "))
def test_resume_refuses_a_flag_that_would_change_the_run(finished, change):
    done = call(f"train --output {finished} --resume {change}")
    assert_one_line_error(done, 2, change.split()[0], "cannot be changed by --resume")


def test_resume_refuses_other_images(finished, images, tmp_path):
    before = (finished / "last.pt").read_bytes()
    renamed = shutil.copytree(images, tmp_path / "renamed")
    for path in renamed.glob("train/*/*.png"):
        path.rename(path.with_name(f"{99 - int(path.stem)}.png"))

    for root in ("demo", renamed):
        done = call(f"train --output {finished} --resume --data {root}")
        assert_one_line_error(done, 1, "--data: not the images of the run, or in another order")
    assert (finished / "last.pt").read_bytes() == before


def test_a_folder_that_holds_a_run_is_overwritten_only_when_told(finished, images, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    command = f"train --data {images} --output {run} {TINY} --epochs 1"
    for name in ("notes.txt", *train.GRADCAM_FILES):
        (run / name).write_text("old")
    (run / "report-new.md").write_text(utils.seal("text"))
    (run / "report.md").write_text(utils.seal("text") + "My words.")
    before = {path: path.read_bytes() for path in run.iterdir()}
    assert_one_line_error(call(command), 1, "holds a run", "--resume", "--overwrite", "--output")
    assert call(f"{command} --overwrite --data none").status == 1
    assert {path: path.read_bytes() for path in run.iterdir()} == before

    succeed(f"{command} --overwrite")

    kept = {"report.md", "notes.txt"}
    assert {path.name for path in run.iterdir()} == {*train.OUTPUT_FILES, *kept}
    assert "My words." in (run / "report.md").read_text()


# ---------------------------------------- Grad-CAM
def textbook_gradcam(model, layer, images, labels):
    """Equations 1 and 2 of the paper, an image at a time, with the whole network differentiated."""
    maps = []
    for image, label in zip(images, labels, strict=True):
        x = model.normalize(image[None])
        for name, stage in model.feature.named_children():
            x = stage(x)
            if name == layer:
                kept = x
        (gradients,) = torch.autograd.grad(model.classifier(x)[0, label], kept)
        heat = 0
        for gradient, activation in zip(gradients[0], kept[0].detach(), strict=True):
            heat = heat + gradient.mean() * activation
        heat = heat.clamp(min=0)
        if heat.any():
            heat = heat / heat.max()
        maps.append(F.interpolate(heat[None, None], (32, 32), mode="bilinear")[0, 0])
    return torch.stack(maps)


@pytest.fixture
def network():
    """A network with running statistics, and with weights that give clear answers."""
    torch.manual_seed(0)
    model = ResNet18(width=16, mean=MEAN, std=STD)
    model(to_input(data.draw_demo("train").images[:64]))
    model.classifier[2].weight.data *= 100
    return model.eval()


def test_heatmaps_point_at_the_object_of_the_class():
    """The pointing game (Zhang et al. 2016): of two shapes side by side each must be found by its class."""
    demo = data.draw_demo("train", sizes=(16, 24), faintest=1)
    test = data.draw_demo("test", sizes=(16, 24), faintest=1)
    bars, pillars = 0, 5
    assert [demo.classes[bars], demo.classes[pillars]] == ["bars", "pillars"]
    chosen = np.isin(demo.labels, [bars, 1, pillars, 6])
    images = to_input(demo.images[chosen][:400])
    labels = torch.from_numpy(demo.labels[chosen][:400])
    torch.manual_seed(0)
    trained = ResNet18(10, "batch", 8, *data.channel_statistics(demo.images))
    untrained = copy.deepcopy(trained)
    optimizer = torch.optim.SGD(trained.parameters(), 0.02, 0.9, nesterov=True)
    for _ in range(5):
        for batch in torch.randperm(400).split(16):
            optimizer.zero_grad()
            F.cross_entropy(trained(images[batch]), labels[batch]).backward()
            optimizer.step()
    halves = [test.images[test.labels == label] for label in (bars, pillars)]
    pairs = to_input(np.concatenate(halves, axis=2)).repeat(2, 1, 1, 1)  # (100, 3, 32, 64)
    asked = torch.tensor([bars] * 50 + [pillars] * 50)

    def share_found(model, layer):
        peaks = gradcam.GradCAM(model, layer).heatmaps(pairs, asked).flatten(1).argmax(1)
        is_right = peaks % 64 >= 32
        return (is_right == (asked == pillars)).float().mean()

    for layer in ("layer3", "layer4"):
        assert share_found(trained, layer) > 0.85
        assert share_found(untrained, layer) < 0.75


def test_the_interface_of_the_course_keeps_the_gradient_of_a_logit(network):
    cam = gradcam.GradCAM(network, "layer4").eval()
    images = torch.rand(2, 3, 32, 32)

    logits = cam(images)
    logits[:, 4].sum().backward()

    torch.testing.assert_close(network(images), logits, atol=1e-3, rtol=1e-3)
    by_hand = network.classifier[2].weight[4] / 16  # the derivative of a mean over 4x4 positions
    gradient = cam.get_activations_gradient()[0, :, 0, 0]
    torch.testing.assert_close(gradient, by_hand, atol=1e-5, rtol=1e-3)


def test_heatmaps_leave_the_weights_and_statistics_of_a_network_in_training(network):
    before = copy.deepcopy(network.state_dict())
    cam = gradcam.GradCAM(network.train())
    cam.heatmaps(torch.rand(2, 3, 32, 32), torch.tensor([1, 9]))
    assert_same(before, network.state_dict())


def mark_by_hand(heat):
    """The first 205 pixels by brightness, without zeros, after a morphological opening by 3x3 pixels."""
    mask = np.zeros(1024, bool)
    mask[np.argsort(-heat.flatten(), kind="stable")[:205]] = True
    mask = mask.reshape(32, 32) & (heat > 0)
    windows = np.lib.stride_tricks.sliding_window_view
    eroded = windows(np.pad(mask, 1, constant_values=True), (3, 3)).all((2, 3))
    opened = windows(np.pad(eroded, 1), (3, 3)).any((2, 3))
    return opened if opened.sum() > 0.9 * mask.sum() else mask


@pytest.mark.parametrize("layer", gradcam.LAYERS)
def test_maps_and_blur_test_are_those_computed_by_hand(network, layer):
    network.classifier[2].weight.data[9] = 0  # nothing is evidence for class 9
    pictures = data.draw_demo("test", sizes=(16, 24)).images[:6]
    inputs = to_input(pictures)
    labels = network(inputs).topk(2).indices[range(6), [0, 1, 0, 1, 0, 1]]
    labels[5] = 9

    found = gradcam.explain(network, pictures, labels, layer, FP32)

    expected = textbook_gradcam(network, layer, inputs, labels).numpy()
    np.testing.assert_allclose(found.maps, expected, atol=0.02)
    assert not found.masks[5].any()
    squares = (np.arange(32) - 15.5) ** 2
    middle = mark_by_hand(1024 - squares - squares[:, None])
    bell = np.exp(-(np.arange(-10, 11) ** 2) / (2 * 5**2))
    for i, image in enumerate(inputs.numpy()):
        assert (found.masks[i] == mark_by_hand(found.maps[i])).all()
        soft = np.pad(image, ((0, 0), (10, 10), (10, 10)), "reflect")
        for axis in (1, 2):
            soft = np.apply_along_axis(np.convolve, axis, soft, bell / bell.sum(), "valid")
        blurred = np.stack([np.where(mask, soft, image) for mask in (found.masks[i], middle)])
        with torch.no_grad():
            shares = network(torch.from_numpy(blurred).float()).softmax(1)[:, labels[i]]
        assert [found.blurred[i], found.control[i]] == pytest.approx(shares.tolist(), abs=0.002)
    assert abs(found.blurred - found.control).max() > 0.02  # otherwise this could not tell them apart


def test_errors_are_chosen_by_probability_or_by_a_seed():
    numbers = torch.arange(9.0)
    logits = torch.stack([-numbers, -2 * numbers], 1)  # the first class, more and more confident
    labels = torch.tensor([1] * 8 + [0])

    orders = [gradcam.choose_errors(logits, labels, 9, seed).tolist() for seed in (0, 0, 1)]

    assert gradcam.choose_errors(logits, labels, 3).tolist() == [7, 6, 5]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == list(range(8))


# ---------------------------------------- pictures
def drawn(command):
    """What gradcam.py prints, the figures that it saves, by their files, and all calls of explain."""
    figures = {}
    calls = []
    explain = gradcam.explain

    def keep(figure, path, needed=True):
        figures[path.name] = figure
        utils.write(path, b"picture")

    def spy(model, pictures, labels, layer, autocast):
        found = explain(model, pictures, labels, layer, autocast)
        calls.append(
            SimpleNamespace(
                pictures=pictures,
                labels=labels.tolist(),
                layer=layer,
                found=found,
            )
        )
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "save_figure", keep)
        patch.setattr(gradcam, "explain", spy)
        log = succeed(command, pictures=True)
    return SimpleNamespace(
        log=log,
        figures=figures,
        calls=calls,
    )


def tiles(figure):
    """For each tile of a page its title, image, map (or None), and whether it has an outline."""
    found = []
    for axis in figure.axes:
        image, heat, *_ = [*axis.images, None, None]
        if image:
            tile = SimpleNamespace(title=axis.get_title(), outlined=bool(axis.collections))
            tile.image = image.get_array()
            tile.heat = heat and heat.get_array()
            found.append(tile)
    return found


@pytest.fixture(scope="session")
def explained(story, tmp_path_factory):
    """What gradcam.py makes of the story, in a copy of its folder; and the network's answers by hand."""
    run = shutil.copytree(story.output, tmp_path_factory.mktemp("explained") / "run")
    with matplotlib.style.context("dark_background"):
        e = drawn(f"gradcam --n 7 --checkpoint {run}/checkpoint.pt")
    e.run = run
    e.test = data.draw_demo("test")
    e.model, _ = gradcam.load_model(run / "checkpoint.pt")
    with torch.no_grad():
        e.shares = e.model(to_input(e.test.images)).softmax(1).numpy()
    e.wrong = e.shares.argmax(1) != e.test.labels
    e.shown = []
    for picture in e.calls[0].pictures:
        is_same = (e.test.images == picture).all((1, 2, 3))
        e.shown.append(int(is_same.argmax()))
    return e


def test_the_most_confident_errors_are_explained_for_the_predicted_and_for_the_true_class(explained):
    for_predicted, for_true = explained.calls
    shares = explained.shares[explained.shown]

    highest = np.sort(explained.shares.max(1)[explained.wrong])[::-1][:7]
    assert shares.max(1) == pytest.approx(highest, abs=1e-4)
    assert for_predicted.labels == shares.argmax(1).tolist()
    assert for_true.labels == explained.test.labels[explained.shown].tolist()
    assert (for_true.pictures == for_predicted.pictures).all()
    assert for_predicted.layer == for_true.layer == "layer4"
    assert gradcam.tell_blurring(torch.from_numpy(shares.max(1)), for_predicted.found) in explained.log


def test_seed_and_layer_choose_other_images_and_maps(explained, tmp_path):
    command = f"gradcam --checkpoint {explained.run}/checkpoint.pt --output {tmp_path}"

    other = drawn(f"{command} --n 7 --seed 5 --layer layer2")

    for_predicted, for_true = other.calls
    labels = torch.from_numpy(explained.test.labels)
    chosen = gradcam.choose_errors(torch.from_numpy(explained.shares), labels, 7, 5)
    assert (for_predicted.pictures == explained.test.images[chosen]).all()
    assert for_predicted.layer == for_true.layer == "layer2"
    assert "Grad-CAM (layer2): " in other.figures["gradcam.png"].get_suptitle()
    assert "the activations of layer2" in (tmp_path / "report.md").read_text()
    assert "chosen at random (seed 5)" in other.log


def test_pages_and_log_name_what_they_show(explained):
    for_predicted, for_true = explained.calls
    names = explained.test.classes
    plain = tiles(explained.figures["misclassified.png"])
    heated = tiles(explained.figures["gradcam.png"])
    log = " ".join(explained.log.split())

    for i, index in enumerate(explained.shown):
        shares = explained.shares[index]
        file = f"test image {index}"
        label = for_predicted.labels[i]
        predicted = f"predicted {names[label]}, {shares[label]:.0%}"
        label = for_true.labels[i]
        true = f"true {names[label]}, {shares[label]:.0%}"
        note = for_predicted.found.note(i)
        assert plain[i].title == f"{file}\n{predicted}\n{true}"
        assert (plain[i].image == explained.test.images[index]).all()
        assert heated[3 * i].title == file
        assert heated[3 * i + 1].title == f"{predicted}\n{note}"
        assert heated[3 * i + 2].title == f"{true}\n{for_true.found.note(i)}"
        assert f"{file} {predicted} {true} {note}" in log
    heading = f"{explained.wrong.sum()} of 500 test images are misclassified; 7 shown, most confident first"
    assert f"demo: {heading}" in log
    title = " ".join(explained.figures["gradcam.png"].get_suptitle().split())
    run = "ResNet18 of width 8 on demo, batch norm, without cutout, seed 1"
    assert title.startswith(f"Grad-CAM (layer4): {heading} {run}")


def test_the_mean_of_the_blur_test_leaves_out_empty_maps():
    masks = np.eye(3, dtype=bool).reshape(3, 3, 1)
    masks[2] = False
    before = torch.tensor([0.9, 0.5, 0.3])
    found = gradcam.Explanation(None, masks, before - 0.4, before - 0.2)

    sentence = gradcam.tell_blurring(before, found)

    assert sentence.startswith("The predicted class's mean probability is 70%; ")
    assert sentence.endswith("outlined fifth blurred, 30%; with the middle fifth blurred instead, 50%.")
    assert [found.note(0), found.note(2)] == ["blurred: 50%", "(empty map)"]


def test_a_page_draws_the_maps_and_outlines_it_is_given():
    maps = np.random.default_rng(0).random((2, 2, 32, 32))
    masks = maps > 2
    masks[0, :, :8] = True  # along the upper edge; of the second explanation nothing is marked
    explanations = [gradcam.Explanation(*both, torch.ones(2), None) for both in zip(maps, masks, strict=True)]
    pictures = random_split(2).images

    titles = ["test image 1", "predicted A CLASS OF CAPITALS, 100%", "true a class with a long name, 0%"]
    figure = gradcam.plot_heatmaps(pictures, [titles, titles], explanations, "heading")

    found = tiles(figure)
    for i, picture in enumerate(pictures):
        assert (found[3 * i].image == picture).all()
        assert (found[3 * i + 1].heat == maps[0, i]).all()
        assert (found[3 * i + 2].heat == maps[1, i]).all()
    assert [tile.outlined for tile in found] == [False, True, False] * 2
    shown = figure.axes[1].images[1]
    assert shown.get_clim() == (maps[0, 0].min(), maps[0, 0].max())
    assert shown.get_cmap()([0.0, 1.0])[:, 3].tolist() == [0, 0.5]  # the opacity
    (outline,) = figure.axes[1].collections[0].get_paths()
    assert (outline.vertices[0] == outline.vertices[-1]).all()  # closed
    assert 7 < outline.vertices[:, 1].max() < 8
    assert_texts_have_room(figure)


def test_own_pictures_are_explained_as_the_network_saw_them(explained, tmp_path):
    file = tmp_path / "photo.jpg"
    Image.fromarray(explained.test.images[3]).resize((640, 400)).save(file)

    flags = f"--output {tmp_path} --layer stem --image {file} {file}"
    own = drawn(f"gradcam --checkpoint {explained.run}/checkpoint.pt {flags}")

    pixels = data.read_image(file)
    shares, labels = explained.model(to_input(pixels[None]))[0].softmax(0).sort(descending=True)
    words = [f"{explained.test.classes[labels[k]]}, {shares[k]:.0%}" for k in range(3)]
    assert f"{file}: {'; '.join(words)}\n" in own.log
    titles = [tile.title.split("\n")[0] for tile in tiles(own.figures["own.png"])]
    assert titles == ["photo.jpg", words[0], words[1]] * 2
    for k in (0, 1):
        assert own.calls[k].labels == [labels[k]] * 2
        assert own.calls[k].layer == "stem"
        assert (own.calls[k].pictures == pixels).all()
    assert sorted(os.listdir(tmp_path)) == ["own.png", "photo.jpg"]


def assert_texts_have_room(figure):
    """No text leaves the page, and none lies over another."""
    texts = []
    draw = Text.draw
    figure.draw_without_rendering()  # as when it is saved, the layout settles in the second drawing
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", lambda text, renderer: texts.append(text) or draw(text, renderer))
        figure.draw_without_rendering()
    level = []
    for text in texts:
        box = text.get_window_extent()
        if box.width > 1:
            assert min(*box.p0, *(figure.bbox.p1 - box.p1)) > -2, text  # a page that is saved has a margin
        if box.width > 1 and text.get_rotation() % 90 == 0:  # the boxes of slanted ones say little
            assert box.count_overlaps(level) == 0, text
            level.append(box)


def make_history(*rows):
    return [dict(zip(ROW, row, strict=True)) for row in rows]


def test_curves_show_the_history_the_best_epoch_and_the_reductions():
    history = make_history(
        (1, 0.1, 2, 0.2, 2.1, 0.3),
        (2, 0.1, 1, 0.4, 2, 0.6),
        (3, 0.03, 0.5, 0.5, 2, 0.5),
    )

    figure = utils.plot_curves(history, "title of the run")

    shown = []
    for axis in figure.axes:
        shown += [f"{line.get_label()}: {np.asarray(line.get_ydata()).tolist()}" for line in axis.lines[:-1]]
        assert list(axis.lines[-1].get_xdata()) == [2.5, 2.5]  # the reduction
    assert shown == [
        "training (augmented): [2.0, 1.0, 0.5]",
        "validation: [2.1, 2.0, 2.0]",
        "training (augmented): [0.2, 0.4, 0.5]",
        "validation: [0.3, 0.6, 0.5]",
        "best: epoch 2, 60.00%: [0.6]",
        "learning rate: [0.1, 0.1, 0.03]",
    ]
    assert_texts_have_room(figure)


NAMES = [
    ["x", "dog"],
    [f"a class with a long name {i}" for i in range(10)],
    [f"Tomato___Spider_mites Two-spotted_spider_mite {i} of the leaves" for i in range(38)],
]


@pytest.mark.parametrize("names", NAMES)
def test_a_confusion_matrix_can_be_read(names):
    confusion = 3 * torch.eye(len(names), dtype=torch.int64)
    confusion[0, 1] = 1

    figure = utils.plot_confusion(confusion, names, "title")

    axis = figure.axes[0]
    rows = [text.get_text().split("  ") for text in axis.get_yticklabels()]
    assert rows[0][0].startswith(names[0][:5])
    assert rows[0][1] == "75.0%"
    assert len({name for name, _ in rows}) == len(names)
    assert axis.images[0].get_array()[0, 1] == 0.25
    counts = {text.get_position(): text.get_text() for text in axis.texts}
    if len(names) <= 30:
        assert counts[1, 0] == "1"  # (predicted, true)
    assert_texts_have_room(figure)


def test_pictures_do_not_depend_on_the_style_a_user_has_set(explained):
    for figure in explained.figures.values():
        assert figure.get_facecolor() == (1, 1, 1, 1)


# ---------------------------------------- report
def tables(report):
    """The rows, without the head, of the tables under each heading."""
    found = {}
    for section in report.split("\n## ")[1:]:
        heading, _, body = section.partition("\n")
        found[heading] = re.findall(r"^\| (.*) \|$", body, re.M)[2:]
    return found


@pytest.fixture(scope="session")
def report(explained):
    return (explained.run / "report.md").read_text()


def test_the_report_tells_results_and_settings(explained, checkpoint, report):
    rows = tables(report)["Highlights"]
    techniques = "\n".join(tables(report)["Techniques used"])

    assert f"test accuracy | {checkpoint['result']['test_accuracy']:.2%}" in rows
    assert "validation accuracy | 60.00% in epoch 5 of 8" in rows
    assert "images | 160 training, 40 validation, 500 test" in rows
    assert f"hardware | cpu (threads: {THREADS}), float32" in rows
    assert "seed | 1" in rows
    assert "0.2 of each label" in techniques
    assert (
        "24 images per step, momentum 0.9, weight decay 0.002, learning rate 0.06 from step 8 on"
        in techniques
    )
    assert "factor 0.5, patience 0, threshold 10%; reduced after epoch 3, 5, 7; last 0.0075" in techniques
    assert "CutOut" not in techniques
    std = checkpoint["model"]["normalize.std"].flatten().tolist()
    assert "standard deviation {:.4f} {:.4f} {:.4f}".format(*std) in techniques
    assert "The demo: ten classes" in report
    assert "The test images had no part in that." in report
    assert model_script.summary(explained.model) in report
    assert re.search(rf"\npython train.py --data demo .*{STORY}.*\npython gradcam.py --n 7 .*\n", report)


def test_the_report_tells_classes_confusions_and_the_log(checkpoint, report):
    confusion = np.array(checkpoint["result"]["confusion"])
    names = checkpoint["classes"]
    shares = confusion.diagonal() / confusion.sum(1)
    for row, name, share in zip(tables(report)["Graphs"], names, shares, strict=True):
        assert row == f"{name} | {share:.2%}"

    np.fill_diagonal(confusion, 0)
    told = re.findall(r"true (\w+), predicted (\w+): (\d+)", report)
    for true, predicted, count in told:
        assert confusion[names.index(true), names.index(predicted)] == int(count)
    assert int(told[4][2]) == sorted(confusion.flatten())[-5]

    for line, row in zip(tables(report)["Training log"], checkpoint["history"], strict=True):
        assert line.startswith(f"{row['epoch']} | {row['train_loss']:.3f} | {row['train_accuracy']:.1%} | ")
        assert f" | {row['val_loss']:.3f} | {row['val_accuracy']:.2%} | {row['lr']:.2g} | " in line


def test_the_report_shows_the_images_of_the_log_and_only_pictures_that_are_there(explained, report):
    lines = [" ".join(line.split()) for line in explained.log.splitlines()]
    for row in tables(report)["Images"]:
        file, guess, truth, note = row.split(" | ")
        assert f"{file} predicted {guess} true {truth} {note}" in lines
    assert re.search(r"^The predicted class's mean.*$", explained.log, re.M)[0] in report.splitlines()
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", report)
    assert len(pictures) == 5
    assert all((explained.run / name).exists() for name in pictures)


def test_a_report_of_own_images_names_files_and_training_images_among_the_test_images(images, tmp_path):
    own = shutil.copytree(images, tmp_path / "CIFAR-10")
    shutil.copytree(own / "train/cat", own / "test/cat", dirs_exist_ok=True)
    log = succeed(f"train --data {own} {TINY} --output {tmp_path}/run")
    (tmp_path / "link.pt").symlink_to(tmp_path / "run/checkpoint.pt")

    explained = drawn(f"gradcam --checkpoint {tmp_path}/link.pt --n 3")

    report = (tmp_path / "run/report.md").read_text()
    for text in (log, report):
        assert "8 test images are also training images" in text
    assert "had no part in that" not in report
    assert "CIFAR-10: a custom dataset of 2 classes" in report
    assert "never reduced" in report
    for row, picture in zip(tables(report)["Images"], explained.calls[0].pictures, strict=True):
        file = row.split(" | ")[0]
        assert (data.read_image(own / "test" / file) == picture).all()


def test_with_other_test_images_there_are_pictures_but_no_report(finished, images, tmp_path):
    shutil.copytree(images, tmp_path / "fewer")
    (tmp_path / "fewer/test/cat/17.png").unlink()

    log = succeed(
        f"gradcam --checkpoint {finished}/checkpoint.pt --data {tmp_path}/fewer --output {tmp_path}/shown"
    )

    assert "No report, because these are not the test images of the run." in log
    assert sorted(os.listdir(tmp_path / "shown")) == ["gradcam.png", "misclassified.png"]


def test_a_run_without_errors_has_a_report_that_says_so(explained, checkpoint, tmp_path, monkeypatch):
    right = explained.test.subset(np.flatnonzero(~explained.wrong))
    changed = copy.deepcopy(checkpoint)
    changed["facts"]["counts"]["test"] = np.bincount(right.labels).tolist()
    changed["history"][0]["seconds"] = 5000  # 1:23:20
    torch.save(changed, tmp_path / "checkpoint.pt")
    monkeypatch.setattr(data, "load_split", lambda *_: right)

    succeed(f"gradcam --checkpoint {tmp_path}/checkpoint.pt")

    report = (tmp_path / "report.md").read_text()
    assert f"\n0 of {len(right.labels)} test images are misclassified.\n" in report
    assert "| training time | 1:23:" in report
    assert "gradcam.png" not in report


def test_an_edited_report_stays(explained, tmp_path):
    command = f"gradcam --checkpoint {explained.run}/checkpoint.pt --output {tmp_path} --n"
    report = tmp_path / "report.md"
    succeed(f"{command} 1")
    report.write_bytes(report.read_bytes().replace(b"\n", b"\r\n"))  # other ends of lines are no edit
    succeed(f"{command} 2")
    edited = report.read_text() + "My own words."
    report.write_text(edited)
    (tmp_path / "report-new.md").write_text("mine")

    log = succeed(f"{command} 3")

    assert "; 2 shown" in edited
    assert f"{report} was edited, so it stays" in log
    assert report.read_text() == edited
    assert "; 3 shown" in (tmp_path / "report-new-new.md").read_text()
    assert (tmp_path / "curves.png").exists()


# ---------------------------------------- files and commands
class Malicious(str):  # the path of a folder that is made when this is unpickled
    def __reduce__(self):
        return os.mkdir, (str(self),)


def test_bad_checkpoints_are_refused_and_run_no_code(finished, tmp_path):
    good = (finished / "checkpoint.pt").read_bytes()
    bad = tmp_path / "bad.pt"
    flipped = bytes(byte ^ (i % 999 == 0) for i, byte in enumerate(good))  # a bit now and then
    cases = [b"text", good[:-1], flipped]
    for state in ({"result": Malicious(tmp_path / "code has run")}, {"test_accuracy": 0.5}):
        torch.save(state, bad)  # the second is as in earlier versions
        cases.append(bad.read_bytes())

    for case in cases:
        bad.write_bytes(case)
        with pytest.raises(utils.RunError, match=r"damaged or from another version .*: do something"):
            utils.load_checkpoint(bad, "do something")
    assert list(tmp_path.iterdir()) == [bad]


BAD_FLAGS = "train --epochs 1e30, train --epoch 1, train --batch-size x, train --lr nan, train --lr 0, "
BAD_FLAGS += (
    "train --factor 1, train --limit 1, train --val-split 0, train --patience -1, train --workers -1, "
)
BAD_FLAGS += "train --weight-decay 2, train --label-smoothing 1, train --norm x, train --seed 4294967296, "
BAD_FLAGS += "train --device x, train --without x, gradcam --n 0, gradcam --n 101, gradcam --layer layer9, "
BAD_FLAGS += "gradcam --seed -1, gradcam --nn 1"


def test_the_defaults_of_the_flags():
    parse = train.get_parser().parse_args
    assert parse([]) == parse(DEFAULTS.split())
    assert train.PLATEAU_THRESHOLD == 0.01


@pytest.mark.parametrize("command", BAD_FLAGS.split(", "))
def test_a_bad_flag_is_named(command):
    assert_one_line_error(call(f"{command} --data none"), 2, command.split()[1])


@pytest.mark.parametrize("script, flags", [("train", 18), ("gradcam", 8)])
def test_help_shows_real_defaults(script, flags):
    text = succeed(f"{script} --help")
    assert "".join(text.split()).count("(default:") == flags
    assert "None" not in text


BAD_COMMANDS = [
    ("train --width 4", 2, "argument --width: 4 is not between 8 and 1024"),
    ("train --epochs 0", 2, "argument --epochs: 0 is not at least 1"),
    ("train --data demo --limit 5", 1, "--limit 5 leaves no image of"),
    ("train --resume --overwrite", 2, "not allowed with"),
    ("train --resume", 1, "there is no file outputs/last.pt"),
    ("train --resume --output bad", 1, "bad/last.pt is damaged"),
    ("train --device cuda", 1, "try --device cpu"),
    ("train --precision fp16 --device cpu", 1, "choose auto"),
    ("train --data=~/none", 1, "home/none is missing or empty"),
    ("train --data demo --output=~/file.txt/run --device cpu --width 8", 1, "home/file.txt"),
    (f"train --data IMAGES --output loss --lr 1e6 {TINY}", 1, "no longer finite: try a smaller --lr"),
    ("gradcam", 1, "there is no file outputs/checkpoint.pt: run train.py first"),
    ("gradcam --checkpoint=~/none.pt", 1, "home/none.pt"),
    ("gradcam --checkpoint bad/last.pt", 1, "name the checkpoint.pt of a run"),
    ("gradcam --checkpoint good.pt --image ~/none.jpg", 1, "home/none.jpg cannot be read"),
    ("gradcam --checkpoint good.pt --data demo", 1, "demo does not have the classes of the run"),
    ("gradcam --checkpoint good.pt --output bad", 1, "bad holds another run"),
    ("gradcam --image" + 101 * " x.png", 2, "--image: 101 files are more than 100"),
]


@pytest.mark.parametrize("command, status, words", BAD_COMMANDS)
def test_a_bad_command_is_one_line(finished, images, tmp_path, monkeypatch, command, status, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # of ~, as the shell leaves it in --data=~/none
    lay_out(tmp_path, "bad home/file.txt")
    (tmp_path / "bad/last.pt").write_bytes(b"damaged")
    shutil.copy(finished / "checkpoint.pt", "good.pt")

    done = call(command.replace("IMAGES", str(images)))

    assert_one_line_error(done, status, words)


# ---------------------------------------- paste, notebook, import
PIECES = [  # a script, what is copied from it, and a cell that uses it
    (gradcam, "GradCAM", "assert GradCAM(model).heatmaps(inputs, labels).shape == (2, 32, 32)"),
    (gradcam, "choose_errors", "assert choose_errors(torch.eye(2), labels, 5).tolist() == [0, 1]"),
    (data, "augmentations", "assert len(augmentations([0.5, 0.5, 0.5])) == 4"),
    (utils, "best_epoch find_reductions plot_curves", "plot_curves(history, 'title').savefig"),
    (utils, "shorten plot_confusion", "plot_confusion(torch.eye(2), ['cat', 'dog'], 'title').savefig"),
    (utils, "wrap draw_outline plot_grid", "plot_grid(images, ['a', 'b'], 2, 'title', overlays).savefig"),
]


@pytest.mark.parametrize("module, pieces, cell", PIECES)
def test_a_piece_can_be_pasted_below_the_imports_of_packages(module, pieces, cell):
    nodes = ast.parse(Path(module.__file__).read_text("utf-8")).body
    definitions = {node.name: node for node in nodes if hasattr(node, "name")}
    names = list(definitions)
    first = names.index(pieces.split()[0])
    assert names[first:][: len(pieces.split())] == pieces.split()  # helpers stand right above
    images = random_split(2).images
    cells = {
        "torch": torch,
        "model": ResNet18(width=8),
        "images": images,
        "inputs": to_input(images),
        "labels": torch.tensor([1, 0]),
        "history": make_history((1, 0.1, 2, 0.2, 2.1, 0.3)),
        "overlays": [None, (np.eye(32), np.eye(32, dtype=bool))],
    }
    for node in nodes:
        code = ast.unparse(node)
        if re.match("import|from", code) and not re.search(r"\b(data|utils|model)\b", code):
            exec(code, cells)

    for name in pieces.split():
        exec(ast.unparse(definitions[name]), cells)

    exec(cell, cells)


def test_the_example_of_the_readme_runs(finished, images, tmp_path, monkeypatch):
    readme = (HERE / "README.md").read_text("utf-8")
    code = re.search(r"```python\n(import torch.*?)```", readme, re.S)[1]
    monkeypatch.chdir(tmp_path)
    shutil.copy(images / "test/cat/17.png", "photo.jpg")
    names = {}

    exec(code.replace("outputs/checkpoint.pt", str(finished / "checkpoint.pt")), names)

    assert names["heatmap"].shape == (32, 32)
    assert 0.5 < names["heatmap"].max() <= 1


def test_a_notebook_trains_explains_and_shows_the_pictures(images, tmp_path):
    pytest.importorskip("ipykernel")
    start_kernel = pytest.importorskip("jupyter_client.manager").start_new_kernel
    kernel, client = start_kernel(cwd=HERE)
    outputs = []
    cells = [  # a second run, with workers as on Windows and macOS
        "%run train.py --help",
        "import torch.multiprocessing as mp; mp.set_start_method('spawn', force=True)",
        f"%run train.py --data {images} --output {tmp_path} {TINY} --epochs 1 --workers 1",
        f"%run gradcam.py --n 1 --checkpoint {tmp_path}/checkpoint.pt",
        "%run train.py --resume --output none",
    ]
    try:
        for cell in cells:
            messages = []
            client.execute_interactive(cell, output_hook=messages.append, allow_stdin=False, timeout=60)
            outputs.append(str(messages))
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)

    assert "test accuracy" in outputs[2]
    assert "of 16 test images are misclassified" in outputs[3]
    assert "error: there is no file" in outputs[4]
    assert [output.count("image/png") for output in outputs] == [0, 0, 2, 2, 0]


IMPORT = """import importlib.metadata as metadata, os, runpy, torch, model
seed = torch.initial_seed()
assert not {"albumentations", "matplotlib", "cv2", "torchvision"} & set(sys.modules)
metadata.entry_points, sys.modules["matplotlib_inline"] = lambda **_: metadata.EntryPoints(), None
import data, utils, train, gradcam
assert seed == torch.initial_seed() and not os.listdir()
for words in (sys.argv[2:], sys.argv[1:2]):
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
"""


def test_imports_do_nothing_and_the_scripts_run_from_any_folder_with_workers(images, tmp_path):
    """Also in a process of a notebook, which sets MPLBACKEND to a package that may not be there."""
    variables = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore:This DataLoader will",  # for a machine with few cores
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }
    flags = f"--data {os.path.relpath(images, tmp_path)} {TINY} --epochs 1 --workers 2 --precision bf16"

    done = run_code(IMPORT, f"{HERE}/gradcam.py {HERE}/train.py {flags}", cwd=tmp_path, env=variables)

    assert not done.stderr
    assert done.returncode == 0
    expected = [*train.OUTPUT_FILES, "misclassified.png", "gradcam.png", "report.md"]
    assert sorted(os.listdir(tmp_path / "outputs")) == sorted(expected)
