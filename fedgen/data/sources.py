"""Where samples come from: the embedded set, TFDS, IDX folders and NumPy archives.

Everything is decoded to one array of images `[s, h, w, ch]` uint8 (or of features
`[s, d]` float32) and one of labels `[s]` int32, without TensorFlow. A data set's
own training and test parts are merged: federated practice divides the samples
anew inside each client (see `fedgen.data.partition.split`).

`fashion_mnist_mini` is a fixed excerpt of Fashion-MNIST (Xiao, Rasul and Vollgraf,
arXiv:1708.07747; MIT licence, Zalando SE, see fashion_mnist_mini.LICENSE.txt) of
1,000 images per class. It was made once from the 70,000 images, training part
first: `numpy.random.default_rng(0)` chose 1,000 rows of each class, class by class,
without replacement, and the chosen rows are kept in their first order.
"""

from __future__ import annotations

import contextlib
import difflib
import gzip
import hashlib
import importlib.resources
import os
import pathlib
import re
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from typing import NamedTuple

import numpy as np

EMBEDDED = "fashion_mnist_mini"
_LABELLED_SPLITS = ("train", "validation", "test")
_PROBE_SECONDS = 5.0


class Source(NamedTuple):
    """A labelled data set in memory.

    Attributes:
      name: Name, for messages and reports.
      x: `[s, h, w, ch]` uint8 images, or `[s, d]` or `[s, h, w, ch]` float32.
      y: `[s]` int32 labels.
      num_classes: Number of classes `c`.
      users: `[s]` who each sample is from, where the data set says so.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    num_classes: int
    users: np.ndarray | None = None


def load(name: str, data_dir: str | os.PathLike | None = None) -> Source:
    """Load a data set by name or path.

    In this order: the embedded `fashion_mnist_mini`; what lies in `data_dir` under
    the name, or at the path that the name is (a folder prepared by TFDS, a folder
    with IDX files, a folder with one `.npz` or a `.npz` file); and a data set that
    TFDS knows, which it then downloads into `data_dir`; for most sets TFDS needs
    TensorFlow for this one step, since it re-encodes the images with it.

    Args:
      name: Name of a data set, or the path of a folder or an `.npz` file.
      data_dir: Folder of data sets; TFDS's own default where None.

    Returns:
      The checked samples.

    Raises:
      ValueError: If there is no such data set, it cannot be had or be read, or its
        arrays are not as they should be.
    """
    if name == EMBEDDED:
        resource = importlib.resources.files("fedgen.data") / f"{EMBEDDED}.npz"
        with resource.open("rb") as file, np.load(file) as arrays:
            return check(_source(name, arrays["x"], arrays["y"], num_classes=10))
    if not name:
        raise ValueError("the name of the data set must not be empty")
    if data_dir is not None and not pathlib.Path(data_dir).expanduser().is_dir():
        raise ValueError(f"data_dir must be a folder, got {os.fspath(data_dir)!r}")
    root = pathlib.Path(
        data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    ).expanduser()
    places = (root / name, root / f"{name}.npz", pathlib.Path(name).expanduser())
    found = [place for place in places if place.exists()]
    for place in found:
        source = _read(place, pathlib.Path(name).stem if place.is_file() else name)
        if source is not None:
            return check(source)
    return check(_download(name, root, found))


def check(source: Source) -> Source:
    """Return the source if its arrays are fit to learn from.

    Raises:
      ValueError: If a shape, a type, a label or a value is wrong; names the rows.
    """
    name, x, y, num_classes, users = source
    if x.ndim not in (2, 4):
        raise ValueError(
            f"{name}: images must have shape [s, h, w, ch] and features [s, d], got "
            f"{list(x.shape)}"
        )
    if x.dtype not in (np.uint8, np.float32):
        raise ValueError(f"{name}: samples must be uint8 or float32, got {x.dtype}")
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
        raise ValueError(
            f"{name}: labels must be integers of shape [s], got {y.dtype} of shape "
            f"{list(y.shape)}"
        )
    if len(x) != len(y):
        raise ValueError(
            f"{name}: there must be one label per sample, got {len(x)} samples and "
            f"{len(y)} labels"
        )
    if not x.size:
        raise ValueError(
            f"{name}: there must be samples, got an array of shape {list(x.shape)}"
        )
    outside = np.flatnonzero((y < 0) | (y >= num_classes))
    if len(outside):
        raise ValueError(
            f"{name}: labels must lie in [0, {num_classes}), got "
            f"{_some(np.unique(y[outside]))} in rows {_some(outside)}"
        )
    if x.dtype != np.uint8:
        finite = np.isfinite(x).reshape(len(x), -1).all(axis=1)
        if not finite.all():
            raise ValueError(
                f"{name}: samples must be finite, got NaN or infinity in rows "
                f"{_some(np.flatnonzero(~finite))}"
            )
    if users is not None and np.shape(users) != y.shape:
        raise ValueError(
            f"{name}: there must be one user per sample, got {len(y)} samples and "
            f"users of shape {list(np.shape(users))}"
        )
    return source


def cache_dir() -> pathlib.Path:
    """Return the folder of decoded data sets, which `FEDGEN_CACHE` overrides."""
    if given := os.environ.get("FEDGEN_CACHE"):
        return pathlib.Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(base).expanduser() / "fedgen"


def _some(items: np.ndarray, limit: int = 5) -> str:
    """List the first few of many items."""
    shown = ", ".join(str(item) for item in items[:limit])
    return f"{shown}, ... ({len(items)} in all)" if len(items) > limit else shown


def _source(
    name: str,
    x: np.ndarray,
    y: np.ndarray,
    num_classes: int | None = None,
    users: np.ndarray | None = None,
) -> Source:
    """Bring arrays to the layout and the types of a `Source`."""
    x, y = np.asarray(x), np.asarray(y)
    if x.ndim == 3:
        x = x[..., None]
    if np.issubdtype(x.dtype, np.integer) and x.dtype != np.uint8:
        if x.size and not (x.min() >= 0 and x.max() <= 255):
            raise ValueError(
                f"{name}: whole-number images must lie in [0, 255], got "
                f"{x.min()}..{x.max()}"
            )
        x = x.astype(np.uint8)
    elif np.issubdtype(x.dtype, np.floating):
        x = x.astype(np.float32)
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if np.issubdtype(y.dtype, np.floating) and np.array_equal(y, np.round(y)):
        y = y.astype(np.int64)
    if np.issubdtype(y.dtype, np.integer):
        y = y.astype(np.int32)
        if num_classes is None:
            num_classes = int(y.max()) + 1 if y.size else 0
    return Source(name, x, y, num_classes or 0, users)


def _read(place: pathlib.Path, name: str) -> Source | None:
    """Read a file or a folder; None if the folder holds nothing that is known."""
    if place.is_file():
        return _read_npz(place, name)
    prepared = _prepared(place)
    if prepared is not None:
        return _cached(prepared, name)
    if any(place.glob("*idx3-ubyte*")):
        return _read_idx(place, name)
    archives = sorted(place.glob("*.npz"))
    if len(archives) > 1:
        raise ValueError(
            f"{place} must hold one .npz file, got {len(archives)}; name one of them"
        )
    return _read_npz(archives[0], name) if archives else None


def _read_npz(path: pathlib.Path, name: str) -> Source:
    """Read an archive with x and y, or x_train, y_train, x_test and y_test."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except (OSError, ValueError, EOFError, AttributeError, *_DAMAGED) as error:
        raise ValueError(f"cannot read {path} as an .npz archive: {error}") from error
    parts = [part for part in ("", "_train", "_test") if f"x{part}" in arrays]
    if not parts or any(f"y{part}" not in arrays for part in parts):
        raise ValueError(
            f"{path} must hold the keys x and y, or x_train, y_train, x_test and "
            f"y_test; got {', '.join(arrays) or 'none'}"
        )
    try:
        x = np.concatenate([arrays[f"x{part}"] for part in parts])
        y = np.concatenate([arrays[f"y{part}"] for part in parts])
    except ValueError as error:
        raise ValueError(f"the parts of {path} do not fit together: {error}") from error
    num_classes = arrays.get("num_classes")
    if num_classes is not None and num_classes.size != 1:
        raise ValueError(
            f"num_classes of {path} must be one number, got shape {num_classes.shape}"
        )
    num_classes = None if num_classes is None else int(num_classes.item())
    return _source(name, x, y, num_classes, arrays.get("users"))


