import numpy as np
import pytest
import scipy.fft
import scipy.ndimage

from fedgen.data import shift
from fedgen.data.shift import (
    CORRUPTIONS,
    class_groups,
    corrupt,
    corrupt_clients,
    permute_labels,
    rotations,
    two_sources,
)
from fedgen.data.sources import Source, load


@pytest.fixture(scope="module")
def images():
    return load("fashion_mnist_mini").x[:200]


@pytest.fixture(scope="module")
def colour():
    rng = np.random.default_rng(0)
    smooth = scipy.ndimage.gaussian_filter(rng.random((6, 20, 12, 3)), (0, 2, 2, 0))
    smooth = (smooth - smooth.min()) / np.ptp(smooth)
    return np.round(smooth * 255).astype(np.uint8)


def psnr(x, y):
    error = np.mean((x.astype(float) - y.astype(float)) ** 2)
    return 10 * np.log10(255**2 / error)


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize("data", ["images", "colour"])
def test_the_severity_rises(kind, data, request):
    x = request.getfixturevalue(data)
    before = x.copy()
    quality = []
    for severity in range(1, 6):
        y = corrupt(x, kind, severity)
        assert y.dtype == np.uint8
        assert y.shape == x.shape
        quality.append(psnr(x, y))
    np.testing.assert_array_equal(x, before)
    assert np.all(np.diff(quality) < 0), quality
    assert 5 < quality[-1] < quality[0] < 50


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_sample_is_corrupted_alike_in_any_company(kind, images, monkeypatch):
    whole = corrupt(images, kind, 3, seed=7)
    rows = np.array([150, 3, 90])
    some = corrupt(images[rows], kind, 3, seed=7, rows=rows)
    np.testing.assert_array_equal(some, whole[rows])
    monkeypatch.setattr(shift, "_CHUNK", 17)
    np.testing.assert_array_equal(corrupt(images, kind, 3, seed=7), whole)


@pytest.mark.parametrize("kind", ["noise", "occlusion"])
def test_the_seed_and_the_row_matter(kind):
    grey = np.full((2, 16, 16, 1), 100, np.uint8)
    first = corrupt(grey, kind, 3, seed=0)
    assert (first[0] != first[1]).any()
    assert (first != corrupt(grey, kind, 3, seed=1)).any()


def test_noise_has_its_standard_deviation():
    grey = np.full((50, 32, 32, 1), 128, np.uint8)
    noise = corrupt(grey, "noise", 1).astype(float) - 128
    np.testing.assert_allclose(noise.std() / 255, 0.08, rtol=0.02)
    np.testing.assert_allclose(noise.mean(), 0, atol=0.5)


def test_contrast_and_brightness_by_hand():
    x = np.array([[[10.0], [250.0]], [[40.0], [100.0]]], np.uint8)[None]
    halved = np.round(100 + 0.5 * (x.astype(float) - 100))
    np.testing.assert_array_equal(corrupt(x, "contrast", 2), halved)
    brighter = np.minimum(255, np.round(x + 0.4 * 255))
    np.testing.assert_array_equal(corrupt(x, "brightness", 4), brighter)


def test_blur_spreads_a_point_without_mixing_images_or_channels():
    x = np.zeros((2, 15, 15, 2), np.uint8)
    x[0, 7, 7, 0] = 255
    y = corrupt(x, "blur", 3)
    assert not y[1].any()
    assert not y[0, ..., 1].any()
    # The centre of a Gaussian of standard deviation 1 is 1 / (2 pi).
    np.testing.assert_allclose(y[0, 7, 7, 0] / 255, 1 / (2 * np.pi), atol=0.005)
    np.testing.assert_array_equal(y[0, ..., 0], y[0, ..., 0].T)


def test_jpeg_quantises_each_block(images):
    x = images[:3, :24, :16]
    y = corrupt(x, "jpeg", 1)
    # Quality 25 doubles the table; block by block, one image at a time.
    step = np.clip(2 * shift._JPEG_LUMINANCE.astype(float), 1, 255)
    for image, found in zip(x[..., 0], y[..., 0], strict=True):
        for top in range(0, 24, 8):
            for left in range(0, 16, 8):
                place = np.s_[top : top + 8, left : left + 8]
                code = scipy.fft.dctn(image[place] - 128.0, norm="ortho")
                code = np.round(code / step) * step
                block = np.clip(scipy.fft.idctn(code, norm="ortho") + 128, 0, 255)
                np.testing.assert_allclose(found[place], block, atol=0.51)


