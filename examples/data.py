"""The image sets of the examples, as arrays. Nothing is downloaded unless asked for.

The digits come with scikit-learn. The other sets are Parquet files as the Hugging Face hub has
them, read from a folder or downloaded; both need `pip install '.[data]'`.
"""

import difflib
import importlib
import io
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


class Data(NamedTuple):
    """Images (n, height, width) in grey or (n, height, width, 3) in colour, and their labels.

    The images are float32 in [0, 1], ready for any model. That is four times the memory of
    bytes, but once for all seeds: 0.2 GB for MNIST, 0.7 GB for CIFAR-10.
    """

    train_images: jax.Array
    train_labels: jax.Array
    test_images: jax.Array
    test_labels: jax.Array


class Source(NamedTuple):
    """Where a set comes from, and what it has to hold."""

    classes: int
    shape: tuple[int, ...]  # of an image
    hub: str | None = None  # id on the Hugging Face hub; None for what is embedded
    image: str = "image"  # columns
    label: str = "label"
    splits: tuple[str, str] = ("train", "test")
    folders: tuple[str, ...] = ()  # names of its folder besides its own


SETS = {
    "digits": Source(10, (8, 8)),
    "mnist": Source(10, (28, 28), "ylecun/mnist"),
    "fashion_mnist": Source(10, (28, 28), "zalando-datasets/fashion_mnist"),
    # The balanced split. The hub has no official copy; the id and the columns of this one are
    # taken from public code and untried, and its letters may lie transposed, as in the original.
    "emnist": Source(47, (28, 28), "claudiogsc/emnist_balanced", folders=("emnist47",)),
    "cifar10": Source(10, (32, 32, 3), "uoft-cs/cifar10", "img"),
    "cifar100": Source(100, (32, 32, 3), "uoft-cs/cifar100", "img", "fine_label"),
}


def load(name: str = "digits", folder: str | Path | None = None, download: bool = False) -> Data:
    """The set of this name, from `folder`, or else from the hub if `download` allows it.

    The folder holds train-*.parquet and test-*.parquet, or a folder `name` that does. Only a
    download writes anything: into the cache of `datasets`, which the next call then reads. The
    digits need neither.
    """
    if name not in SETS:
        near = difflib.get_close_matches(name.lower(), SETS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"no image set {name!r}: {hint}there are {', '.join(SETS)}")
    source = SETS[name]
    if source.hub is None:
        return digits()
    files = None if folder is None else find(name, Path(folder))
    if files is not None:
        splits = [[(str(path), read(path)) for path in paths] for paths in files]
    elif download:
        splits = fetch(source)
    else:
        needed = " and ".join(f"{split}-*.parquet" for split in source.splits)
        raise FileNotFoundError(
            f"{name} is missing: put its {needed} into {Path(folder or 'FOLDER') / name} and give "
            f"the folder, --data={folder or 'FOLDER'}, or fetch {source.hub} from the Hugging Face "
            "hub by load(..., download=True), which is --download of grapes_experiments; both "
            "need: pip install '.[data]'"
        )
    train, test = (gather(source, tables) for tables in splits)
    return Data(*train, *test)


def digits() -> Data:
    """Scikit-learn's handwritten digits: images (n, 8, 8) in [0, 1], and their labels."""
    pixels, labels = load_digits(return_X_y=True)
    images = (pixels / 16).reshape(-1, 8, 8).astype(np.float32)
    split = train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)
    train_x, test_x, train_y, test_y = map(jnp.asarray, split)
    return Data(train_x, train_y.astype(jnp.int32), test_x, test_y.astype(jnp.int32))


# Where the tables come from. Each goes with what an error message calls it.


def package(name: str, extra: str = "data") -> Any:
    """A package that only the sets beyond the digits, or another extra, need."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{name} is missing: pip install '.[{extra}]'") from error


def find(name: str, folder: Path) -> list[list[Path]] | None:
    """The files of each split, or None if a split has none."""
    source = SETS[name]
    places = folder / name, *(folder / other for other in source.folders), folder
    found = ([sorted(p.glob(f"{split}-*.parquet")) for split in source.splits] for p in places)
    files = next(filter(all, found), None)
    for paths in files or []:
        count = re.search(r"-of-(\d+)\.parquet$", paths[-1].name)
        if count and int(count[1]) != len(paths):
            raise FileNotFoundError(f"{len(paths)} of {int(count[1])} files like {paths[-1]}")
    return files


def read(path: Path) -> Any:
    """By pyarrow, as `datasets` does it too, but without the copy that `datasets` caches."""
    parquet, errors = package("pyarrow.parquet"), package("pyarrow").ArrowException
    try:
        return parquet.read_table(path, partitioning=None)
    except (errors, OSError) as error:
        raise ValueError(f"{path}: damaged, or not a Parquet file ({error})") from error


def fetch(source: Source) -> list[list[tuple[str, Any]]]:
    datasets = package("datasets")
    try:
        splits = datasets.load_dataset(source.hub, split=list(source.splits))
    except Exception as error:  # of the hub, of HTTP, of the files: there is no common kind
        message = f"download of {source.hub} failed, try again ({type(error).__name__}: {error})"
        raise ConnectionError(message) from error
    named = zip(source.splits, splits, strict=True)
    return [[(f"{source.hub}, {name}", split.with_format("arrow")[:])] for name, split in named]


# What the tables hold.


def gather(source: Source, tables: list[tuple[str, Any]]) -> tuple[jax.Array, jax.Array]:
    """One split, checked, scaled in one pass and put on the device once for all."""
    images, labels = zip(*(decode(source, *table) for table in tables), strict=True)
    if not sum(map(len, labels)):
        raise ValueError(f"{tables[0][0]}: no rows, the whole split is empty")
    scaled = np.divide(np.concatenate(images), 255, dtype=np.float32)
    return jnp.asarray(scaled), jnp.asarray(np.concatenate(labels))


def decode(source: Source, where: str, table: Any) -> tuple[np.ndarray, np.ndarray]:
    """Images as bytes, and labels; every row is checked, for a model takes what it is given."""
    for column in source.image, source.label:
        if column not in table.column_names:
            raise ValueError(f"{where}: no column {column!r} among {table.column_names}")
    labels = table[source.label].to_numpy()
    if labels.dtype.kind not in "iu":
        raise ValueError(f"{where}: {source.label!r} holds {labels.dtype}, or gaps, not integers")
    wrong = np.flatnonzero((labels < 0) | (labels >= source.classes))
    if wrong.size:
        found = f"row {wrong[0]}: {source.label!r} is {labels[wrong[0]]}"
        raise ValueError(f"{where}, {found}, not in 0 to {source.classes - 1}")
    images = np.empty((len(labels), *source.shape), np.uint8)
    expected = "L" if len(source.shape) == 2 else "RGB", source.shape
    for row, stored in enumerate(table[source.image].to_pylist()):
        try:
            with Image.open(io.BytesIO(stored["bytes"]), formats=("PNG", "JPEG")) as image:
                pixels = np.asarray(image)
        except Exception as error:  # Pillow has no common kind for damaged files either
            raise ValueError(f"{where}, row {row}: not a readable PNG or JPEG image") from error
        if (image.mode, pixels.shape) != expected:
            found = f"{image.mode} image of shape {pixels.shape}"
            raise ValueError(f"{where}, row {row}: {found}, not {expected[0]} of {expected[1]}")
        images[row] = pixels
    return images, labels.astype(np.int32)
