"""Diffusion over parameter vectors: schedules, inversion, generation, codes.

A population of parameter vectors is modelled by a denoiser `denoise(x_t [p], t [])`,
which predicts the noise `eps [p]` in

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps,    t = 0..T, abar_0 = 1.

A client's vector is turned into a latent code (`invert`, `invert_noise_maps`,
`diffuse`) and decoded by the denoiser (`generate`), which pulls it towards the
population. For a Gaussian population with variance v along some direction, and with
k = `shrinkage_factor` = abar v / (abar v + 1 - abar) at the depth of the code, the
deviation from the population mean is multiplied by

    invert, then generate            1        (the identity, whatever the depth)
    diffuse, then generate, eta = 0  sqrt(k)  (in the mean over noise)
    diffuse, then generate, eta = 1  k        (in the mean over noise)

Directions in which clients agree are shrunk hard, personal ones hardly move. `shrink`
does the same to principal components without any diffusion; it is the control that
belongs beside every claim about a trained denoiser.

Functions are written for ONE client (`jax.vmap` them for more), hold no state, and work
under `jit`, `vmap` and `grad`, in float32 and float64. Letters in shapes: `m` vectors,
`p` parameters, `r` codes, `k` tokens or mixture components, `w` width of a token, `T`
times of the schedule, `s` steps taken. `t` is an integer time from 0 to T.

>>> import jax, jax.numpy as jnp
>>> uploads = jax.random.normal(jax.random.key(0), (20, 300))  # m = 20, p = 300
>>> schedule = linear_schedule(1000)
>>> basis = fit_basis(uploads, 8)
>>> denoise = gaussian_denoiser(schedule, jnp.zeros(8), basis.cov)  # or a network
>>> @jax.jit
... def personalise(key, x):
...     code = invert_noise_maps(
...         denoise, schedule, encode(basis, x), depth=100, steps=6, key=key
...     )
...     generated = generate(denoise, schedule, code, gamma=0.5)
...     return reconstruct(basis, x, generated, rho=0.5)
>>> keys = jax.random.split(jax.random.key(1), 20)
>>> jax.vmap(personalise)(keys, uploads).shape
(20, 300)

Wrong shapes raise a `ValueError`, also while tracing. Values are checked where they are
known, that is outside `jit` and `vmap`, and raise a `ValueError` too. Where they are
not known, everything stays finite: numbers outside their range are moved to its end
(NaN to the lower end), a coordinate of one vector that is not finite counts as 0, and a
row of a set of vectors that is not finite is left out of the set. Schedules and bases
are constants to derivatives.

What is a reconstruction: of pFedGPA the abstract and the skeleton of Algorithm 1 were
known, not its equation for the inversion. Noise-map inversion is the reading that fits
its description best (a deterministic perturbation that carries the parameters in place
of the random draw); DDIM inversion and plain noising are the alternatives. `gamma`, the
depth, the residual kept by the last map, the codes by principal components in place of
an auto-encoder, and the sign in `guide` are choices made here.

References:
  Lai et al., pFedGPA: Diffusion-based Generative Parameter Aggregation for
    Personalized Federated Learning, AAAI 2025, arXiv:2409.05701.
  Ho, Jain and Abbeel, Denoising Diffusion Probabilistic Models, 2020 (eqs. 4, 7, 14).
  Song, Meng and Ermon, Denoising Diffusion Implicit Models, 2021 (eqs. 12, 16).
  Nichol and Dhariwal, Improved Denoising Diffusion Probabilistic Models, 2021 (eq. 17).
  Salimans and Ho, Progressive Distillation, 2022 (v-prediction).
  Huberman-Spiegelglas, Kulikov and Michaeli, An Edit Friendly DDPM Noise Space, 2024.
  Pan et al., Effective Real Image Editing with Accelerated Iterative Diffusion
    Inversion, 2023 (fixed-point DDIM inversion).
  Meng et al., SDEdit, 2022.
  Dhariwal and Nichol, Diffusion Models Beat GANs, 2021 (guidance, eq. 14).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedgen.aggregators._checks import check_shapes, is_known
from fedgen.aggregators._numerics import matmul

Denoise = Callable[[jax.Array, jax.Array], jax.Array]  # x_t [p], t [] -> eps [p]

SCALES = ("scalar", "coordinate")


class Schedule(NamedTuple):
    """How much signal and noise `x_t` holds at times 0..T; time 0 is clean."""

    signal: jax.Array  # [T + 1] sqrt(abar_t)
    noise: jax.Array  # [T + 1] sqrt(1 - abar_t), without cancellation for small t

    @property
    def alpha_bar(self) -> jax.Array:
        """Return abar `[T + 1]`, from 1 downwards."""
        return self.signal**2

    @property
    def num_times(self) -> int:
        """Return T."""
        return self.signal.shape[0] - 1

    def at(self, t: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        """Look up signal and noise `[]` at time `t []`."""
        t = _time("t", t, 0, self.num_times)
        levels = self.signal[t].astype(dtype), self.noise[t].astype(dtype)
        return jax.lax.stop_gradient(levels)


class Code(NamedTuple):
    """What a parameter vector is turned into, and what it is generated from."""

    latent: jax.Array  # [p] x at time times[-1]
    noise: jax.Array | None  # [s, p] noise maps, first used first; None without
    times: jax.Array  # [s + 1] times visited, ascending from 0


class Normalizer(NamedTuple):
    """An affine map of vectors to deviations of about unit size."""

    mean: jax.Array  # [p]
    scale: jax.Array  # [] or [p], > 0


class Basis(NamedTuple):
    """An orthonormal basis of the directions in which a population varies most."""

    mean: jax.Array  # [p]
    directions: jax.Array  # [r, p] orthonormal rows; 0 beyond the rank of the data
    cov: jax.Array  # [r, r] covariance of the codes; diagonal until aligned


# Checks.


def _bounded(name: str, value, lower: float, upper: float) -> jax.Array:
    """Check that a number lies in a range, or move it there if it is not known."""
    if is_known(value):
        known = np.asarray(value)
        if not np.all((known >= lower) & (known <= upper)):
            raise ValueError(f"{name} must be in [{lower}, {upper}], got {value}")
    value = jnp.asarray(value)
    value = value.astype(jnp.result_type(value.dtype, jnp.float32))
    # Comparisons, not clip: the derivative at an end of the range must be 1.
    value = jnp.where(value >= lower, value, lower)
    return jnp.where(value <= upper, value, upper)


def _time(name: str, t, lower: int, upper: int) -> jax.Array:
    """Check that an integer lies in a range, or move it there if it is not known."""
    if not jnp.issubdtype(jnp.result_type(t), jnp.integer):
        raise ValueError(f"{name} must be an integer, got {t}")
    if is_known(t) and not np.all((np.asarray(t) >= lower) & (np.asarray(t) <= upper)):
        raise ValueError(f"{name} must be in [{lower}, {upper}], got {t}")
    return jnp.clip(t, lower, upper)


def _finite(name: str, x: jax.Array, letters: str) -> jax.Array:
    """Check shape and values, or put 0 where a value that is not known is not finite.

    Returns the array in its own dtype, but at least float32.
    """
    check_shapes(**{name: (x, letters)})
    if is_known(x) and not np.all(np.isfinite(x)):
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    x = jnp.asarray(x, jnp.result_type(x, jnp.float32))
    return jnp.where(jnp.isfinite(x), x, 0)


def _size(name: str, value: int, upper: int | None = None) -> None:
    """Check an integer that fixes a shape."""
    if not 1 <= value <= (value if upper is None else upper):
        expected = ">= 1" if upper is None else f"in [1, {upper}]"
        raise ValueError(f"{name} must be {expected}, got {value}")


def _rows(x: jax.Array, weight: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Return a set of vectors with absent rows 0, and weights that sum to 1 or 0."""
    weight = jnp.ones(jnp.shape(x)[:1]) if weight is None else weight
    check_shapes(x=(x, "mp"), weight=(weight, "m"))
    if is_known(x, weight):
        known = np.asarray(weight)
        if not (np.all(known >= 0) and 0 < np.sum(known) < np.inf):
            raise ValueError(f"weight must be >= 0 and not all 0, got {known}")
        if not np.all(np.isfinite(np.asarray(x)[known > 0])):
            raise ValueError("x must be finite in rows of positive weight, got NaN")
    x = jnp.asarray(x, jnp.result_type(x, jnp.float32))
    weight = jnp.asarray(weight, x.dtype)
    present = jnp.all(jnp.isfinite(x), axis=1) & jnp.isfinite(weight) & (weight > 0)
    weight = jnp.where(present, weight, 0)
    total = jnp.sum(weight)
    x = jnp.where(present[:, None], x, 0)
    return x, weight / jnp.where(total > 0, total, 1)


