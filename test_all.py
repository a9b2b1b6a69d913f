"""Tests of every promise; no network, under three minutes on two cores.

python -m pytest -q test_all.py
"""

import copy
import csv
import gc
import hashlib
import http.server
import io
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import warnings
from collections import OrderedDict
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

import data
import gradcam
import model as model_script
import train
import utils
from model import ResNet18, count_parameters

pytestmark = pytest.mark.filterwarnings("error")
HERE = Path(__file__).parent
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of CIFAR-10


def script(*words, cwd=None) -> subprocess.CompletedProcess:
    """Run one of the scripts in a process of its own, as a user does."""
    command = [sys.executable, str(HERE / words[0]), *map(str, words[1:])]
    return subprocess.run(command, cwd=cwd, timeout=120, capture_output=True, text=True)


def call(module, *words) -> subprocess.CompletedProcess:
    """The same in this process, which saves the seconds of the imports."""
    out, err, status = io.TextIOWrapper(io.BytesIO()), io.StringIO(), 0
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, words)])
        try:
            utils.run(module.main)
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1
            print(stop.code if status == 1 else "", file=err)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    out.seek(0)
    return subprocess.CompletedProcess(words, status, out.read(), err.getvalue())


def assert_one_line_error(done: subprocess.CompletedProcess, status: int, *words: str) -> None:
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    message = done.stderr.strip().splitlines()[-1]
    assert "error: " in message
    for word in words:
        assert word in message, message


def write_images(folder: Path, classes=("cat", "dog"), count=8, seed=0) -> Path:
    """A folder of images whose classes differ in brightness."""
    rng = np.random.default_rng(seed)
    for split in ("train", "test"):
        for level, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 100, (32, 32, 3)) + 150 * level // max(1, len(classes) - 1)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


TINY = ("--epochs", 2, "--batch-size", 4, "--workers", 0, "--device", "cpu", "--precision", "fp32")


@pytest.fixture(scope="session")
def finished(images, tmp_path_factory) -> Path:
    """The output folder of a run of two epochs on eight images a class."""
    output = tmp_path_factory.mktemp("finished")
    done = call(train, "--data", images, "--output", output, *TINY)
    assert done.returncode == 0, done.stderr
    (output / "log").write_text(done.stdout)
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
    with pytest.raises(ValueError, match="batch, layer"):
        ResNet18(norm="group")


def test_model_prints_its_table(capsys):
    model_script.main()
    table = capsys.readouterr().out
    assert "11,173,962" in table and "512 x 4 x 4" in table and "2,099,712" in table


def test_imports_do_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import torch; seed = torch.initial_seed(); "
    code += "import model; assert not {'albumentations', 'matplotlib', 'cv2'} & set(sys.modules); "
    code += "import data, utils, train, gradcam; assert 'albumentations' not in sys.modules; "
    code += "assert seed == torch.initial_seed()"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr, list(tmp_path.iterdir())) == (0, "", "", [])


# ---------------------------------------------------------------- data.py


def random_split(count: int, seed: int = 0) -> data.Split:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return data.Split(pixels, rng.integers(0, 10, count), [str(i) for i in range(10)])


def epoch_of(loader, epoch: int) -> list:
    loader.sampler.epoch = epoch
    return [(images.clone(), labels.clone()) for images, labels in loader]


def same(a: list, b: list) -> bool:
    return all(torch.equal(x, y) and torch.equal(s, t) for (x, s), (y, t) in zip(a, b, strict=True))


def test_batches_depend_on_seed_epoch_and_number_alone():
    split = random_split(100)
    reference = {epoch: epoch_of(data.train_loader(split, MEAN, 16, 3, 0), epoch) for epoch in (1, 2)}
    assert [len(labels) for _, labels in reference[1]] == [16] * 6 + [4]
    warnings.filterwarnings("ignore", "This DataLoader will create")  # four workers on two cores
    for workers in (1, 2, 4):
        loader = data.train_loader(split, MEAN, 16, 3, workers)
        assert same(epoch_of(loader, 1), reference[1])
        assert same(epoch_of(loader, 2), reference[2])  # the workers are the same ones
        loader = data.train_loader(split, MEAN, 16, 3, workers)
        assert same(epoch_of(loader, 2), reference[2])  # as after a resume
    assert not same(reference[1], reference[2])
    assert not same(reference[1], epoch_of(data.train_loader(split, MEAN, 16, 4, 0), 1))


def test_an_epoch_holds_every_image_once_and_labels_stay():
    split = random_split(50)
    # Augmentation keeps a flat image.
    split.images[:] = np.arange(50, dtype=np.uint8)[:, None, None, None] + 100
    seen = epoch_of(data.train_loader(split, [1.0, 1.0, 1.0], 8, 0, 0), 1)
    values = torch.cat([images.amin((1, 2, 3)) for images, _ in seen]).long() - 100
    assert values.sort().values.tolist() == list(range(50))
    assert torch.equal(torch.cat([labels for _, labels in seen]), torch.from_numpy(split.labels)[values])


def augmentation_draws(count: int) -> dict[str, np.ndarray]:
    """What was decided for each of `count` copies of one image, read off the pixels."""
    column = np.arange(32, dtype=np.uint8) * 4 + 60
    image = np.zeros((32, 32, 3), np.uint8)
    image[..., 0], image[..., 1] = column[None, :], column[:, None]
    split = data.Split(np.repeat(image[None], count, 0), np.zeros(count, int), ["one"])
    hole = (0, 0, 1.0)
    batches = epoch_of(data.train_loader(split, hole, 500, 0, 0), 1)
    pictures = torch.cat([images for images, _ in batches]).numpy().astype(int)
    cut = pictures[..., 2] == 255
    visible = np.where(cut[..., None], -1, pictures)
    rising = np.array(
        [np.diff(p[..., 0], axis=1)[(p[:, 1:, 0] >= 0) & (p[:, :-1, 0] >= 0)].sum() > 0 for p in visible]
    )
    # Unrotated, the first channel is the same along each column (outside the hole).
    level = np.array(
        [
            (np.where(c, 0, p[..., 0]).max(0) == np.where(c, 999, p[..., 0]).min(0))[(~c).any(0)].all()
            for p, c in zip(pictures, cut, strict=True)
        ]
    )
    corner = np.array([np.argwhere(c)[0] if c.any() else (-1, -1) for c in cut])
    return {
        "flip": ~rising,
        "rotate": ~level,
        "cutout": cut.any((1, 2)),
        "corner": corner,
        "area": cut.sum((1, 2)),
        "pictures": pictures,
    }