def test_occlusion_is_one_grey_square():
    x = np.zeros((300, 20, 20, 1), np.uint8)
    y = corrupt(x, "occlusion", 3)
    assert set(np.unique(y)) == {0, 128}
    hidden = y[..., 0] > 0
    np.testing.assert_array_equal(hidden.sum(axis=(1, 2)), 64)
    np.testing.assert_array_equal(hidden.any(axis=1).sum(axis=1), 8)
    np.testing.assert_array_equal(hidden.any(axis=2).sum(axis=1), 8)
    for axis in (1, 2):
        # 13 places along an axis: among 300 squares, both edges are touched.
        assert hidden.any(axis=(0, axis)).all()


def test_the_first_clients_are_corrupted_in_turn(images):
    owner = np.arange(200) % 8
    kinds = ("blur", "noise", "contrast")
    y = corrupt_clients(images, owner, kinds=kinds, severity=2, seed=5)
    for client in range(8):
        rows = np.flatnonzero(owner == client)
        expected = images[rows]
        if client < 4:
            kind = kinds[client % 3]
            expected = corrupt(images[rows], kind, 2, seed=5, rows=rows)
            assert (expected != images[rows]).any()
        np.testing.assert_array_equal(y[rows], expected)
    some = corrupt_clients(images, owner, share=0.25, num_clients=16)
    np.testing.assert_array_equal(some[owner >= 4], images[owner >= 4])
    assert (some[owner == 3] != images[owner == 3]).any()


def test_rotations_turn_anticlockwise_and_back(images):
    domain = np.arange(200) % 4
    y = rotations(images, domain)
    for row in range(4):
        np.testing.assert_array_equal(y[row], np.rot90(images[row], row))
    np.testing.assert_array_equal(rotations(y, -domain % 4), images)
    assert (y != images).any()


def test_class_groups_by_hand():
    np.testing.assert_array_equal(
        class_groups(np.array([0, 1, 2, 3, 4, 9]), 3), [0, 0, 1, 1, 2, 2]
    )
    np.testing.assert_array_equal(class_groups(np.array([5, 5, 7]), 1), [0, 0, 0])


def test_permuted_labels_are_permutations_by_domain():
    labels = np.tile(np.arange(10), 30)
    domain = np.repeat(np.arange(3), 100)
    y = permute_labels(labels, domain, 10, seed=0)
    np.testing.assert_array_equal(y[:100], labels[:100])
    for number in (1, 2):
        block = y[domain == number].reshape(10, 10)
        assert (block == block[0]).all()
        np.testing.assert_array_equal(np.sort(block[0]), np.arange(10))
    assert (y[100:200] != y[200:]).any()
    assert (y[100:200] != labels[100:200]).any()
    alone = permute_labels(labels[200:], domain[200:], 10, seed=0)
    np.testing.assert_array_equal(alone, y[200:])


def toy(name, shape=(3, 4, 4, 1), dtype=np.uint8, num_classes=2):
    rng = np.random.default_rng(len(name))
    x = rng.integers(0, 255, shape).astype(dtype)
    return Source(name, x, np.arange(len(x), dtype=np.int32) % 2, num_classes)


def test_two_sources_are_joined():
    a, b = toy("a"), toy("bb", (5, 4, 4, 1))
    joint, domain = two_sources(a, b)
    np.testing.assert_array_equal(joint.x[domain == 0], a.x)
    np.testing.assert_array_equal(joint.x[domain == 1], b.x)
    np.testing.assert_array_equal(joint.y, [0, 1, 0, 0, 1, 0, 1, 0])
    assert joint.name == "a+bb"


GREY = np.zeros((2, 4, 4, 1), np.uint8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: corrupt(GREY, "nois", 1), "did you mean 'noise'"),
        (lambda: corrupt(GREY, "noise", 0), "must be 1, 2, 3, 4 or 5, got 0"),
        (lambda: corrupt(GREY, "noise", 6), "got 6"),
        (lambda: corrupt(GREY.astype(np.float32), "blur", 1), "need uint8 images"),
        (lambda: corrupt_clients(GREY, np.zeros(2), share=1.5), "share must lie in"),
        (lambda: corrupt_clients(GREY, np.zeros(3)), "one entry per image, 2"),
        (lambda: corrupt_clients(GREY, np.zeros(2), kinds=()), "got none"),
        (lambda: rotations(GREY[:, :3], np.zeros(2)), "need square images"),
        (lambda: rotations(GREY, np.array([0, 4])), "quarter turns"),
        (lambda: rotations(GREY, np.zeros(3)), "quarter turns"),
        (lambda: class_groups(np.arange(3), 4), "between 1 and the 3 classes"),
        (lambda: two_sources(toy("a"), toy("b", (3, 5, 5, 1))), "same shape"),
        (lambda: two_sources(toy("a"), toy("b", dtype=np.float32)), "same type"),
        (lambda: two_sources(toy("a"), toy("b", num_classes=3)), "number of classes"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