def _eps(denoise: Denoise, x: jax.Array, t: jax.Array) -> jax.Array:
    eps = denoise(x, t)
    if jnp.shape(eps) != x.shape:
        raise ValueError(
            f"denoise must return the shape of its input {x.shape}, got "
            f"{jnp.shape(eps)}"
        )
    return eps.astype(x.dtype)


# Schedules.


def _from_betas(beta: np.ndarray) -> Schedule:
    """Tabulate in float64 on the host: `1 - abar` cancels in float32."""
    log_alpha_bar = np.concatenate([[0.0], np.cumsum(np.log1p(-beta))])
    signal, noise = np.exp(log_alpha_bar / 2), np.sqrt(-np.expm1(log_alpha_bar))
    return Schedule(jnp.asarray(signal), jnp.asarray(noise))


def linear_schedule(
    num_times: int = 1000, beta_min: float = 1e-4, beta_max: float = 2e-2
) -> Schedule:
    """Build the schedule of Ho et al., with betas equally spaced.

    Raises:
      ValueError: Unless `num_times >= 1` and `0 < beta_min <= beta_max < 1`.
    """
    _size("num_times", num_times)
    if not 0 < beta_min <= beta_max < 1:
        raise ValueError(
            "expected 0 < beta_min <= beta_max < 1, got "
            f"beta_min {beta_min} and beta_max {beta_max}"
        )
    return _from_betas(np.linspace(beta_min, beta_max, num_times))


