import gzip
import io
import pathlib
import time
import urllib.error

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds

from fedgen.data import sources
from fedgen.data.sources import Source, check, load

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (9, 4, 5), dtype=np.uint8)
DIGITS = (np.arange(9) % 3).astype(np.uint8)


def idx(array):
    sizes = np.array(array.shape, ">i4").tobytes()
    return bytes((0, 0, 8, array.ndim)) + sizes + array.tobytes()


def write_idx(folder, packed=False):
    folder.mkdir(exist_ok=True)
    for part, rows in (("train", slice(0, 6)), ("t10k", slice(6, 9))):
        for kind, array in (("images-idx3", IMAGES), ("labels-idx1", DIGITS)):
            content = idx(array[rows])
            path = folder / f"{part}-{kind}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(content) if packed else content)


class FedgenSquares(tfds.core.GeneratorBasedBuilder):
    """A data set that TFDS can prepare without TensorFlow and without a network."""

    VERSION = tfds.core.Version("1.2.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(4, 5, 1)),
            "label": tfds.features.ClassLabel(num_classes=3),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {
            "train": self._generate_examples(range(6)),
            "test": self._generate_examples(range(6, 9)),
        }

    def _generate_examples(self, rows):
        for row in rows:
            file = io.BytesIO()
            PIL.Image.fromarray(IMAGES[row]).save(file, "png")
            file.seek(0)
            yield row, {"image": file, "label": int(DIGITS[row])}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("FEDGEN_CACHE", str(folder))
    return folder


@pytest.fixture
def data_dir(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


def assert_same_samples(source):
    """Compare with IMAGES and DIGITS, in any order."""
    assert source.x.dtype == np.uint8
    assert source.y.dtype == np.int32
    assert source.num_classes == 3
    assert source.x.shape == (9, 4, 5, 1)
    found = {(x.tobytes(), int(y)) for x, y in zip(source.x, source.y, strict=True)}
    expected = {(x.tobytes(), int(y)) for x, y in zip(IMAGES, DIGITS, strict=True)}
    assert found == expected


def test_the_embedded_set_is_balanced_and_small():
    source = load("fashion_mnist_mini")
    assert source.x.shape == (10_000, 28, 28, 1)
    assert source.x.dtype == np.uint8
    np.testing.assert_array_equal(np.bincount(source.y), [1000] * 10)
    folder = pathlib.Path(sources.__file__).parent
    assert (folder / "fashion_mnist_mini.npz").stat().st_size <= 5_000_000
    assert "Zalando" in (folder / "fashion_mnist_mini.LICENSE.txt").read_text("utf-8")


@pytest.mark.parametrize("packed", [False, True])
def test_idx_folders_are_read(data_dir, packed):
    write_idx(data_dir / "digits", packed)
    source = load("digits", data_dir)
    np.testing.assert_array_equal(source.x[..., 0], IMAGES)
    np.testing.assert_array_equal(source.y, DIGITS)
    assert_same_samples(load(str(data_dir / "digits")))


@pytest.mark.parametrize("form", ["file", "folder", "path", "parts"])
def test_npz_archives_are_read(data_dir, form):
    arrays = {"x": IMAGES, "y": DIGITS}
    if form == "parts":
        arrays = {
            f"{key}{part}": array[rows]
            for key, array in arrays.items()
            for part, rows in (("_train", slice(0, 6)), ("_test", slice(6, 9)))
        }
    path = data_dir / "own.npz"
    if form == "folder":
        (data_dir / "own").mkdir()
        path = data_dir / "own" / "anything.npz"
    np.savez(path, **arrays)
    source = load(str(path), None) if form == "path" else load("own", data_dir)
    assert source.name == "own"
    assert_same_samples(source)


def test_npz_features_classes_and_users(data_dir):
    x = RNG.standard_normal((9, 6))
    np.savez(
        data_dir / "f.npz", x=x, y=DIGITS[:, None], num_classes=5, users=DIGITS % 2
    )
    source = load("f", data_dir)
    np.testing.assert_array_equal(source.x, x.astype(np.float32))
    np.testing.assert_array_equal(source.y, DIGITS)
    np.testing.assert_array_equal(source.users, DIGITS % 2)
    assert source.num_classes == 5


def test_tfds_prepares_decodes_and_caches(data_dir, cache, monkeypatch):
    assert_same_samples(load("fedgen_squares", data_dir))
    assert len(list(cache.iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr(sources, "_decode", None)
        assert_same_samples(load("fedgen_squares", data_dir))
    folder = data_dir / "fedgen_squares" / "1.2.0"
    assert_same_samples(load(str(folder)))


@pytest.mark.parametrize("damage", ["cut", "empty", "flip", "other"])
def test_a_damaged_cache_entry_is_rebuilt(data_dir, cache, damage):
    load("fedgen_squares", data_dir)
    (entry,) = cache.iterdir()
    whole = entry.read_bytes()
    middle = whole.index(IMAGES[0].tobytes()[:16])
    if damage == "cut":
        entry.write_bytes(whole[: len(whole) // 2])
    elif damage == "empty":
        entry.write_bytes(b"")
    elif damage == "flip":
        flipped = bytes([whole[middle] ^ 1])
        entry.write_bytes(whole[:middle] + flipped + whole[middle + 1 :])
    else:
        with entry.open("wb") as file:
            np.savez(file, z=1)
    assert_same_samples(load("fedgen_squares", data_dir))
    assert entry.read_bytes() == whole
    assert len(list(cache.iterdir())) == 1


def test_changed_files_are_decoded_again(data_dir, cache):
    load("fedgen_squares", data_dir)
    folder = data_dir / "fedgen_squares" / "1.2.0"
    for path in folder.iterdir():
        path.touch()
    load("fedgen_squares", data_dir)
    assert len(list(cache.iterdir())) == 2


def test_a_cache_that_cannot_be_written_is_done_without(data_dir, cache):
    cache.write_text("a file where the folder should be")
    assert_same_samples(load("fedgen_squares", data_dir))


def test_without_a_network_the_error_says_what_to_fill(data_dir, monkeypatch):
    def unreachable(request, timeout):
        assert timeout <= 10
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(sources.urllib.request, "urlopen", unreachable)
    start = time.monotonic()
    with pytest.raises(ValueError, match="no network") as caught:
        load("kmnist", data_dir)
    assert str(data_dir / "kmnist") in str(caught.value)
    assert "array_record" in str(caught.value)
    assert time.monotonic() - start < 10


def test_a_missing_package_is_named(data_dir, monkeypatch):
    def prepare(builder):
        raise ModuleNotFoundError("No module named 'tensorflow'", name="tensorflow")

    monkeypatch.setattr(sources, "_probe", lambda builder: None)
    monkeypatch.setattr(FedgenSquares, "download_and_prepare", prepare)
    with pytest.raises(ValueError, match="needs the package 'tensorflow'"):
        load("fedgen_squares", data_dir)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fashion_mnist_mnii", "did you mean 'fashion_mnist_mini'"),
        ("digitz", "did you mean 'digits'"),
        ("no such thing at all", "unknown data set"),
        ("", "must not be empty"),
        ("imdb_reviews", "is not an image"),
        ("nothing", "must hold a data set prepared by TFDS, IDX files"),
    ],
)
def test_unknown_names(data_dir, name, message):
    write_idx(data_dir / "digits")
    (data_dir / "nothing").mkdir()
    with pytest.raises(ValueError, match=message):
        load(name, data_dir)


def test_a_missing_data_dir(tmp_path):
    with pytest.raises(ValueError, match="data_dir must be a folder, got"):
        load("digits", tmp_path / "absent")


def test_unreadable_folders(data_dir):
    folder = data_dir / "digits"
    images, labels = folder / "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
    for spoil, message in (
        (lambda: images.write_bytes(idx(IMAGES)[:-1]), "announces 9 x 4 x 5 bytes"),
        (lambda: images.write_bytes(b"PNG and so on, for long enough"), "IDX mark"),
        (lambda: images.write_bytes(b""), "got nothing"),
        (lambda: images.write_bytes(idx(IMAGES)), "holds 9 images but"),
        (lambda: (folder / labels).unlink(), "needs its labels beside it"),
        (
            lambda: images.write_bytes(idx(IMAGES[:6, :3])),
            "must have one size",
        ),
    ):
        write_idx(folder)
        spoil()
        with pytest.raises(ValueError, match=message):
            load("digits", data_dir)


def test_unreadable_gzip(data_dir):
    write_idx(data_dir / "digits", packed=True)
    path = data_dir / "digits" / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="cannot read .*train-images"):
        load("digits", data_dir)


def test_unreadable_archives(data_dir):
    path = data_dir / "own.npz"
    path.write_bytes(b"not an archive")
    with pytest.raises(ValueError, match="cannot read"):
        load("own", data_dir)
    np.savez(path, images=IMAGES)
    with pytest.raises(ValueError, match="must hold the keys x and y"):
        load("own", data_dir)
    np.savez(path, x=np.array([{}], dtype=object), y=DIGITS)
    with pytest.raises(ValueError, match="cannot read"):
        load("own", data_dir)
    np.savez(path, x=IMAGES.astype(int) * 2, y=DIGITS)
    with pytest.raises(ValueError, match=r"must lie in \[0, 255\]"):
        load("own", data_dir)
    (data_dir / "two").mkdir()
    for name in ("a", "b"):
        np.savez(data_dir / "two" / name, x=IMAGES, y=DIGITS)
    with pytest.raises(ValueError, match="must hold one .npz file, got 2"):
        load("two", data_dir)


def test_a_spoilt_tfds_folder(data_dir):
    load("fedgen_squares", data_dir)
    folder = data_dir / "fedgen_squares" / "1.2.0"
    (folder / "features.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot read .* prepared by TFDS"):
        load("fedgen_squares", data_dir)


FLOATS = np.zeros((4, 2), np.float32)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.zeros((4, 3, 3), np.uint8), [0] * 4, r"must have shape \[s, h, w, ch\]"),
        (FLOATS.astype(np.float64), [0] * 4, "must be uint8 or float32, got float64"),
        (FLOATS, [0.0] * 4, "labels must be integers"),
        (FLOATS, [[0]] * 4, r"of shape \[4, 1\]"),
        (FLOATS, [0] * 3, "got 4 samples and 3 labels"),
        (FLOATS[:0], np.zeros(0, int), "there must be samples"),
        (FLOATS, [0, 2, 1, 0], r"labels must lie in \[0, 2\), got 2 in rows 1"),
        (FLOATS, [0, -1, -7, 0], "got -7, -1 in rows 1, 2"),
        (np.where(np.eye(4, 2), np.nan, FLOATS), [0] * 4, "infinity in rows 0, 1"),
        (np.full((9, 2), np.inf, np.float32), [0] * 9, r"3, 4, ... \(9 in all\)"),
    ],
)
def test_bad_arrays_are_named(x, y, message):
    with pytest.raises(ValueError, match=message):
        check(Source("toy", x, np.asarray(y), 2))


def test_users_must_fit():
    with pytest.raises(ValueError, match="one user per sample"):
        check(Source("toy", FLOATS, np.zeros(4, np.int32), 2, np.zeros(3)))
