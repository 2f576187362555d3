"""A data set of a few hundred small images, for runs that end in a second."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """Write 480 images of 8 x 8 in four classes; return the path of the archive."""
    rng = np.random.default_rng(0)
    y = np.arange(480) % 4
    centre = rng.integers(0, 256, (4, 8, 8, 1))
    x = np.clip(centre[y] + rng.normal(0, 60, (480, 8, 8, 1)), 0, 255)
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(path, x=x.astype(np.uint8), y=y)
    return str(path)
