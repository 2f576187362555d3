"""Architectures, as pure functions behind `fedgen.core.federation.Model`.

Equal arguments give the identical model object, so that jitted functions which take
a model as a static argument are compiled once.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Sequence

from fedgen.core.federation import Model
from fedgen.models.cnn import cnn, small_cnn
from fedgen.models.mlp import mlp
from fedgen.models.resnet import resnet8, resnet18

__all__ = [
    "MODELS",
    "build",
    "cnn",
    "mlp",
    "resnet8",
    "resnet18",
    "small_cnn",
]

MODELS: dict[str, Callable[..., Model]] = {
    "mlp": mlp,
    "cnn": cnn,
    "small_cnn": small_cnn,
    "resnet8": resnet8,
    "resnet18": resnet18,
}


def find(name: str) -> Callable[..., Model]:
    """Look up a builder `(input_shape, num_classes) -> Model` by name.

    Args:
      name: A key of `MODELS`, or `mlp` with a number of hidden units, as `mlp32`.

    Raises:
      ValueError: If the name is unknown; it proposes the nearest.
    """
    if name in MODELS:
        return MODELS[name]
    if wide := re.fullmatch("mlp([1-9][0-9]*)", name):
        return functools.partial(mlp, hidden=int(wide[1]))
    near = difflib.get_close_matches(name, MODELS, n=1, cutoff=0.0)
    raise ValueError(
        f"unknown model {name!r}, did you mean {near[0]!r}? Known: "
        f"{', '.join(MODELS)}, and mlp with a number of hidden units, as mlp32"
    )


def build(name: str, input_shape: Sequence[int], num_classes: int) -> Model:
    """Build a model by name, in its usual width if the name gives none.

    Args:
      name: As for `find`.
      input_shape: Shape of one sample; images are `(height, width, channels)`.
      num_classes: Number of logits.

    Raises:
      ValueError: If the name is unknown or the input does not suit the model.
    """
    return find(name)(tuple(map(int, input_shape)), int(num_classes))