def cosine_schedule(
    num_times: int = 1000, offset: float = 0.008, beta_max: float = 0.999
) -> Schedule:
    """Build the schedule of Nichol and Dhariwal, with betas cut at `beta_max`.

    Raises:
      ValueError: Unless `num_times >= 1`, `offset >= 0` and `0 < beta_max < 1`.
    """
    _size("num_times", num_times)
    if not (0 <= offset < np.inf and 0 < beta_max < 1):
        raise ValueError(
            "expected offset >= 0 and 0 < beta_max < 1, got "
            f"offset {offset} and beta_max {beta_max}"
        )
    time = np.arange(num_times + 1) / num_times
    alpha_bar = np.cos((time + offset) / (1 + offset) * np.pi / 2) ** 2
    return _from_betas(np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], beta_max))


# The forward process and what a denoiser predicts.


def forward(
    schedule: Schedule, x0: jax.Array, t: jax.Array, eps: jax.Array
) -> jax.Array:
    """Mix signal and noise to `x_t` (Ho et al., eq. 4).

    Args:
      schedule: Levels of signal and noise.
      x0: `[p]` clean vector.
      t: `[]` time from 0 to T.
      eps: `[p]` standard normal noise.

    Returns:
      `[p]`.
    """
    check_shapes(x0=(x0, "p"), eps=(eps, "p"))
    x0 = _finite("x0", x0, "p")
    signal, noise = schedule.at(t, x0.dtype)
    return signal * x0 + noise * _finite("eps", eps, "p").astype(x0.dtype)


def x0_from_eps(
    schedule: Schedule, x: jax.Array, t: jax.Array, eps: jax.Array
) -> jax.Array:
    """Solve `forward` for the clean vector, `[p]`; errors grow by sqrt(1/abar_t)."""
    check_shapes(x=(x, "p"), eps=(eps, "p"))
    signal, noise = schedule.at(t, x.dtype)
    return (x - noise * eps) / signal


def eps_from_x0(
    schedule: Schedule, x: jax.Array, t: jax.Array, x0: jax.Array
) -> jax.Array:
    """Solve `forward` for the noise, `[p]`; 0 at time 0, where there is none."""
    check_shapes(x=(x, "p"), x0=(x0, "p"))
    signal, noise = schedule.at(t, x.dtype)
    return jnp.where(noise > 0, (x - signal * x0) / jnp.where(noise > 0, noise, 1), 0)


def eps_from_v(
    schedule: Schedule, x: jax.Array, t: jax.Array, v: jax.Array
) -> jax.Array:
    """Turn the velocity `v = sqrt(abar) eps - sqrt(1 - abar) x_0` into noise, `[p]`.

    Makes a denoiser of a network that predicts velocities (Salimans and Ho).
    """
    check_shapes(x=(x, "p"), v=(v, "p"))
    signal, noise = schedule.at(t, x.dtype)
    return signal * v + noise * x


