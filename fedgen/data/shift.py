"""How clients differ beside their labels: domains, corruptions, other labels.

A sample belongs to one client, so a shift of a client is a change of its samples,
made once in a copy of the pool; training pays nothing for it. Everything is
deterministic, and what is random depends on (seed, row of the pool) alone, so the
same sample is corrupted in the same way whoever holds it.

The corruptions are those of Hendrycks and Dietterich (ICLR 2019) in kind, with five
severities each, simplified: brightness is added to all channels, and the JPEG
quantisation works on each channel with the luminance table of the standard
(ITU-T T.81, annex K), without subsampling of colour.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence

import numpy as np
import scipy  # its parts load when they are used, half a second that few runs need

from fedgen.data.sources import Source

_CHUNK = 4096

_NOISE_STD = (0.08, 0.12, 0.18, 0.26, 0.38)
_BLUR_SIGMA = (0.5, 0.75, 1.0, 1.5, 2.0)
_CONTRAST = (0.75, 0.5, 0.4, 0.3, 0.15)
_BRIGHTNESS = (0.1, 0.2, 0.3, 0.4, 0.5)
_JPEG_QUALITY = (25, 18, 15, 10, 7)
_OCCLUDED_SIDE = (0.2, 0.3, 0.4, 0.5, 0.6)
_JPEG_LUMINANCE = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ],
    np.float32,
)


def rotations(x: np.ndarray, domain: np.ndarray) -> np.ndarray:
    """Rotate every image by `domain` quarter turns, anticlockwise.

    Args:
      x: `[s, h, h, ch]` square images.
      domain: `[s]` integers in 0..3.

    Returns:
      The rotated images, in a new array.

    Raises:
      ValueError: If images are not square, or a domain is not in 0..3.
    """
    domain = np.asarray(domain)
    if x.ndim != 4 or x.shape[1] != x.shape[2]:
        raise ValueError(
            f"rotations need square images [s, h, h, ch], got {list(x.shape)}"
        )
    if domain.shape != x.shape[:1] or not np.isin(domain, range(4)).all():
        raise ValueError("domain must give 0, 1, 2 or 3 quarter turns for every image")
    rotated = x.copy()
    for turns in (1, 2, 3):
        rows = np.flatnonzero(domain == turns)
        rotated[rows] = np.rot90(x[rows], turns, axes=(1, 2))
    return rotated


def two_sources(a: Source, b: Source) -> tuple[Source, np.ndarray]:
    """Join two data sets of the same shape and classes into one with two domains.

    Args:
      a: Samples of domain 0.
      b: Samples of domain 1.

    Returns:
      The joint source and `domain [s]`.

    Raises:
      ValueError: If shapes, types or numbers of classes differ.
    """
    for what, first, second in (
        ("shape", a.x.shape[1:], b.x.shape[1:]),
        ("type", a.x.dtype, b.x.dtype),
        ("number of classes", a.num_classes, b.num_classes),
    ):
        if first != second:
            raise ValueError(
                f"{a.name} and {b.name} must have the same {what}, got {first} and "
                f"{second}"
            )
    joint = Source(
        f"{a.name}+{b.name}",
        np.concatenate([a.x, b.x]),
        np.concatenate([a.y, b.y]),
        a.num_classes,
    )
    return joint, np.repeat(np.arange(2, dtype=np.int32), (len(a.y), len(b.y)))


def class_groups(labels: np.ndarray, num_groups: int) -> np.ndarray:
    """Make groups of neighbouring classes the domains.

    Args:
      labels: `[s]` class of every sample.
      num_groups: Number of domains, of classes as equal in number as can be.

    Returns:
      `[s]` int32, the group of every sample.

    Raises:
      ValueError: If there are more groups than classes, or none.
    """
    classes, index = np.unique(labels, return_inverse=True)
    if not 1 <= num_groups <= len(classes):
        raise ValueError(
            f"num_groups must be between 1 and the {len(classes)} classes present, got "
            f"{num_groups}"
        )
    return (index * num_groups // len(classes)).astype(np.int32)


def permute_labels(
    labels: np.ndarray, domain: np.ndarray, num_classes: int, *, seed: int
) -> np.ndarray:
    """Rename the classes of each domain by a permutation of its own.

    Domain 0 keeps its labels. With the owner of every sample as `domain`, each
    client beside client 0 has its own names for the classes.

    Args:
      labels: `[s]` class of every sample.
      domain: `[s]` domain, or client, of every sample; from 0.
      num_classes: Number of classes `c`.
      seed: Seed of the permutations; each depends on the seed and its domain only.

    Returns:
      `[s]` int32 labels, in a new array.
    """
    names = np.tile(np.arange(num_classes, dtype=np.int32), (int(domain.max()) + 1, 1))
    for number in range(1, len(names)):
        names[number] = np.random.default_rng((seed, number)).permutation(num_classes)
    return names[domain, labels]


def corrupt(
    x: np.ndarray,
    kind: str,
    severity: int,
    *,
    seed: int = 0,
    rows: np.ndarray | None = None,
) -> np.ndarray:
    """Corrupt images.

    Args:
      x: `[s, h, w, ch]` uint8 images.
      kind: A key of `CORRUPTIONS`.
      severity: From 1, slight, to 5, heavy.
      seed: Seed of what is random.
      rows: `[s]` numbers of the images in the pool; 0, 1, ... where None.

    Returns:
      `[s, h, w, ch]` uint8, in a new array.

    Raises:
      ValueError: If the kind is unknown, the severity is not in 1..5, or the samples
        are not uint8 images.
    """
    _check_corruption(x, kind, severity)
    rows = np.arange(len(x)) if rows is None else np.asarray(rows)
    corrupted = np.empty_like(x)
    for start in range(0, len(x), _CHUNK):
        part = slice(start, start + _CHUNK)
        image = x[part].astype(np.float32) / 255.0
        image = CORRUPTIONS[kind](image, severity - 1, seed, rows[part])
        corrupted[part] = np.round(np.clip(image, 0.0, 1.0) * 255.0).astype(np.uint8)
    return corrupted


def corrupt_clients(
    x: np.ndarray,
    owner: np.ndarray,
    *,
    kinds: Sequence[str] | None = None,
    severity: int = 3,
    share: float = 0.5,
    seed: int = 0,
    num_clients: int | None = None,
) -> np.ndarray:
    """Corrupt all samples of the first clients, each client in one way.

    Client `i` of the corrupted ones has corruption `kinds[i % len(kinds)]`.

    Args:
      x: `[s, h, w, ch]` uint8 images.
      owner: `[s]` the client of every sample.
      kinds: Keys of `CORRUPTIONS`; all of them where None.
      severity: From 1, slight, to 5, heavy.
      share: Share of the clients to corrupt, in [0, 1].
      seed: Seed of what is random.
      num_clients: Number of clients `n`; the last client with samples ends them
        where None.

    Returns:
      `[s, h, w, ch]` uint8, in a new array.

    Raises:
      ValueError: If an argument is out of its range.
    """
    owner = np.asarray(owner)
    kinds = tuple(CORRUPTIONS) if kinds is None else tuple(kinds)
    if not kinds:
        raise ValueError("kinds must name a corruption, got none")
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in [0, 1], got {share}")
    if owner.shape != x.shape[:1]:
        raise ValueError(
            f"owner must have one entry per image, {len(x)}, got {list(owner.shape)}"
        )
    for kind in kinds:
        _check_corruption(x, kind, severity)
    if num_clients is None:
        num_clients = int(owner.max(initial=-1)) + 1
    corrupted = x.copy()
    chosen = owner < round(share * num_clients)
    for number, kind in enumerate(kinds):
        rows = np.flatnonzero(chosen & (owner % len(kinds) == number))
        corrupted[rows] = corrupt(x[rows], kind, severity, seed=seed, rows=rows)
    return corrupted


def _check_corruption(x: np.ndarray, kind: str, severity: int) -> None:
    """Raise where `corrupt` cannot do what it is asked to."""
    if kind not in CORRUPTIONS:
        near = difflib.get_close_matches(kind, CORRUPTIONS, n=1, cutoff=0.0)
        raise ValueError(
            f"unknown corruption {kind!r}; did you mean {near[0]!r}? "
            f"Known: {', '.join(CORRUPTIONS)}"
        )
    if severity not in range(1, 6):
        raise ValueError(f"severity must be 1, 2, 3, 4 or 5, got {severity}")
    if x.dtype != np.uint8 or x.ndim != 4:
        raise ValueError(
            f"corruptions need uint8 images [s, h, w, ch], got {x.dtype} of shape "
            f"{list(x.shape)}"
        )


def _generator(seed: int, row: int) -> np.random.Generator:
    """Return the random numbers of one sample of the pool."""
    return np.random.Generator(np.random.Philox(key=(seed, row)))


def _noise(x: np.ndarray, level: int, seed: int, rows: np.ndarray) -> np.ndarray:
    noise = np.empty_like(x)
    for sample, row in zip(noise, rows, strict=True):
        _generator(seed, row).standard_normal(out=sample, dtype=np.float32)
    return x + _NOISE_STD[level] * noise


def _blur(x: np.ndarray, level: int, seed: int, rows: np.ndarray) -> np.ndarray:
    del seed, rows
    sigma = _BLUR_SIGMA[level]
    return scipy.ndimage.gaussian_filter(x, (0, sigma, sigma, 0), mode="nearest")


def _contrast(x: np.ndarray, level: int, seed: int, rows: np.ndarray) -> np.ndarray:
    del seed, rows
    mean = x.mean(axis=(1, 2), keepdims=True)
    return mean + _CONTRAST[level] * (x - mean)


def _brightness(x: np.ndarray, level: int, seed: int, rows: np.ndarray) -> np.ndarray:
    del seed, rows
    return x + _BRIGHTNESS[level]


def _jpeg(x: np.ndarray, level: int, seed: int, rows: np.ndarray) -> np.ndarray:
    del seed, rows
    _, h, w, _ = x.shape
    padded = np.pad(x, ((0, 0), (0, -h % 8), (0, -w % 8), (0, 0)), mode="edge")
    shape = padded.shape
    blocks = padded.reshape(shape[0], shape[1] // 8, 8, shape[2] // 8, 8, shape[3])
    # The scale of qualities below 50 in the reference implementation of JPEG.
    scale = 50.0 / _JPEG_QUALITY[level]
    step = np.clip(np.round(_JPEG_LUMINANCE * scale), 1, 255).astype(np.float32)
    step = step[:, None, :, None]
    frequency = scipy.fft.dctn(blocks * 255.0 - 128.0, axes=(2, 4), norm="ortho")
    frequency = np.round(frequency / step) * step
    blocks = scipy.fft.idctn(frequency, axes=(2, 4), norm="ortho")
    return (blocks.reshape(shape)[:, :h, :w] + 128.0) / 255.0


def _occlusion(x: np.ndarray, level: int, seed: int, rows: np.ndarray) -> np.ndarray:
    size = np.array(x.shape[1:3])
    side = np.maximum(1, np.round(_OCCLUDED_SIDE[level] * size)).astype(int)
    draws = np.stack([_generator(seed, row).random(2) for row in rows])
    top, left = np.floor(draws * (size - side + 1)).T[..., None]
    inside_h = (np.arange(size[0]) >= top) & (np.arange(size[0]) < top + side[0])
    inside_w = (np.arange(size[1]) >= left) & (np.arange(size[1]) < left + side[1])
    # Grey is the zero of normalised images.
    return np.where((inside_h[:, :, None] & inside_w[:, None])[..., None], 0.5, x)


CORRUPTIONS: dict[str, Callable[..., np.ndarray]] = {
    "noise": _noise,
    "blur": _blur,
    "contrast": _contrast,
    "brightness": _brightness,
    "jpeg": _jpeg,
    "occlusion": _occlusion,
}
