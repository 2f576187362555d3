"""The control of pFedGM: its head, on an extractor that FedAvg trained.

With equal options of the head, what separates the two is pFedGM's training alone.
"""

from __future__ import annotations

import math

import optax

from fedgen.algorithms.pfedgm import pfedgm
from fedgen.core.algorithm import Algorithm
from fedgen.core.fit import Schedule


def fedavg_gaussian(
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    *,
    gain: str = "scalar",
    process_noise: float = math.inf,
    covariance_strength: float = 4.0,
    shrinkage: float = 0.01,
    prior_concentration: float = 0.1,
    temperature: float = 0.7,
    inference: str = "plugin",
) -> Algorithm:
    """Build FedAvg under the head of pFedGM; arguments as for `pfedgm`."""
    return pfedgm(
        optimizer,
        schedule,
        navigator="linear",
        pull=0.0,
        resampling=1.0,
        gain=gain,
        process_noise=process_noise,
        covariance_strength=covariance_strength,
        shrinkage=shrinkage,
        prior_concentration=prior_concentration,
        temperature=temperature,
        inference=inference,
    )