def test_augmentation_statistics_are_as_documented():
    draws = augmentation_draws(4000)
    for name in ("flip", "rotate", "cutout"):
        chance = getattr(data, f"{name.upper()}_PROBABILITY")
        assert abs(draws[name].mean() - chance) < 0.035, name  # four standard deviations
    for a, b in (("flip", "rotate"), ("flip", "cutout"), ("rotate", "cutout")):
        correlation = np.corrcoef(draws[a], draws[b])[0, 1]
        assert abs(correlation) < 0.065, (a, b, correlation)  # 4 / sqrt(4000); one shared seed would give 1
    assert set(draws["area"]) == {0, data.CUTOUT_SIZE**2}
    corners = draws["corner"][draws["cutout"]]
    for axis in (0, 1):  # chi-square with 16 degrees of freedom: 45 has a probability of 1e-4
        counts = np.bincount(corners[:, axis], minlength=17)
        assert len(counts) == 17 and ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 45
    plain = draws["pictures"][~draws["flip"] & ~draws["rotate"] & ~draws["cutout"]]
    for channel in (0, 1):  # the middle pixel tells the crop's offset: 9 values of equal chance
        offsets = (plain[:, 16, 16, channel] - 60) // 4 - 16
        counts = np.bincount(offsets + 4, minlength=9)
        assert len(counts) == 9 and ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 32


def test_cutout_leaves_the_rest_of_the_image_alone():
    image = random_split(1).images[0]
    cutout = data.augmentations(MEAN)["CutOut"]
    out = cutout(image=image, force_apply=True)["image"]
    changed = (out != image).any(2)
    rows, columns = changed.any(1).nonzero()[0], changed.any(0).nonzero()[0]
    assert rows.max() - rows.min() < 16 and columns.max() - columns.min() < 16
    assert (out[changed] == [round(255 * m) for m in MEAN]).all()


def test_images_of_a_batch_are_augmented_differently():
    pictures = augmentation_draws(200)["pictures"]
    assert len(np.unique(pictures.reshape(200, -1), axis=0)) > 150


def test_split_is_stratified_disjoint_and_from_the_seed():
    labels = np.random.default_rng(0).permutation(np.arange(5000) % 10)
    training, validation = data.split_validation(labels, 0.1, None, 0)
    assert np.bincount(labels[validation]).tolist() == [50] * 10
    assert sorted([*training, *validation]) == list(range(5000))
    again = data.split_validation(labels, 0.1, None, 0)
    assert (again[0] == training).all() and (again[1] == validation).all()
    assert (data.split_validation(labels, 0.1, None, 1)[1] != validation).any()
    training, validation = data.split_validation(labels, 0.1, 900, 0)
    assert (
        np.bincount(labels[training]).tolist() == [90] * 10
        and np.bincount(labels[validation]).tolist() == [10] * 10
    )
    assert not set(training) & set(validation)
    assert len(data.split_validation(labels, 0, None, 0)[1]) == 0
    with pytest.raises(utils.RunError, match="4500"):
        data.split_validation(labels, 0.1, 4501, 0)


def test_statistics_and_normalisation_agree_with_numpy():
    images = random_split(40).images // np.array([1, 2, 3], np.uint8)
    mean, std = data.channel_statistics(images)
    np.testing.assert_allclose(mean, (images / 255).mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(std, (images / 255).std((0, 1, 2)), rtol=1e-6)
    normal = data.normalize(torch.from_numpy(images), mean, std)
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
    assert loaded.classes == ["a", "b"] and loaded.labels.tolist() == [0, 1]
    assert loaded.images.shape == (2, 32, 32, 3) and loaded.images[:, 0, 0].tolist() == [[50] * 3, [200] * 3]


def test_images_of_any_kind_are_read_as_rgb(tmp_path):
    pixels = random_split(1).images[0]
    colour, grey = Image.fromarray(pixels), Image.fromarray(pixels[..., 0])
    transparent = Image.fromarray(np.dstack([pixels, pixels[..., :1]]))
    colour.save(tmp_path / "colour.png")
    grey.save(tmp_path / "grey.png")
    transparent.save(tmp_path / "transparent.png")
    grey.convert("P").save(tmp_path / "palette.png")
    colour.save(tmp_path / "animated.png", save_all=True, append_images=[transparent.convert("RGB"), colour])
    for name, expected in (
        ("colour", pixels),
        ("grey", pixels[..., :1].repeat(3, 2)),
        ("transparent", pixels),
        ("palette", pixels[..., :1].repeat(3, 2)),
        ("animated", pixels),
    ):
        assert (np.asarray(data.read_image(tmp_path / f"{name}.png")) == expected).all(), name


BAD_IMAGES = {
    "cut.png": lambda good: good[:60],
    "empty.png": lambda good: b"",
    "text.jpg": lambda good: b"no image",
    "flipped.png": lambda good: good[:300] + bytes([good[300] ^ 255]) + good[301:],
    "grey16.png": lambda good: encoded(np.full((32, 32), 1000, np.uint16)),
    "float.tif": lambda good: encoded(np.ones((32, 32), np.float32), "tiff"),
    "huge.png": lambda good: encoded(np.zeros((10_000, 10_000), np.uint8)),
}


def encoded(pixels: np.ndarray, kind: str = "png") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image_is_named(tmp_path, name):
    write_images(tmp_path)
    file = tmp_path / "train/cat" / name
    file.write_bytes(BAD_IMAGES[name]((tmp_path / "train/cat/3.png").read_bytes()))
    with pytest.raises(utils.RunError, match=f"{name} cannot be read as an image: repair or remove it"):
        data.load_split(str(tmp_path), "train")


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda folder: [f.unlink() for f in (folder / "train/dog").iterdir()], ["dog"]),
        (lambda folder: shutil.rmtree(folder / "test/dog"), ["dog", "only one"]),
        (lambda folder: shutil.rmtree(folder / "test"), ["test"]),
    ],
)
def test_bad_image_folders_are_named(tmp_path, damage, words):
    damage(write_images(tmp_path))
    with pytest.raises(utils.RunError) as error:
        data.load_train_test(str(tmp_path))
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("place", ["", "dog"])
def test_nothing_is_downloaded_into_a_folder_of_loose_images(tmp_path, place):
    (tmp_path / place).mkdir(exist_ok=True)
    Image.new("RGB", (32, 32)).save(tmp_path / place / "a.PNG")
    with pytest.raises(utils.RunError, match="train/<class>"):
        data.load_train_test(str(tmp_path))
    assert not (tmp_path / "lock").exists()


