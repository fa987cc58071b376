"""The loader of image sets, on small Parquet files of the schema of the Hugging Face hub."""

import io
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from examples import data

SHAPES = {name: source.shape for name, source in data.SETS.items() if source.hub}


def pixels(name, rows=5):
    shape = rows, *data.SETS[name].shape
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def encoded(image, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    return file.getvalue()


def write(path, name="mnist", **changed):
    """Five rows with the last labels; a changed column, or None for a column left out."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    source = data.SETS[name]
    images = changed.pop("images", [encoded(image) for image in pixels(name)])
    stored = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    labels = pyarrow.array(range(source.classes - len(images), source.classes), pyarrow.int64())
    columns = {
        source.image: pyarrow.array([{"bytes": image, "path": "?"} for image in images], stored),
        source.label: labels,
        **changed,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    present = {name: column for name, column in columns.items() if column is not None}
    parquet.write_table(pyarrow.table(present), path)


def write_both(folder, name="mnist", train=None, **changed):
    write(folder / "train-00000-of-00001.parquet", name, **{**changed, **(train or {})})
    write(folder / "test-00000-of-00001.parquet", name, **changed)


def test_digits_need_no_package(monkeypatch):
    for package in "datasets", "pyarrow.parquet":
        monkeypatch.setitem(sys.modules, package, None)
    loaded = data.load()
    rows, labels = load_digits(return_X_y=True)
    images = np.stack([row.reshape(8, 8) for row in rows / 16])
    parts = train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)
    for ours, theirs in zip(loaded, (parts[i] for i in (0, 2, 1, 3)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert loaded.train_images.shape == (1347, *data.SETS["digits"].shape)
    assert loaded.train_images.dtype == jnp.float32
    assert loaded.test_labels.dtype == jnp.int32
    assert (loaded.train_images.min(), loaded.train_images.max()) == (0, 1)


@pytest.mark.parametrize("name", SHAPES)
def test_png_is_exact(name, tmp_path):
    write_both(tmp_path / name, name)
    train_images, train_labels, test_images, test_labels = data.load(name, tmp_path)
    classes = data.SETS[name].classes
    for images, labels in (train_images, train_labels), (test_images, test_labels):
        assert (images.dtype, labels.dtype) == (jnp.float32, jnp.int32)
        np.testing.assert_array_equal(images, pixels(name).astype(np.float32) / np.float32(255))
        np.testing.assert_array_equal(labels, np.arange(classes - 5, classes))


def test_jpeg(tmp_path):
    ramp = np.add.outer(np.arange(32), np.arange(32))[..., None] * [1, 2, 4]
    write_both(tmp_path, "cifar10", images=[encoded(ramp.astype(np.uint8), "JPEG")])
    loaded = data.load("cifar10", str(tmp_path)).test_images
    np.testing.assert_allclose(255 * loaded[0], ramp, atol=12)


@pytest.mark.parametrize("place", ["emnist", "emnist47", "."])
def test_folders(place, tmp_path):
    write_both(tmp_path / place, "emnist")
    assert data.load("emnist", tmp_path).train_labels.max() == 46


def test_several_files(tmp_path):
    write_both(tmp_path)
    (tmp_path / "train-00000-of-00001.parquet").unlink()
    write(tmp_path / "train-00000-of-00002.parquet")
    with pytest.raises(FileNotFoundError, match=r"1 of 2 files like .*train-00000"):
        data.load("mnist", tmp_path, download=True)
    write(tmp_path / "train-00001-of-00002.parquet", images=[encoded(pixels("mnist")[3])])
    loaded = data.load("mnist", tmp_path)
    np.testing.assert_array_equal(loaded.train_labels, [5, 6, 7, 8, 9, 9])
    np.testing.assert_array_equal(loaded.train_images[5], loaded.train_images[3])


def test_written_by_datasets(tmp_path):
    """Images and class names as the hub's own tool stores them, in the schema's metadata."""
    datasets = pytest.importorskip("datasets")
    labels = datasets.ClassLabel(names=[f"class {i}" for i in range(100)])
    features = datasets.Features(img=datasets.Image(), fine_label=labels, coarse_label=labels)
    images = [Image.fromarray(image) for image in pixels("cifar100")]
    columns = {"img": images, "fine_label": range(5), "coarse_label": [7] * 5}
    for split in "train", "test":
        rows = datasets.Dataset.from_dict(columns, features)
        rows.to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    loaded = data.load("cifar100", tmp_path)
    np.testing.assert_array_equal(jnp.rint(255 * loaded.train_images), pixels("cifar100"))
    np.testing.assert_array_equal(loaded.test_labels, range(5))


# What is refused.


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("minst", "'minst': did you mean 'mnist'"),
        ("Fashion-MNIST", "did you mean 'fashion_mnist'"),
        ("imagenet-1k", "'imagenet-1k': there are digits, mnist, "),
    ],
)
def test_unknown_name(name, message):
    with pytest.raises(ValueError, match=message):
        data.load(name)


@pytest.mark.parametrize("inside", [None, "", "train-00000-of-00001.parquet"])
def test_missing_set(inside, tmp_path):
    folder = None if inside is None else tmp_path
    if inside:
        write(tmp_path / inside)
    message = f"train-.* and test-.* into {folder or 'FOLDER'}/mnist .*--download.*'.\\[data\\]'"
    with pytest.raises(FileNotFoundError, match=message):
        data.load("mnist", folder)


@pytest.mark.parametrize("package", ["pyarrow.parquet", "datasets"])
def test_missing_package(package, tmp_path, monkeypatch):
    write_both(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    folder = tmp_path if package == "pyarrow.parquet" else None
    with pytest.raises(ModuleNotFoundError, match=f"{package} is missing: pip install"):
        data.load("mnist", folder, download=True)


GREY = np.zeros((28, 28), np.uint8)
DAMAGED = {
    r"no column 'image' among \['label'\]": {"image": None},
    r"no column 'label' among \['image', 'fine'\]": {"label": None, "fine": [1] * 5},
    "no rows, the whole split is empty": {"images": []},
    "row 2: 'label' is 10, not in 0 to 9": {"label": [0, 9, 10, 11, 0]},
    "row 4: 'label' is -1, not in 0 to 9": {"label": [0, 9, 0, 0, -1]},
    "'label' holds float64, or gaps": {"label": [0, 1, None, 3, 4]},
    "'label' holds object": {"label": list("abcde")},
    "row 1: not a readable": {"images": [encoded(GREY), b"no image"]},
    "row 2: not a readable": {"images": [encoded(GREY), encoded(GREY), encoded(GREY)[:-30]]},
    "row 0: not a readable": {"images": [None]},
    "row 0: not a readable PNG": {"image": [3] * 5},
    r"row 1: L image of shape \(27, 28\), not L of \(28, 28\)": {
        "images": [encoded(GREY), encoded(GREY[1:])]
    },
    r"row 0: RGB image of shape \(28, 28, 3\), not L": {
        "images": [encoded(np.zeros((28, 28, 3), np.uint8))]
    },
}


@pytest.mark.parametrize("message", DAMAGED)
def test_damaged(message, tmp_path):
    write_both(tmp_path, train=DAMAGED[message])
    with pytest.raises(ValueError, match=f"train-00000-of-00001.parquet.*{message}"):
        data.load("mnist", tmp_path)


@pytest.mark.parametrize("kept", [slice(0), slice(-100), slice(100, None), slice(1, None)])
def test_damaged_file(kept, tmp_path):
    write_both(tmp_path)
    path = tmp_path / "test-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[kept])
    with pytest.raises(ValueError, match=f"{path}: damaged, or not a Parquet file"):
        data.load("mnist", tmp_path)


# The download, without the hub.


def test_download(tmp_path, monkeypatch):
    """`datasets` itself loads, with a folder in place of the hub."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_both(tmp_path / "hub", train={"label": [4, 3, 2, 1, 0]})
    hub = data.SETS["mnist"]._replace(hub=str(tmp_path / "hub"))
    monkeypatch.setitem(data.SETS, "mnist", hub)
    loaded = data.load("mnist", tmp_path / "without any", download=True)
    np.testing.assert_array_equal(jnp.rint(255 * loaded.train_images), pixels("mnist"))
    np.testing.assert_array_equal(loaded.train_labels, [4, 3, 2, 1, 0])
    np.testing.assert_array_equal(loaded.test_labels, [5, 6, 7, 8, 9])


def test_download_of_damaged_rows(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(hub, split):
        asked.append((hub, split))
        return [datasets.Dataset.from_dict({"img": [{"bytes": b"?"}], "label": [0]})] * 2

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match="uoft-cs/cifar10, train, row 0: not a readable"):
        data.load("cifar10", download=True)
    assert asked == [("uoft-cs/cifar10", ["train", "test"])]


@pytest.mark.parametrize("error", [ConnectionError, TimeoutError, ValueError, RuntimeError])
def test_interrupted_download(error, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(hub, split):
        raise error("half of it")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = rf"download of ylecun/mnist failed, try again \({error.__name__}: half of it\)"
    with pytest.raises(ConnectionError, match=message) as raised:
        data.load("mnist", download=True)
    assert isinstance(raised.value.__cause__, error)


def test_no_download_unless_asked(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("downloads"))
    with pytest.raises(FileNotFoundError):
        data.load("cifar10", tmp_path)
    write_both(tmp_path / "cifar10", "cifar10")
    data.load("cifar10", tmp_path, download=True)