def simple_loss(
    denoise: Denoise,
    schedule: Schedule,
    x: jax.Array,
    *,
    key: jax.Array,
    weight: jax.Array | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Estimate the mean squared error of the predicted noise (Ho et al., eq. 14).

    Draws one time, uniform on 1..T, and one noise for each vector.

    Args:
      denoise: Predicts the noise of one vector.
      schedule: Levels of signal and noise.
      x: `[m, p]` clean vectors. Rows of weight 0 may hold NaN.
      key: Random key.
      weight: `[m]` weights of the vectors, ones by default.
      mask: `[p]`, true for coordinates that count, all by default.

    Returns:
      `[]` weighted mean over vectors of the mean over coordinates; 0 if no vector or no
      coordinate counts.

    Raises:
      ValueError: If shapes disagree, a row of positive weight is not finite, a weight
        is negative, or no row or no coordinate counts.
    """
    x, share = _rows(x, weight)
    mask = jnp.ones(x.shape[1:], bool) if mask is None else mask
    check_shapes(x=(x, "mp"), mask=(mask, "p"))
    if is_known(mask) and not np.any(mask):
        raise ValueError("mask must hold for some coordinate, got none")
    mask = jnp.asarray(mask, bool)
    time_key, noise_key = jax.random.split(key)
    t = jax.random.randint(time_key, x.shape[:1], 1, schedule.num_times + 1)
    eps = jax.random.normal(noise_key, x.shape, x.dtype)

    def error(x0: jax.Array, t: jax.Array, eps: jax.Array) -> jax.Array:
        residual = _eps(denoise, forward(schedule, x0, t, eps), t) - eps
        return jnp.sum(jnp.where(mask, residual, 0) ** 2)

    return jnp.dot(share, jax.vmap(error)(x, t, eps)) / jnp.maximum(jnp.sum(mask), 1)


# Denoisers in closed form.


def gaussian_denoiser(schedule: Schedule, mean: jax.Array, cov: jax.Array) -> Denoise:
    """Build the optimal denoiser of a Gaussian population.

    `eps = sqrt(1 - abar) (abar S + (1 - abar) I)^-1 (x - sqrt(abar) m)`, linear in x.
    It is an oracle, and the part that a network need not learn if it is added to one.

    Args:
      schedule: Levels of signal and noise.
      mean: `[p]` m.
      cov: S, `[p]` variances or `[p, p]`, positive semi-definite; negative eigenvalues
        that are not known to be so count as 0.

    Raises:
      ValueError: If shapes disagree, or values are not finite or not semi-definite.
    """
    letters = "pp" if jnp.ndim(cov) == 2 else "p"
    check_shapes(mean=(mean, "p"), cov=(cov, letters))
    mean, cov = _finite("mean", mean, "p"), _finite("cov", cov, letters)
    variance, rotation = (cov, None) if cov.ndim == 1 else jnp.linalg.eigh(cov)
    variance, rotation = jax.lax.stop_gradient((variance, rotation))
    if is_known(variance):
        slack = 10 * variance.size * float(jnp.finfo(cov.dtype).eps)
        if jnp.min(variance) < -slack * jnp.max(jnp.abs(variance)):
            raise ValueError(
                "cov must be positive semi-definite, got an eigenvalue "
                f"{jnp.min(variance)}"
            )
    variance = jnp.maximum(variance, 0)

    def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
        signal, noise = schedule.at(jnp.maximum(t, 1), x.dtype)
        deviation = x - signal * mean.astype(x.dtype)
        gain = noise / (signal**2 * variance.astype(x.dtype) + noise**2)
        if rotation is None:
            return gain * deviation
        turn = rotation.astype(x.dtype)
        return matmul(turn, gain * matmul(turn.T, deviation))

    return denoise


def mixture_denoiser(
    schedule: Schedule, mean: jax.Array, variance: jax.Array, weight: jax.Array
) -> Denoise:
    """Build the optimal denoiser of a mixture of Gaussians with diagonal covariances.

    Variance 0 gives the denoiser of a finite set of points, which is what a network
    that memorises its uploads becomes: everything it generates is one of them.

    Args:
      schedule: Levels of signal and noise.
      mean: `[k, p]`.
      variance: `[k, p]`, at least 0.
      weight: `[k]`, at least 0; need not sum to 1. Weights that are all 0 and not known
        to be so count as equal.

    Raises:
      ValueError: If shapes disagree, or values are not finite, negative, or no weight
        is positive.
    """
    check_shapes(mean=(mean, "kp"), variance=(variance, "kp"), weight=(weight, "k"))
    mean = _finite("mean", mean, "kp")
    variance = _bounded("variance", _finite("variance", variance, "kp"), 0, np.inf)
    weight = _bounded("weight", _finite("weight", weight, "k"), 0, np.inf)
    if is_known(weight) and not np.any(weight):
        raise ValueError("weight must be positive for some component, got all 0")
    weight = jnp.where(jnp.any(weight > 0), weight, 1)
    log_weight = jnp.log(jnp.where(weight > 0, weight, 1))

    def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
        signal, noise = schedule.at(jnp.maximum(t, 1), x.dtype)
        deviation = x[None] - signal * mean.astype(x.dtype)
        total = signal**2 * variance.astype(x.dtype) + noise**2
        score = jnp.sum(deviation**2 / total + jnp.log(total), axis=1) / 2
        logits = log_weight.astype(x.dtype) - score
        share = jax.nn.softmax(logits, where=weight > 0)
        return matmul(share, noise * deviation / total)

    return denoise


# Changes to a denoiser.


def clip_denoiser(denoise: Denoise, schedule: Schedule, limit: float) -> Denoise:
    """Keep the clean vector that a denoiser implies within `-limit..limit`.

    A guard for great depths, where errors of a poor denoiser grow by sqrt(1/abar). Use
    the same limit for a code and for what is generated from it.

    Raises:
      ValueError: If the limit is negative.
    """
    limit = _bounded("limit", limit, 0, np.inf)

    def clipped(x: jax.Array, t: jax.Array) -> jax.Array:
        t = jnp.maximum(t, 1)
        x0 = x0_from_eps(schedule, x, t, _eps(denoise, x, t))
        bound = limit.astype(x.dtype)
        return eps_from_x0(schedule, x, t, jnp.clip(x0, -bound, bound))

    return clipped


def guide(
    denoise: Denoise,
    schedule: Schedule,
    before: jax.Array,
    after: jax.Array,
    *,
    omega: float = 0.0,
    sign: int = 1,
) -> Denoise:
    """Steer a denoiser along a client's own local update (pFedGPA, Algorithm 1).

    `eps + (1 + omega) sqrt(1 - abar_t) (before - after)`: classifier guidance with the
    local update in place of the negative gradient. The operator before `(1 + omega)` is
    not legible in the paper's text; a reverse step subtracts eps, hence the plus, with
    which a guided step lowers the client's loss.

    Args:
      denoise: Predicts the noise of one vector.
      schedule: Levels of signal and noise.
      before: `[p]` normalised parameters before the local update.
      after: `[p]` normalised parameters after it.
      omega: Strength, at least -1, at which guidance is off.
      sign: 1, or -1 for the other reading of the paper.

    Raises:
      ValueError: If shapes disagree, a value is not finite, `omega < -1` or the sign is
        neither 1 nor -1.
    """
    if sign not in (1, -1):
        raise ValueError(f"sign must be 1 or -1, got {sign}")
    check_shapes(before=(before, "p"), after=(after, "p"))
    shift = _finite("before", before, "p") - _finite("after", after, "p")
    largest = float(jnp.finfo(shift.dtype).max) ** 0.5
    strength = sign * (1 + _bounded("omega", omega, -1, largest))

    def guided(x: jax.Array, t: jax.Array) -> jax.Array:
        noise = schedule.at(t, x.dtype)[1]
        return _eps(denoise, x, t) + strength * noise * shift.astype(x.dtype)

    return guided


# Steps between times.


def step(
    schedule: Schedule,
    x: jax.Array,
    eps: jax.Array,
    t: jax.Array,
    u: jax.Array,
    *,
    eta: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Go back from time `t` to `u < t` (Song et al., eqs. 12 and 16).

    `eta = 0` is DDIM. `eta = 1` is the posterior of the forward process: with
    `u = t - 1` the ancestral step of Ho et al., with their smaller variance.

    Args:
      schedule: Levels of signal and noise.
      x: `[p]` at time t.
      eps: `[p]` its predicted noise.
      t: `[]` time, from 1 to T.
      u: `[]` time, from 0 to t - 1.
      eta: Share of fresh noise, from 0 to 1.

    Returns:
      Mean `[p]` and standard deviation `[]` of x at time u; the deviation is 0 for
      `eta = 0` and for `u = 0`.

    Raises:
      ValueError: If shapes disagree, or a time or eta is out of range.
    """
    if is_known(t, u) and not u < t:
        raise ValueError(f"u must be < t = {t}, got {u}")
    eta = _bounded("eta", eta, 0, 1).astype(x.dtype)
    (signal_t, noise_t), (signal_u, noise_u) = (
        schedule.at(jnp.maximum(t, 1), x.dtype),
        schedule.at(u, x.dtype),
    )
    # Of the noise at u, `kept` is what the noise at t says and `fresh` the rest.
    kept = signal_t * noise_u / (signal_u * noise_t)
    fresh = jnp.where(noise_u > 0, jnp.maximum(1 - kept**2, 0), 0)
    x0 = x0_from_eps(schedule, x, jnp.maximum(t, 1), eps)
    mean = signal_u * x0 + noise_u * jnp.sqrt(1 - eta**2 * fresh) * eps
    return mean, eta * noise_u * jnp.sqrt(fresh)


def _time_grid(schedule: Schedule, depth: jax.Array, steps: int) -> jax.Array:
    """Divide 0..depth into steps, `[s + 1]` distinct times."""
    _size("steps", steps, schedule.num_times)
    depth = _time("depth", depth, steps, schedule.num_times)
    return (jnp.arange(steps + 1) * depth) // steps


def _where_positive(sigma: jax.Array) -> jax.Array:
    """Scale of a noise map; 1 where a step has no noise and the map is a residual."""
    return jnp.where(sigma > 0, sigma, 1)


# Codes.


def invert(
    denoise: Denoise,
    schedule: Schedule,
    x: jax.Array,
    *,
    depth: int,
    steps: int,
    refinements: int = 3,
) -> Code:
    """Find the latent from which DDIM generates `x` (pFedGPA, version B).

    A step up from u to t solves the equation of the DDIM step down,

        x_t = sqrt(abar_t / abar_u) x_u + (noise_t - sqrt(abar_t / abar_u) noise_u) eps,

    for `x_t`. It starts with the eps of `x_u` (plain DDIM inversion, whose round trip
    has an error of order `1 / steps`) and then evaluates eps at the unknown `x_t`. Each
    refinement raises the order by one, as long as the map contracts, which needs more
    steps the smaller the population's variance is.

    Args:
      denoise: Predicts the noise of one vector.
      schedule: Levels of signal and noise.
      x: `[p]` normalised parameters.
      depth: Time of the latent, from `steps` to T; may be traced.
      steps: Number of steps.
      refinements: Evaluations of eps at the unknown; 0 is plain DDIM inversion.

    Returns:
      A code without noise maps.

    Raises:
      ValueError: If the shape is wrong, `x` is not finite, or a number out of range.
    """
    if refinements < 0:
        raise ValueError(f"refinements must be >= 0, got {refinements}")
    times = _time_grid(schedule, depth, steps)

    def climb(x_u: jax.Array, pair: tuple[jax.Array, jax.Array]):
        u, t = pair
        signal_t, noise_t = schedule.at(t, x_u.dtype)
        signal_u, noise_u = schedule.at(u, x_u.dtype)
        ratio = signal_t / signal_u

        def solve(eps: jax.Array) -> jax.Array:
            return ratio * x_u + (noise_t - ratio * noise_u) * eps

        x_t = solve(_eps(denoise, x_u, jnp.maximum(u, 1)))
        return jax.lax.fori_loop(
            0, refinements, lambda _, x_t: solve(_eps(denoise, x_t, t)), x_t
        ), None

    latent, _ = jax.lax.scan(climb, _finite("x", x, "p"), (times[:-1], times[1:]))
    return Code(latent, None, times)


def invert_noise_maps(
    denoise: Denoise,
    schedule: Schedule,
    x: jax.Array,
    *,
    depth: int,
    steps: int,
    key: jax.Array,
) -> Code:
    """Find noise maps with which ancestral steps generate `x` (pFedGPA, version A).

    Noises `x` to all times of the grid with independent noise, and keeps for each step
    what its mean misses, in units of its standard deviation (Huberman-Spiegelglas et
    al., section 3.2). The last step has no noise; its map is the residual itself, so
    that the code is exact. Set the last row of `noise` to 0 for the published form,
    which leaves the residual out.

    Args:
      denoise: Predicts the noise of one vector.
      schedule: Levels of signal and noise.
      x: `[p]` normalised parameters.
      depth: Time of the latent, from `steps` to T; may be traced.
      steps: Number of steps.
      key: Random key.

    Returns:
      A code with noise maps; their standard deviation may be far above 1.

    Raises:
      ValueError: If the shape is wrong, `x` is not finite, or a number out of range.
    """
    times = _time_grid(schedule, depth, steps)
    x = _finite("x", x, "p")
    eps = jax.random.normal(key, (steps, x.shape[0]), x.dtype)
    noisy = jax.vmap(functools.partial(forward, schedule, x))(times[1:], eps)
    path = jnp.concatenate([x[None], noisy])

    def surprise(x_t, t, x_u, u) -> jax.Array:
        mean, sigma = step(schedule, x_t, _eps(denoise, x_t, t), t, u, eta=1.0)
        return (x_u - mean) / _where_positive(sigma)

    maps = jax.vmap(surprise)(path[1:], times[1:], path[:-1], times[:-1])
    return Code(path[-1], maps[::-1], times)


def diffuse(
    schedule: Schedule, x: jax.Array, *, depth: int, steps: int, key: jax.Array
) -> Code:
    """Noise `x` to a depth at once (SDEdit; pFedGPA, version C).

    The strongest pull to the population: from a great depth a client may come back in
    a mode that is not its own.

    Args:
      schedule: Levels of signal and noise.
      x: `[p]` normalised parameters.
      depth: Time of the latent, from `steps` to T; may be traced.
      steps: Number of steps that `generate` will take.
      key: Random key.

    Returns:
      A code without noise maps.

    Raises:
      ValueError: If the shape is wrong, `x` is not finite, or a number out of range.
    """
    times = _time_grid(schedule, depth, steps)
    x = _finite("x", x, "p")
    eps = jax.random.normal(key, x.shape, x.dtype)
    return Code(forward(schedule, x, times[-1], eps), None, times)


def generate(
    denoise: Denoise,
    schedule: Schedule,
    code: Code,
    *,
    gamma: float = 1.0,
    eta: float | None = None,
    key: jax.Array | None = None,
    steps: int | None = None,
) -> jax.Array:
    """Generate parameters from a code.

    With the denoiser of the inversion and `gamma = 1` this is the identity: exactly
    for noise maps, up to the order of the inversion for `invert`. Personalisation comes
    from a smaller gamma, other steps, or a denoiser that has been trained since.

    Args:
      denoise: Predicts the noise of one vector.
      schedule: Levels of signal and noise.
      code: What to generate from.
      gamma: Strength of the code, from 0 to 1. Multiplies the noise maps, or the latent
        of a code without maps.
      eta: Share of fresh noise, from 0 (default) to 1, for a code without maps. Noise
        maps are those of `eta = 1`, in place of fresh noise.
      key: Random key, needed unless eta is 0.
      steps: Another number of steps than that of the code, for a code without maps.

    Returns:
      `[p]`.

    Raises:
      ValueError: If shapes disagree, the latent or a map is not finite, a number is out
        of range, a key is missing, or `eta` or `steps` is given with noise maps.
    """
    x = _finite("code.latent", code.latent, "p")
    gamma = _bounded("gamma", gamma, 0, 1).astype(x.dtype)
    times = code.times
    if code.noise is not None:
        if eta is not None or steps is not None:
            raise ValueError("a code with noise maps fixes eta and steps, got others")
        check_shapes(**{"code.latent": (x, "p"), "code.noise": (code.noise, "sp")})
        if len(times) != len(code.noise) + 1:
            raise ValueError(
                f"code.times must have one entry more than the {len(code.noise)} "
                f"noise maps, got {len(times)}"
            )
        noise, eta = gamma * _finite("code.noise", code.noise, "sp"), 1.0
    else:
        x = gamma * x
        eta = 0.0 if eta is None else eta
        times = times if steps is None else _time_grid(schedule, times[-1], steps)
        noise = None
        if key is not None:
            noise = jax.random.split(key, len(times) - 1)
        elif not is_known(eta) or np.any(np.asarray(eta) != 0):
            raise ValueError(f"key must be given if eta is not 0, got eta {eta}")
    eta = _bounded("eta", eta, 0, 1)

    def descend(x: jax.Array, inputs):
        t, u, z = inputs
        mean, sigma = step(schedule, x, _eps(denoise, x, t), t, u, eta=eta)
        if code.noise is not None:
            mean = mean + _where_positive(sigma) * z
        elif key is not None:
            mean = mean + sigma * jax.random.normal(z, x.shape, x.dtype)
        return mean, None

    return jax.lax.scan(descend, x, (times[:0:-1], times[-2::-1], noise))[0]


def sample(
    denoise: Denoise,
    schedule: Schedule,
    x: jax.Array,
    *,
    depth: int,
    steps: int,
    eta: float = 1.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """Take reverse steps from `x`, which counts as the state at time `depth`.

    From standard normal `x` and `depth = steps = T` this is ancestral sampling. A
    newcomer of pFedGPA starts from its own parameters, with a denoiser that `guide`
    steers along its local update.

    Args:
      denoise: Predicts the noise of one vector.
      schedule: Levels of signal and noise.
      x: `[p]`.
      depth: Time of `x`, from `steps` to T; may be traced.
      steps: Number of steps.
      eta: Share of fresh noise, from 0 to 1.
      key: Random key, needed unless eta is 0.

    Returns:
      `[p]`.

    Raises:
      ValueError: As in `generate`.
    """
    code = Code(x, None, _time_grid(schedule, depth, steps))
    return generate(denoise, schedule, code, eta=eta, key=key)


# Parameter vectors: deviations of unit size, tokens, low-rank codes.


def fit_normalizer(
    x: jax.Array,
    *,
    weight: jax.Array | None = None,
    scale: str = "scalar",
    floor: float = 1e-3,
) -> Normalizer:
    """Estimate the mean of vectors and the size of deviations from it.

    Args:
      x: `[m, p]`. Rows of weight 0 may hold NaN.
      weight: `[m]` weights of the vectors, ones by default.
      scale: "scalar", the root mean square of all deviations, which keeps the ratios of
        variances; or "coordinate", standard deviations.
      floor: Smallest scale of a coordinate, in units of the scalar one.

    Returns:
      A normaliser; its scale is 1 if all vectors are equal.

    Raises:
      ValueError: If shapes disagree, a row of positive weight is not finite, a weight
        is negative, all are 0, the scale is unknown or the floor not positive.
    """
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {SCALES}, got {scale!r}")
    if not 0 < floor < np.inf:
        raise ValueError(f"floor must be > 0, got {floor}")
    x, share = _rows(x, weight)
    mean = matmul(share, x)
    variance = matmul(share, jnp.square(x - mean[None]))
    overall = jnp.mean(variance)
    overall = jnp.where(overall > 0, overall, 1)
    if scale == "scalar":
        return Normalizer(mean, jnp.sqrt(overall))
    return Normalizer(mean, jnp.sqrt(jnp.maximum(variance, floor**2 * overall)))


def normalize(normalizer: Normalizer, x: jax.Array) -> jax.Array:
    """Map parameters to normalised deviations, `[p] -> [p]`."""
    check_shapes(x=(x, "p"), mean=(normalizer.mean, "p"))
    return (x - normalizer.mean) / normalizer.scale


def denormalize(normalizer: Normalizer, z: jax.Array) -> jax.Array:
    """Map normalised deviations to parameters, `[p] -> [p]`."""
    check_shapes(z=(z, "p"), mean=(normalizer.mean, "p"))
    return normalizer.mean + normalizer.scale * z


def to_tokens(x: jax.Array, width: int) -> jax.Array:
    """Cut a vector into tokens, `[p] -> [k, w]`; the last is filled up with 0.

    >>> to_tokens(jnp.arange(5), 2).tolist()
    [[0, 1], [2, 3], [4, 0]]
    """
    check_shapes(x=(x, "p"))
    _size("width", width)
    return jnp.pad(x, (0, -x.shape[0] % width)).reshape(-1, width)


def from_tokens(tokens: jax.Array, size: int) -> jax.Array:
    """Join tokens to a vector of `size` p, `[k, w] -> [p]`, without what was filled up.

    Raises:
      ValueError: If p is not more than what all tokens but the last hold, or more than
        what all hold.
    """
    check_shapes(tokens=(tokens, "kw"))
    k, w = tokens.shape
    if not (k - 1) * w < size <= k * w:
        raise ValueError(
            f"size must be in [{(k - 1) * w + 1}, {k * w}] for tokens of shape "
            f"{tokens.shape}, got {size}"
        )
    return tokens.reshape(-1)[:size]


def fit_basis(x: jax.Array, rank: int, *, weight: jax.Array | None = None) -> Basis:
    """Find the principal components of a set of vectors.

    A thin singular value decomposition through the Gram matrix `[m, m]`, so that p may
    be large, and one pass of Cholesky to make the directions orthogonal to rounding.
    Directions with less than about `sqrt(m eps)` of the largest singular value (2e-3 in
    float32 and 1e-7 in float64, for m = 40) are lost to rounding and become 0.

    Args:
      x: `[m, p]`. Rows of weight 0 may hold NaN.
      rank: Number of codes r, at most `min(m, p)`.
      weight: `[m]` weights of the vectors, ones by default.

    Returns:
      A basis of deviations from the weighted mean, by falling variance.

    Raises:
      ValueError: If shapes disagree, a row of positive weight is not finite, a weight
        is negative, all are 0 or the rank is out of range.
    """
    x, share = _rows(x, weight)
    _size("rank", rank, min(x.shape))
    x = jax.lax.stop_gradient(x)
    mean = matmul(share, x)
    rows = jnp.sqrt(share)[:, None] * (x - mean[None])
    variance, left = jnp.linalg.eigh(matmul(rows, rows.T))
    variance, left = variance[::-1][:rank], left[:, ::-1][:, :rank]
    present = variance > len(rows) * jnp.finfo(x.dtype).eps * variance[0]
    variance = jnp.where(present, variance, 0)
    scale = jnp.where(present, jax.lax.rsqrt(jnp.where(present, variance, 1)), 0)
    directions = scale[:, None] * matmul(left.T, rows)
    overlap = matmul(directions, directions.T) + jnp.diag(1 - present.astype(x.dtype))
    directions = jax.scipy.linalg.solve_triangular(
        jnp.linalg.cholesky(overlap), directions, lower=True
    )
    return Basis(mean, directions, jnp.diag(variance))


def align(basis: Basis, previous: Basis) -> Basis:
    """Rotate a basis to follow the previous one, so that codes keep their meaning.

    Orthogonal Procrustes: the rotation R of the codes that minimises the distance
    `||R V - V_previous||_F` of the directions. What the basis spans is unchanged.

    Args:
      basis: r directions of p parameters.
      previous: As many.

    Raises:
      ValueError: If the shapes of the directions disagree.
    """
    check_shapes(
        directions=(basis.directions, "rp"), previous=(previous.directions, "rp")
    )
    overlap = matmul(previous.directions, basis.directions.T)
    left, _, right = jnp.linalg.svd(jax.lax.stop_gradient(overlap))
    turn = matmul(left, right)
    return Basis(
        basis.mean,
        matmul(turn, basis.directions),
        matmul(turn, matmul(basis.cov, turn.T)),
    )


def encode(basis: Basis, x: jax.Array) -> jax.Array:
    """Map parameters to codes, `[p] -> [r]`."""
    check_shapes(x=(x, "p"), directions=(basis.directions, "rp"))
    return matmul(basis.directions, x - basis.mean)


def decode(basis: Basis, code: jax.Array) -> jax.Array:
    """Map codes to parameters, `[r] -> [p]`."""
    check_shapes(code=(code, "r"), directions=(basis.directions, "rp"))
    return basis.mean + matmul(code, basis.directions)


def reconstruct(
    basis: Basis, x: jax.Array, code: jax.Array, *, rho: float = 1.0
) -> jax.Array:
    """Replace the code of `x` and keep a share of what lies outside the basis.

    Args:
      basis: r directions of p parameters.
      x: `[p]` parameters.
      code: `[r]` generated code.
      rho: Share that is kept, from 0, which is `decode`, to 1.

    Returns:
      `[p]`; with the code of `x` itself and `rho = 1`, `x`.

    Raises:
      ValueError: If shapes disagree or rho is out of range.
    """
    rho = _bounded("rho", rho, 0, 1).astype(x.dtype)
    own = encode(basis, x)
    return decode(basis, code - rho * own) + rho * (x - basis.mean)


def shrinkage_factor(
    schedule: Schedule, variance: jax.Array, depth: jax.Array
) -> jax.Array:
    """Compute k of a Gaussian population, the share of the signal at a depth.

    `k = abar v / (abar v + 1 - abar)`; noising and denoising multiplies deviations by
    sqrt(k) without and by k with fresh noise (see the table of this module).

    Args:
      schedule: Levels of signal and noise.
      variance: `[r]` or `[]` v, at least 0.
      depth: `[]` time from 1 to T.

    Returns:
      k in the shape of `variance`.

    Raises:
      ValueError: If a variance is negative or not finite, or the depth out of range.
    """
    letters = "r" * jnp.ndim(variance)
    variance = _bounded("variance", _finite("variance", variance, letters), 0, np.inf)
    depth = _time("depth", depth, 1, schedule.num_times)
    signal, noise = schedule.at(depth, variance.dtype)
    return signal**2 * variance / (signal**2 * variance + noise**2)


def shrink(
    basis: Basis, x: jax.Array, factor: jax.Array, *, rho: float = 1.0
) -> jax.Array:
    """Multiply the code of `x`: the whole pipeline with a linear map for diffusion.

    Factor 1 leaves the projection alone, the control without any generation; the
    factors of `shrinkage_factor` are what the best linear denoiser would do.

    Args:
      basis: r directions of p parameters.
      x: `[p]` parameters.
      factor: `[r]` or `[]`, of the codes.
      rho: Share of what lies outside the basis that is kept, from 0 to 1.

    Returns:
      `[p]`.

    Raises:
      ValueError: If shapes disagree or rho is out of range.
    """
    check_shapes(
        factor=(factor, "r" * jnp.ndim(factor)), directions=(basis.directions, "rp")
    )
    return reconstruct(basis, x, factor * encode(basis, x), rho=rho)