# ---------------------------------------------------------------- the download


class Server(http.server.BaseHTTPRequestHandler):
    """/good delivers the archive; /slow a byte at a time; /cut half; /corrupt one wrong byte; else 404."""

    archive = b""

    def do_GET(self):
        kind = self.path.strip("/")
        if kind not in ("good", "slow", "cut", "corrupt"):
            return self.send_error(404)
        body = self.archive
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if kind == "corrupt":
            body = body[:-1] + bytes([body[-1] ^ 1])
        try:
            if kind == "slow":
                for i in range(len(body)):
                    self.wfile.write(body[i : i + 1])
                    time.sleep(0.05)
            else:
                self.wfile.write(body[: len(body) // 2] if kind == "cut" else body)
        except OSError:
            pass  # the client gave up

    def log_message(self, *_):
        pass


@pytest.fixture
def small_cifar10(monkeypatch):
    """A CIFAR-10 of ten images a file, with checksums of its own, and a local server that has it."""
    rng, files, members = np.random.default_rng(0), {}, io.BytesIO()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        files[name] = pickle.dumps(
            {"data": rng.integers(0, 256, (10, 3072), dtype=np.uint8), "labels": list(range(10))}
        )
    files["batches.meta"] = pickle.dumps({"label_names": [f"class{i}" for i in range(10)]})
    with tarfile.open(fileobj=members, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    sums = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(data.CIFAR10, "train_list", [[n, sums[n]] for n in files if n.startswith("data")])
    monkeypatch.setattr(data.CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
    monkeypatch.setattr(data.CIFAR10, "meta", meta)
    archive = members.getvalue()
    md5 = hashlib.md5(archive).hexdigest()
    monkeypatch.setattr(data.CIFAR10, "tgz_md5", md5)
    monkeypatch.setattr(Server, "archive", archive)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", archive, md5
    server.shutdown()
    server.server_close()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_download_goes_on_to_the_address_that_delivers(small_cifar10, tmp_path, capfd):
    address, archive, md5 = small_cifar10
    refusing = "http://127.0.0.1:9/none"
    urls = {
        refusing: 9,
        **{f"{address}/{kind}": 2 for kind in ("missing", "slow", "cut", "corrupt")},
        f"{address}/good": 9,
    }
    data.fetch_cifar10(tmp_path, urls, md5)
    told = capfd.readouterr().err
    assert told.count("downloading") == 6 and told.count("failed") == 4 and told.count("too slow") == 1
    assert (tmp_path / "cifar-10-python.tar.gz").read_bytes() == archive
    assert not list(tmp_path.glob("*.part"))
    assert len(data.load_split(str(tmp_path), "train").labels) == 50


def test_an_archive_in_the_folder_is_used_and_a_damaged_one_named(small_cifar10, tmp_path):
    _, archive, md5 = small_cifar10
    file = tmp_path / "cifar-10-python.tar.gz"
    file.write_bytes(archive[:-5])
    with pytest.raises(utils.RunError, match="tar.gz is incomplete or damaged.*delete it"):
        data.fetch_cifar10(tmp_path, {}, md5)
    file.write_bytes(archive)
    data.fetch_cifar10(tmp_path, {}, md5)
    assert data.load_split(str(tmp_path), "test").classes[3] == "class3"
    (tmp_path / "cifar-10-batches-py/test_batch").write_bytes(b"damaged")
    data.fetch_cifar10(tmp_path, {}, md5)  # unpacked again
    assert len(data.load_split(str(tmp_path), "test").images) == 10


def test_without_any_address_three_ways_out_are_named(tmp_path):
    with pytest.raises(utils.RunError, match=r"cifar-10-python.tar.gz.*train/<class>.*--data demo"):
        data.fetch_cifar10(tmp_path, {})
    with pytest.raises(utils.RunError, match="no folder"):
        data.load_split(str(tmp_path / "nowhere"), "train")


# ---------------------------------------------------------------- utils.py


def test_precision_follows_the_hardware(monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert utils.choose_precision("auto", cuda) is torch.float16  # a T4
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert utils.choose_precision("auto", cuda) is torch.bfloat16
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert utils.choose_precision("auto", cpu) is torch.bfloat16
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert utils.choose_precision("auto", cpu) is torch.float32
    assert utils.choose_precision("bf16", cpu) is torch.bfloat16
    with pytest.raises(utils.RunError, match="fp16 needs a GPU"):
        utils.choose_precision("fp16", cpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(utils.RunError, match="--device cpu"):
        utils.choose_device("cuda")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "file"
    file.write_text("old")
    with pytest.raises(ZeroDivisionError), utils.replacing(file) as writer:
        writer.write(b"half")
        1 / 0  # noqa: B018
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]
    with utils.replacing(file) as writer:
        writer.write(b"new")
    assert file.read_text() == "new" and list(tmp_path.iterdir()) == [file]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_clear_error(tmp_path):
    (tmp_path / "last.pt").write_bytes(b"old")
    (tmp_path / "last.pt.tmp").symlink_to("/dev/full")
    with pytest.raises(utils.RunError, match="last.pt cannot be written .No space left"):
        utils.save_checkpoint({"kind": "checkpoint"}, tmp_path / "last.pt")
    assert (tmp_path / "last.pt").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(os.name != "posix", reason="needs file-size limits")
def test_a_file_size_limit_is_one_clear_error(tmp_path):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        with pytest.raises(utils.RunError, match="last.pt cannot be written .File too large"):
            utils.save_checkpoint({"kind": "last state", "model": torch.zeros(10_000)}, tmp_path / "last.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_a_second_run_in_the_same_folder_is_refused(images, tmp_path):
    (tmp_path / "lock").write_text("left by a run that was killed")
    with utils.lock(tmp_path):
        second = script("train.py", "--data", images, "--output", tmp_path, *TINY)
        assert_one_line_error(second, 1, "another run", str(tmp_path))
        assert [file.name for file in tmp_path.iterdir()] == ["lock"]
    assert not list(tmp_path.iterdir())


class Malicious:
    def __reduce__(self):
        return os.system, ("touch /tmp/malicious-code-has-run",)


def test_bad_checkpoints_are_refused_and_run_no_code(finished, tmp_path):
    good = (finished / "checkpoint.pt").read_bytes()
    bad = tmp_path / "bad.pt"
    rng = np.random.default_rng(0)
    cases = [b"", b"text", good[: len(good) // 2], good[:-1], pickle.dumps({"kind": "checkpoint"})]
    for position in rng.integers(1000, len(good) - 10_000, 5):  # inside the tensors
        cases.append(good[:position] + bytes([good[position] ^ 64]) + good[position + 1 :])
    for case in cases:
        bad.write_bytes(case)
        with pytest.raises(utils.RunError, match="bad.pt"):
            utils.load_checkpoint(bad, "checkpoint")
    torch.save({"kind": "checkpoint", "model": Malicious()}, bad)
    with pytest.raises(utils.RunError):
        utils.load_checkpoint(bad, "checkpoint")
    assert not Path("/tmp/malicious-code-has-run").exists()
    for state in ({"kind": "last state"}, {"kind": "checkpoint", "epoch": 1}, {"epoch": 1}, [1, 2]):
        torch.save(state, bad)
        with pytest.raises(utils.RunError, match="is no checkpoint"):
            utils.load_checkpoint(bad, "checkpoint")
    with pytest.raises(utils.RunError, match="is a folder: name the file .*checkpoint.pt"):
        utils.load_checkpoint(tmp_path, "checkpoint")
    with pytest.raises(utils.RunError, match="no file .*train.py"):
        utils.load_checkpoint(tmp_path / "missing.pt", "checkpoint")
    state = utils.load_checkpoint(finished / "checkpoint.pt", "checkpoint")
    for norm, weights in (("layer", state["model"]), ("batch", {}), ("batch", [1]), ("batch", {"a": 1})):
        utils.save_checkpoint({**state, "norm": norm, "model": weights}, bad)
        assert_one_line_error(call(gradcam, "--checkpoint", bad), 1, "bad.pt", "another network")


def test_progress_writes_only_to_a_terminal(capsys):
    utils.Progress().show("half")
    assert capsys.readouterr().out == ""
    assert [utils.clock(s) for s in (5, 65, 3725)] == ["0:05", "1:05", "1:02:05"]


# ---------------------------------------------------------------- train.py


def test_a_run_writes_what_it_promises(finished):
    log = (finished / "log").read_text()
    assert "14 training, 2 validation, 16 test images" in log and "cpu, float32" in log
    assert "1/2" in log and "2/2" in log and "Test accuracy" in log and "gradcam.py" in log
    assert "\r" not in log
    with open(finished / "history.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    for row in rows:
        assert all(math.isfinite(float(value)) for value in row.values())
        assert float(row["images_per_second"]) > 0 and 0 <= float(row["val_accuracy"]) <= 1
    for name in ("curves.png", "confusion.png"):
        assert np.asarray(Image.open(finished / name)).std() > 5
    assert not list(finished.glob("*.tmp"))
    state = utils.load_checkpoint(finished / "checkpoint.pt", "checkpoint")
    assert state["classes"] == ["cat", "dog"] and state["test_accuracy"] >= 0 and len(state["mean"]) == 3
    best = max(rows, key=lambda row: (float(row["val_accuracy"]), -float(row["val_loss"])))
    assert str(state["epoch"]) == best["epoch"] and state["val_accuracy"] == float(best["val_accuracy"])


def test_the_figures_of_the_test_set_can_be_computed_again(finished):
    log = (finished / "log").read_text()
    state = utils.load_checkpoint(finished / "checkpoint.pt", "checkpoint")
    model, test = ResNet18(2).eval(), data.load_split(state["data"], "test")
    model.load_state_dict(state["model"])
    images = data.normalize(torch.from_numpy(test.images), state["mean"], state["std"])
    with torch.no_grad():
        probabilities, mirrored = model(images).softmax(1).numpy(), model(images.flip(3)).softmax(1).numpy()
    right = probabilities.argmax(1) == test.labels
    assert f"Test accuracy on {state['name']}: {right.mean():.2%}" in log
    assert state["test_accuracy"] == right.mean()
    for label, name in enumerate(test.classes):
        assert re.search(rf"{name} +{right[test.labels == label].mean():.2%}", log)
    both = (probabilities + mirrored).argmax(1) == test.labels
    assert f"mirrored image: {both.mean():.2%}" in log
    assert f"error:       {calibration_error_by_hand(probabilities, test.labels):.2%}" in log


def calibration_error_by_hand(probabilities: np.ndarray, labels: np.ndarray) -> float:
    confidences, error = probabilities.max(1), 0
    for low in range(15):
        members = (confidences * 15 >= low) & ((confidences * 15 < low + 1) | (low == 14))
        if members.any():
            accuracy = (probabilities[members].argmax(1) == labels[members]).mean()
            error += members.mean() * abs(accuracy - confidences[members].mean())
    return error


def test_calibration_error_equals_the_definition():
    generator = torch.Generator().manual_seed(0)
    logits, labels = 3 * torch.randn(2000, 4, generator=generator), torch.randint(0, 4, (2000,))
    logits[:20, 0] = 1000  # a confidence of exactly 1 belongs to the last bin
    expected = calibration_error_by_hand(logits.softmax(1).numpy(), labels.numpy())
    assert train.calibration_error(logits, labels) == pytest.approx(expected, abs=1e-5) and expected > 0.1


def assert_same_run(*folders: Path) -> None:
    """Two output folders hold the same files, and the same numbers bit for bit, but for times."""
    whole, resumed = (utils.load_checkpoint(folder / "last.pt", "last state") for folder in folders)
    for name in ("model", "averaged"):
        for key, value in whole[name].items():
            assert torch.equal(value, resumed[name][key]), (name, key)
    assert whole["scheduler"] == resumed["scheduler"]
    for a, b in zip(whole["history"], resumed["history"], strict=True):
        for key in ("epoch", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy"):
            assert a[key] == b[key]
    for a, b in zip(*(s["optimizer"]["state"].values() for s in (whole, resumed)), strict=True):
        assert torch.equal(a["momentum_buffer"], b["momentum_buffer"])
    best = [utils.load_checkpoint(folder / "checkpoint.pt", "checkpoint") for folder in folders]
    for key in ("epoch", "val_accuracy", "test_accuracy"):
        assert best[0][key] == best[1][key]
    assert all(torch.equal(value, best[1]["model"][key]) for key, value in best[0]["model"].items())
    rows = [len((folder / "history.csv").read_text().splitlines()) for folder in folders]
    assert rows[0] == rows[1] == len(whole["history"]) + 1
    names = [{file.name for file in folder.iterdir()} - {"log"} for folder in folders]
    assert names[0] == names[1]


def test_resume_is_bit_identical(finished, images, tmp_path):
    done = call(train, "--data", images, "--output", tmp_path, *TINY, "--epochs", 1)
    assert done.returncode == 0, done.stderr
    done = call(train, "--resume", tmp_path / "last.pt", "--epochs", 2, "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert_same_run(finished, tmp_path)


class Killed(BaseException):
    """What nothing catches, as SIGKILL."""


@pytest.mark.parametrize("file", ["last.pt", "checkpoint.pt", "history.csv"])
def test_a_run_that_dies_while_saving_goes_on_as_if_it_had_not(file, finished, images, tmp_path, monkeypatch):
    """It dies just before `file` of the second epoch is put in its place."""
    replace, count = os.replace, 0

    def replace_or_die(source, target):
        nonlocal count
        count += Path(target).name == file
        if count == 2:
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", replace_or_die)
        call(train, "--data", images, "--output", tmp_path, *TINY)
    (tmp_path / "lock").touch()  # as it would be left
    assert call(train, "--resume", tmp_path / "last.pt").returncode == 0
    assert_same_run(finished, tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_a_run_killed_at_any_moment_goes_on_as_if_it_had_not(finished, images, tmp_path):
    command = [sys.executable, HERE / "train.py", "--data", images, "--output", tmp_path, *TINY]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True) as process:
        while "1/2" not in process.stdout.readline():
            assert process.poll() is None
        time.sleep(np.random.default_rng().uniform(0, 1))
        process.kill()
    assert call(train, "--resume", tmp_path / "last.pt").returncode == 0
    assert_same_run(finished, tmp_path)


def test_resume_refuses_by_name_what_would_change_the_run(finished, images):
    before = (finished / "last.pt").read_bytes()
    for flag, value in (
        ("--lr", 0.2),
        ("--batch-size", 128),
        ("--norm", "layer"),
        ("--seed", 1),
        ("--train-size", 5),
        ("--epochs", 1),
    ):
        assert_one_line_error(call(train, "--output", finished, "--resume", flag, value), 2, flag)
    assert_one_line_error(call(train, "--output", finished, "--resume", "--overwrite"), 2, "--overwrite")
    assert_one_line_error(
        call(train, "--output", finished, "--data", images, *TINY), 1, "--resume", "--overwrite"
    )
    assert_one_line_error(call(train, "--output", finished, "--resume", "--data", "demo"), 1, "--data demo")
    assert_one_line_error(call(train, "--resume", finished / "checkpoint.pt"), 1, "name the last.pt")
    assert (finished / "last.pt").read_bytes() == before


def test_overwrite_removes_the_old_run_only_when_the_new_one_writes(finished, images, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run/gradcam.png").write_bytes(b"of the old run")
    diverging = call(train, "--data", images, "--output", tmp_path / "run", *TINY, "--overwrite", "--lr", 1e6)
    assert_one_line_error(diverging, 1, "--lr")
    assert (tmp_path / "run/last.pt").read_bytes() == (finished / "last.pt").read_bytes()
    assert (tmp_path / "run/gradcam.png").exists()
    flags = ("--output", tmp_path / "run", *TINY, "--epochs", 1, "--val-split", 0, "--overwrite")
    done = call(train, "--data", images, *flags)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "run/gradcam.png").exists()
    state = torch.load(tmp_path / "run/last.pt", weights_only=True)
    assert len(state["history"]) == 1 and state["history"][0]["val_loss"] is None
    assert "16 training, 0 validation" in done.stdout


def test_the_plateau_cuts_the_rate_and_says_so(capsys):
    arguments = train.get_parser().parse_args(["--patience", "1", "--factor", "0.3"])
    training = train.build_training(arguments, 2, torch.device("cpu"), False)
    scheduler, optimizer = training["scheduler"], training["optimizer"]
    optimizer.param_groups[0]["lr"] = 0.1  # as after the warm-up
    rates = []
    for loss in (1.0, 0.9, 0.895, 0.8945, 0.8, 0.799, 0.798):  # progress under 1 % counts as none
        scheduler.step(loss)
        rates.append(optimizer.param_groups[0]["lr"])
    np.testing.assert_allclose(rates, [0.1, 0.1, 0.1, 0.03, 0.03, 0.03, 0.009])
    for _ in range(50):
        scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"] == train.MIN_LR
    row = {"epoch": 3, "lr": 0.1, "train_loss": 1, "train_accuracy": 0.5, "val_loss": None}
    row |= {"val_accuracy": None, "images_per_second": 9, "seconds": 61}
    train.print_epoch(row, 40, False, next_lr=0.03)
    assert "plateau: the learning rate is cut from 0.10000 to 0.03000" in capsys.readouterr().out


def test_the_rate_warms_up_then_stays():
    arguments = train.get_parser().parse_args([])
    training = train.build_training(arguments, 2, torch.device("cpu"), False)
    rates = []
    for _ in range(train.WARMUP_STEPS + 20):
        training["optimizer"].step()
        training["warmup"].step()
        rates.append(training["optimizer"].param_groups[0]["lr"])
    assert rates[0] < 0.002 and rates == sorted(rates)
    np.testing.assert_allclose(rates[train.WARMUP_STEPS :], 0.1)


def test_a_validation_loss_that_is_not_finite_stops_the_run():
    model, split = ResNet18(10), random_split(4)
    nn.init.constant_(model.classifier[2].bias, math.nan)
    with pytest.raises(utils.RunError, match="validation loss"):
        train.validate(model, split, nn.CrossEntropyLoss(), (MEAN, STD), torch.float32)


def test_fused_sgd_is_not_used_with_the_gradient_scaler():
    arguments = train.get_parser().parse_args([])
    for fp16 in (False, True):
        training = train.build_training(arguments, 2, torch.device("cpu"), fp16)
        assert training["optimizer"].param_groups[0]["fused"] is not fp16
        assert training["scaler"].is_enabled() is fp16
    fused = train.build_training(arguments, 2, torch.device("cpu"), False)
    facts = {"classes": ["a", "b"], "mean": [0.5], "std": [0.5], "data": "data"}
    state = {name: part.state_dict() for name, part in fused.items()} | facts
    train.restore(training, state, facts)
    assert training["optimizer"].param_groups[0]["fused"] is False


def test_help_shows_every_flag_and_its_default():
    for module in (train, gradcam):
        assert module.get_parser().format_help().count("(default") >= 5
    flags = "data output epochs batch-size lr weight-decay factor patience label-smoothing val-split "
    flags += "train-size norm workers seed device precision compile resume overwrite"
    for flag in flags.split():
        assert f"--{flag} " in train.get_parser().format_help()


BAD_FLAGS = ["--n 0", "--n x", "--layer layer9", "--seed -1", "--device tpu"]


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_of_gradcam_are_named(flags):
    assert_one_line_error(call(gradcam, *flags.split()), 2, flags.split()[0])


NUMBERS = "--epochs --batch-size --lr --factor --patience --val-split --weight-decay --workers"


@pytest.mark.parametrize("flag", NUMBERS.split())
def test_bad_numbers_of_train_are_named(flag):
    allowed = {"--patience": ["0"], "--val-split": ["0"], "--weight-decay": ["0"], "--workers": ["0"]}
    for value in ("0", "-1", "1e30", "nan", "inf", "text", ""):
        if value not in allowed.get(flag, []):
            assert_one_line_error(call(train, f"{flag}={value}"), 2, flag)


def test_other_bad_input_is_one_line(images, tmp_path, monkeypatch):
    assert_one_line_error(
        call(train, "--data", tmp_path / "none", "--output", tmp_path / "o"), 1, "none", "demo"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_one_line_error(
        call(train, "--data", images, "--output", tmp_path / "o", "--device", "cuda"), 1, "--device"
    )
    (tmp_path / "file").write_text("")
    assert_one_line_error(
        call(train, "--data", images, "--output", tmp_path / "file/o"), 1, "choose another folder"
    )
    done = call(train, "--data", images, "--output", tmp_path / "o", "--train-size", 1000, *TINY)
    assert_one_line_error(done, 1, "--train-size")
    assert_one_line_error(call(gradcam, "--checkpoint", tmp_path / "none.pt"), 1, "none.pt", "train.py")


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_ends_with_one_line_and_can_go_on(number, status, images, tmp_path):
    command = [sys.executable, HERE / "train.py", "--data", images, "--output", tmp_path, *TINY]
    command = [*map(str, command), "--epochs", "5000", "--workers", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "2/5000" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert len(err.strip().splitlines()) == 1
    assert err.strip().startswith("stopped; to go on: ") and "--resume" in err
    epochs = len(utils.load_checkpoint(tmp_path / "last.pt", "last state")["history"])
    done = call(train, "--resume", tmp_path / "last.pt", "--epochs", epochs)  # only the test is left
    assert "only the test follows" in done.stdout and "an epoch will take" not in done.stdout
    assert done.returncode == 0 and "Test accuracy" in done.stdout


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_a_killed_worker_ends_the_run_with_one_line(images, tmp_path):
    command = [sys.executable, HERE / "train.py", "--data", images, "--output", tmp_path, *TINY]
    command = [*map(str, command), "--epochs", "5000", "--workers", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "2/5000" not in process.stdout.readline():
        assert process.poll() is None
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    done = subprocess.CompletedProcess(command, process.returncode, out, err)
    assert_one_line_error(done, 1, "a worker process died", "--workers")
    assert len(err.strip().splitlines()) == 1
    utils.load_checkpoint(tmp_path / "last.pt", "last state")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_a_long_run_leaves_nothing_behind(images, tmp_path, monkeypatch):
    """Open files, threads, figures and memory after the third epoch and after the last."""
    seen, save_epoch = [], train.save_epoch

    def save_and_look(output, training, history, *rest):
        save_epoch(output, training, history, *rest)
        gc.collect()
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        figures = sum(type(item) is Figure for item in gc.get_objects())
        files, threads = len(os.listdir("/proc/self/fd")), int(status["Threads"])
        seen.append((files, threads, figures, int(status["VmRSS"].split()[0])))

    monkeypatch.setattr(train, "save_epoch", save_and_look)
    monkeypatch.setattr(train, "PLOT_SECONDS", 0)
    done = call(train, "--data", images, "--output", tmp_path, *TINY, "--epochs", 6, "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert seen[2][:3] == seen[-1][:3]
    assert seen[-1][3] - seen[2][3] < 60_000  # kB


def test_a_huge_learning_rate_stops_the_run_in_its_epoch(images, tmp_path):
    done = call(train, "--data", images, "--output", tmp_path, *TINY, "--lr", 1e6)
    assert_one_line_error(done, 1, "no longer a finite number", "--lr")
    assert not list(tmp_path.iterdir())


def test_the_weights_kept_are_the_average_of_those_after_each_step(images):
    """The oracle: average = decay * average + (1 - decay) * weights with decay = 1 - 1 / steps, by hand."""
    training = train.build_training(train.get_parser().parse_args([]), 2, torch.device("cpu"), False)
    split = data.load_split(str(images), "train")
    stats, after_steps = data.channel_statistics(split.images), []
    loader = data.train_loader(split, stats[0], 4, 0, 0)
    start = copy.deepcopy(training["averaged"].state_dict())
    training["optimizer"].register_step_post_hook(
        lambda *_: after_steps.append(copy.deepcopy(training["model"].state_dict()))
    )
    criterion = nn.CrossEntropyLoss()
    train.train_one_epoch(training["model"], training, loader, criterion, stats, torch.float32, 0)
    assert len(after_steps) == len(loader) == 4
    for name, kept in training["averaged"].state_dict().items():
        if kept.is_floating_point():
            expected = start[name]
            for weights in after_steps:
                expected = 0.75 * expected + 0.25 * weights[name]
            torch.testing.assert_close(kept, expected)


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


@pytest.fixture(scope="module")
def network() -> ResNet18:
    torch.manual_seed(0)
    model = ResNet18()
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


def test_heatmaps_point_at_the_object_and_depend_on_the_weights():
    """The pointing game (Zhang et al. 2016), the sanity check (Adebayo et al. 2018), on bars and pillars."""
    chosen = [list(data.DEMO_SHAPES).index(name) for name in ("bars", "pillars")]
    drawn = {split: data.draw_demo(split) for split in ("train", "test")}
    images, labels, _ = (part[np.isin(drawn["train"][1], chosen)][:300] for part in drawn["train"])
    stats = data.channel_statistics(images)
    images, labels = data.normalize(torch.from_numpy(images), *stats), torch.from_numpy(labels)
    torch.manual_seed(0)
    network = ResNet18().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), 0.02, 0.9, nesterov=True)
    precision = utils.choose_precision("auto", torch.device("cpu"))
    for _ in range(4):
        for batch in torch.randperm(300).split(16):
            with utils.autocast(images.device, precision):
                loss = nn.functional.cross_entropy(network(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    images, labels, boxes = (part[np.isin(drawn["test"][1], chosen)] for part in drawn["test"])
    images, labels = data.normalize(torch.from_numpy(images), *stats), torch.from_numpy(labels)
    right = (utils.predict(network, [images], torch.float32).argmax(1) == labels).numpy()
    assert right.mean() > 0.8
    maps = gradcam.GradCAM(network).heatmaps(images, labels)
    peaks = maps.flatten(1).argmax(1).numpy()
    left, top, right_edge, bottom = boxes.T
    inside = (left <= peaks % 32) & (peaks % 32 < right_edge) & (top <= peaks // 32) & (peaks // 32 < bottom)
    assert inside[right].mean() > 0.9  # a random point would be in 40 % of the boxes

    network.feature.layer4 = ResNet18().feature.layer4
    network.feature.layer3 = ResNet18().feature.layer3
    others = gradcam.GradCAM(network).heatmaps(images, labels)
    pairs = torch.stack([maps.flatten(1), others.flatten(1)], 1)
    assert torch.stack([torch.corrcoef(pair)[0, 1] for pair in pairs]).nan_to_num().mean() < 0.5


def test_heatmaps_leave_the_network_as_it_was(network):
    network.feature.layer2.train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    with torch.no_grad():
        gradcam.GradCAM(network).heatmaps(torch.randn(2, 3, 32, 32), torch.tensor([1, 2]))
    assert modes == [module.training for module in network.modules()]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in network.parameters())
    network.eval()


def test_a_map_without_positive_evidence_is_zero_and_not_nan(network):
    cam = gradcam.GradCAM(network, "layer4")
    weights = network.classifier[2].weight
    with torch.no_grad():
        kept = weights[5].clone()
        weights[5] = -1
        maps = cam.heatmaps(torch.randn(2, 3, 32, 32), torch.tensor([5, 5]))
        weights[5] = kept
    assert torch.equal(maps, torch.zeros(2, 32, 32))
    figure = gradcam.plot_heatmaps(random_split(1).images, maps.numpy()[None], [("a", "b")], ["t"], "h")
    assert "no positive evidence" in [t for axis in figure.axes for t in axis.texts][0].get_text()


def test_the_interface_of_the_course(network):
    cam = gradcam.GradCAM(network, "layer3")
    images = torch.randn(3, 3, 32, 32)
    assert cam.classes == 10 and cam.gradients is None
    logits = cam(images)
    torch.testing.assert_close(logits, network(images))
    logits[:, 4].sum().backward()
    activations = cam.get_activations(images)
    assert cam.get_activations_gradient().shape == activations.shape == (3, 256, 8, 8)
    torch.testing.assert_close(cam.classifier(cam.features_conv(images)), logits)
    network.zero_grad()
    with pytest.raises(ValueError, match="stem, layer1"):
        gradcam.GradCAM(network, "layer5")


def test_errors_are_chosen_by_confidence_or_at_random():
    logits = torch.tensor([[9.0, 0], [0, 1], [0, 5], [3, 0], [0, 9]])
    labels = torch.tensor([0, 0, 0, 1, 1])  # wrong: 1, 2, 3, of confidence .73, .993, .95
    assert gradcam.choose_errors(logits, labels, 2, None).tolist() == [2, 3]
    drawn = [gradcam.choose_errors(logits, labels, 9, seed).tolist() for seed in range(20)]
    assert {tuple(sorted(d)) for d in drawn} == {(1, 2, 3)} and len({tuple(d) for d in drawn}) > 1
    assert gradcam.choose_errors(logits, labels, 9, 3).tolist() == drawn[3]


def test_gradcam_draws_the_errors_there_are_and_no_empty_grid(finished, images, tmp_path):
    shutil.copy(finished / "checkpoint.pt", tmp_path)
    state = utils.load_checkpoint(tmp_path / "checkpoint.pt", "checkpoint")
    state["model"]["classifier.2.weight"].zero_()
    state["model"]["classifier.2.bias"] = torch.tensor([5.0, 0.0])  # everything is a cat
    utils.save_checkpoint(state, tmp_path / "checkpoint.pt")
    done = call(gradcam, "--n", 20, "--checkpoint", tmp_path / "checkpoint.pt")
    assert done.returncode == 0, done.stderr
    one = call(gradcam, "--n", 1, "--checkpoint", tmp_path / "checkpoint.pt", "--output", tmp_path / "one")
    assert one.returncode == 0 and one.stdout.count("99.3%") == 1, one.stderr
    assert (tmp_path / "one/gradcam.png").exists() and (tmp_path / "one/misclassified.png").exists()
    assert "8 of 16" in done.stdout and "Only 8 of the 20" in done.stdout and done.stdout.count("99.3%") == 8
    for name in ("misclassified.png", "gradcam.png"):
        assert np.asarray(Image.open(tmp_path / name)).std() > 5
    shutil.copytree(images / "train", tmp_path / "data/train")
    shutil.copytree(images / "test", tmp_path / "data/test")
    for file in (tmp_path / "data/test/dog").iterdir():
        file.rename(tmp_path / "data/test/cat" / f"x{file.name}")
    shutil.copy(tmp_path / "data/test/cat/0.png", tmp_path / "data/test/dog")
    shutil.rmtree(tmp_path / "data/test/dog")
    wrong = call(gradcam, "--checkpoint", tmp_path / "checkpoint.pt", "--data", tmp_path / "data")
    assert_one_line_error(wrong, 1, "cat, dog")
    state["model"]["classifier.2.bias"] = torch.tensor([5.0])
    state["model"]["classifier.2.weight"] = state["model"]["classifier.2.weight"][:1]
    utils.save_checkpoint({**state, "classes": ["cat"]}, tmp_path / "checkpoint.pt")
    output = tmp_path / "none"
    none = call(
        gradcam, "--checkpoint", tmp_path / "checkpoint.pt", "--data", tmp_path / "data", "--output", output
    )
    assert none.returncode == 0 and "nothing to show" in none.stdout and not list(output.iterdir())


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
    assert "best: epoch 2, 60.00 %" in labels and "cut by the plateau" in labels
    assert figure.axes[2].get_yscale() == "log"
    save_and_check_margins(figure, tmp_path / "curves.png")
    for rates in ([0.1], [0.1, 0.1], [0.008, 0.015, 0.023, 0.038], [0.1, 0.03, 0.0081, 1e-4], [100, 30]):
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
    confusion = torch.tensor([[3, 1], [0, 4]])
    figure = utils.plot_confusion(confusion, ["cat", "dog"], "t")
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["cat  75.0 %", "dog  100.0 %"]
    assert [t.get_text() for t in figure.axes[0].texts] == ["3", "1", "4"]
    for names in (["cat", "dog"], [f"a class with a long name {i}" for i in range(10)]):
        figure = utils.plot_confusion(torch.eye(len(names), dtype=torch.int64), names, "t")
        save_and_check_margins(figure, tmp_path / "confusion.png")
    figure = data.plot_augmentations(random_split(2).images, MEAN, "name of the data")
    assert "name of the data" in figure.get_suptitle()
    save_and_check_margins(figure, tmp_path / "augmentations.png")


@pytest.mark.parametrize("n", [1, 10, 20, 25])
def test_grids_show_every_image_once(n):
    images, maps = random_split(n).images, np.ones((n, 2, 32, 32), np.float32)
    figure = gradcam.plot_images(images, [f"title {i}" for i in range(n)], "heading")
    assert [axis.get_title() for axis in figure.axes if axis.images] == [f"title {i}" for i in range(n)]
    figure = gradcam.plot_heatmaps(
        images, maps, [("cat", "dog")] * n, [f"title {i}" for i in range(n)], "heading"
    )
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == [f"title {i}" for i in range(n)]
    pictures = [
        axis.images[0].get_array()
        for axis in figure.axes
        if len(axis.images) == 1 and axis.images[0].get_array().ndim == 3
    ]
    assert len(pictures) == n and all((a == b).all() for a, b in zip(pictures, images, strict=True))


@pytest.mark.parametrize("n", [10, 20])
def test_titles_of_neighbours_do_not_touch(n):
    images, maps = random_split(n).images, np.ones((n, 2, 32, 32), np.float32)
    names, longest = [("automobile", "automobile")] * n, "true: automobile, predicted: automobile (100%)"
    for figure in (
        gradcam.plot_images(images, [longest] * n, "heading"),
        gradcam.plot_heatmaps(images, maps, names, [longest] * n, "heading"),
    ):
        figure.draw_without_rendering()  # only now has each text its place
        texts = [text for axis in figure.axes for text in (axis.title, *axis.texts) if text.get_text()]
        boxes = [text.get_window_extent() for text in texts]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


# ---------------------------------------------------------------- as a user


def test_the_scripts_run_from_any_folder_with_workers(images, tmp_path):
    done = script(
        "train.py", "--data", images, *TINY, "--epochs", 1, "--workers", 2, "--norm", "layer", cwd=tmp_path
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    done = script("gradcam.py", "--n", 2, cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    done = script("data.py", "--data", images, cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "augmentations.png").exists(), done.stderr
