"""Architectures, as pure functions behind `fedgen.core.federation.Model`.

Equal arguments give the identical model object, so that jitted functions which take
a model as a static argument are compiled once.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence

from fedgen.core.federation import Model
from fedgen.models.cnn import cnn, small_cnn
from fedgen.models.mlp import mlp, small_mlp
from fedgen.models.resnet import resnet8, resnet18

__all__ = [
    "MODELS",
    "build",
    "cnn",
    "mlp",
    "resnet8",
    "resnet18",
    "small_cnn",
    "small_mlp",
]

MODELS: dict[str, Callable[..., Model]] = {
    "mlp": mlp,
    "cnn": cnn,
    "small_cnn": small_cnn,
    "small_mlp": small_mlp,
    "resnet8": resnet8,
    "resnet18": resnet18,
}


def build(name: str, input_shape: Sequence[int], num_classes: int) -> Model:
    """Build a registered model in its usual width.

    Args:
      name: A key of `MODELS`.
      input_shape: Shape of one sample; images are `(height, width, channels)`.
      num_classes: Number of logits.

    Raises:
      ValueError: If the name is unknown or the input does not suit the model.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=1, cutoff=0.0)
        raise ValueError(
            f"unknown model {name!r}, did you mean {near[0]!r}? "
            f"Known: {', '.join(MODELS)}"
        )
    return MODELS[name](tuple(map(int, input_shape)), int(num_classes))