def _read_idx(folder: pathlib.Path, name: str) -> Source:
    """Read all pairs of IDX images and labels in a folder, packed or not."""
    images, labels = [], []
    for path in sorted(folder.glob("*idx3-ubyte*"), reverse=True):
        partner = path.with_name(
            path.name.replace("images", "labels").replace("idx3", "idx1")
        )
        packed = partner.with_name(partner.name + ".gz")
        partner = packed if not partner.exists() and packed.exists() else partner
        if partner == path or not partner.exists():
            raise ValueError(f"{path} needs its labels beside it in {partner.name}")
        images.append(_read_idx_file(path, 3))
        labels.append(_read_idx_file(partner, 1))
        if len(images[-1]) != len(labels[-1]):
            raise ValueError(
                f"{path} holds {len(images[-1])} images but {partner.name} "
                f"{len(labels[-1])} labels"
            )
    if len({array.shape[1:] for array in images}) > 1:
        raise ValueError(f"the images in {folder} must have one size")
    return _source(name, np.concatenate(images), np.concatenate(labels))


def _read_idx_file(path: pathlib.Path, rank: int) -> np.ndarray:
    """Read a file of unsigned bytes in the IDX format of MNIST."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    start = 4 + 4 * rank
    if len(content) < start or content[:4] != bytes((0, 0, 8, rank)):
        raise ValueError(
            f"{path} must begin with the IDX mark 00 00 08 {rank:02x}, got "
            f"{content[:4].hex(' ') or 'nothing'}"
        )
    shape = tuple(int(size) for size in np.frombuffer(content, ">i4", rank, offset=4))
    if len(content) - start != np.prod(shape, dtype=np.int64):
        raise ValueError(
            f"{path} announces {' x '.join(map(str, shape))} bytes but holds "
            f"{len(content) - start}"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _prepared(folder: pathlib.Path) -> pathlib.Path | None:
    """Find the newest version that TFDS has prepared in a folder, if any."""
    if (folder / "dataset_info.json").is_file():
        return folder
    versions = [
        path.parent
        for path in folder.glob("*/dataset_info.json")
        if "incomplete" not in path.parent.name
    ]

    def number(path: pathlib.Path) -> list[int]:
        return [int(digits) for digits in re.findall(r"\d+", path.name)]

    return max(versions, key=number, default=None)


_DAMAGED = (zipfile.BadZipFile, zlib.error, KeyError)


def _cached(folder: pathlib.Path, name: str) -> Source:
    """Decode a prepared TFDS folder, or load what was decoded before."""
    path = cache_dir() / f"{_fingerprint(folder, name)}.npz"
    if path.exists():
        # A damaged entry is as good as none: it is decoded and written again.
        with (
            contextlib.suppress(OSError, ValueError, EOFError, *_DAMAGED),
            path.open("rb") as file,
            np.load(file, allow_pickle=False) as arrays,
        ):
            return Source(name, arrays["x"], arrays["y"], int(arrays["num_classes"]))
    source = _decode(folder, name)
    # A cache that cannot be written costs time and nothing else.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, source)
    return source


def _write(path: pathlib.Path, source: Source) -> None:
    """Write a cache entry so that no reader ever sees a part of it."""
    descriptor, partial = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.savez(file, x=source.x, y=source.y, num_classes=source.num_classes)
        os.replace(partial, path)
    except BaseException:
        pathlib.Path(partial).unlink(missing_ok=True)
        raise


def _fingerprint(folder: pathlib.Path, name: str) -> str:
    """Name a cache entry after the data set, the folder and its files."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    stats = [(path.name, path.stat()) for path in files]
    stamps = [(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats]
    text = repr((name, str(folder.resolve()), stamps))
    plain = re.sub(r"\W+", "_", pathlib.Path(name).name)
    return f"{plain}-{folder.name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _decode(folder: pathlib.Path, name: str) -> Source:
    """Decode the images of a folder that TFDS has prepared."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(folder)
        image, label = _keys(builder.info)
        num_classes = builder.info.features[label].num_classes
        known = [split for split in _LABELLED_SPLITS if split in builder.info.splits]
        sources = [builder.as_data_source(split=part) for part in known]
        rows = [row for source in sources for row in source]
        x = np.stack([row[image] for row in rows])
        y = np.array([row[label] for row in rows], np.int32)
    except NotImplementedError as error:
        raise ValueError(
            f"{folder} is prepared in a format without random access; prepare it "
            'again with file_format="array_record"'
        ) from error
    except Exception as error:
        raise ValueError(
            f"cannot read {folder} as an image classification set prepared by TFDS: "
            f"{_short(error)}"
        ) from error
    return _source(name, x, y, num_classes)


def _keys(info) -> tuple[str, str]:
    """Name the image and the label of a TFDS data set; raise if it has none."""
    image, label = info.supervised_keys or ("image", "label")
    if len(getattr(info.features[image], "shape", None) or ()) != 3:
        raise ValueError(f"its input {image!r} is not an image")
    if not getattr(info.features[label], "num_classes", None):
        raise ValueError(f"its target {label!r} is not a class")
    return image, label


def _missing(error: ModuleNotFoundError) -> str:
    """Name the package that is not installed, also where TFDS has wrapped the error."""
    quoted = re.search(r"No module named '([^']+)'", str(error))
    return error.name or (quoted[1] if quoted else "tensorflow")


def _short(error: Exception) -> str:
    """Say an error of a library in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _download(name: str, root: pathlib.Path, found: list[pathlib.Path]) -> Source:
    """Let TFDS download and prepare a data set that it knows."""
    import tensorflow_datasets as tfds

    known = tfds.list_builders(with_community_datasets=False)
    if name.split("/")[0].split(":")[0] not in known:
        if found:
            raise ValueError(
                f"{found[0]} must hold a data set prepared by TFDS, IDX files or one "
                ".npz file, got none of them"
            )
        names = [EMBEDDED, *known]
        if root.is_dir():
            names += [path.stem for path in root.iterdir()]
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(
            f"unknown data set {name!r}{hint} It must be {EMBEDDED!r}, a name in "
            f"{root}, a path, or a name that TFDS knows"
        )
    recipe = (
        f"fill {root / name} on a machine with a network by tfds.builder({name!r}, "
        f'data_dir=..., file_format="array_record").download_and_prepare(), or put '
        f"its IDX files there, or an archive with x and y at {root / name}.npz"
    )
    try:
        builder = tfds.builder(name, data_dir=root, file_format="array_record")
        _keys(builder.info)
    except Exception as error:
        raise ValueError(
            f"data set {name!r} must be one that TFDS knows as image classification: "
            f"{_short(error)}"
        ) from error
    try:
        _probe(builder)
        builder.download_and_prepare()
    except ModuleNotFoundError as error:
        raise ValueError(
            f"TFDS needs the package {_missing(error)!r} to prepare {name!r}, once (to "
            f"read it, nothing is needed): install it and try again, or {recipe}"
        ) from error
    except Exception as error:
        raise ValueError(
            f"data set {name!r} is not in {root} and cannot be downloaded "
            f"({_short(error)}); {recipe}"
        ) from error
    return _cached(pathlib.Path(builder.data_path), name)


def _probe(builder) -> None:
    """Raise soon where a download would try for minutes without a network."""
    for url in list(builder.url_infos or ())[:1]:
        request = urllib.request.Request(url, method="HEAD")
        # A server that answers with an error is a server that can be reached.
        with contextlib.suppress(urllib.error.HTTPError):
            urllib.request.urlopen(request, timeout=_PROBE_SECONDS).close()
