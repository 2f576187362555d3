"""What is benchmarked: one definition of every workload, for fedgen and its rivals.

A workload is written to one `.npz` file that holds all a rival needs: the images, the
initial weights, who takes part in which round and the rows of every minibatch. The
engine draws its minibatches itself; here it is asked which, so that everybody trains
on the same ones in the same order and must end with the same weights.

Clients count equally in the average. A subset of the clients is a workload of its own.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks.adapters import jax_nets
from fedgen import models
from fedgen.algorithms.fedavg import fedavg
from fedgen.algorithms.fedgmi import density_of
from fedgen.core import fit, participation, rounds
from fedgen.core.algorithm import Algorithm, Mean
from fedgen.core.execution import Execution
from fedgen.core.federation import Federation, Model, Pool, Rows
from fedgen.core.fit import Schedule
from fedgen.core.participation import Sampler
from fedgen.data import federate, partition, sources
from fedgen.data.partition import Split
from fedgen.data.sources import Source
from fedgen.models import layers

SEED = 0


class Workload(NamedTuple):
    """A federation, a model and a schedule; SGD, and FedAvg with equal weights.

    The model `vae` is trained by Adam, at a rate of its own.

    Attributes:
      dataset: Name of the data set; a seventh of it is kept for the test.
      model: Name of the model.
      clients: Number of clients.
      steps: Local steps of a round.
      batch_size: Samples of a step.
      participants: Clients of a round, 0 for all.
      samples: Samples of each client, drawn with replacement by classes from
        Dir(0.1); 0 deals the data set out by the usual Dir(0.1) over clients.
      learning_rate: Of the clients.
    """

    dataset: str
    model: str
    clients: int
    steps: int
    batch_size: int
    participants: int = 0
    samples: int = 0
    learning_rate: float = 0.05


_MNIST, _CIFAR = "fashion_mnist", "cifar10_subset"
WORKLOADS = {
    "W": Workload(_MNIST, "cnn", 100, 20, 32),
    "W2": Workload(_MNIST, "mlp", 100, 20, 32),
    "W3": Workload(_CIFAR, "resnet8", 100, 20, 32),
    "W3-18": Workload(_CIFAR, "resnet18", 100, 20, 32),
    "W4": Workload(_MNIST, "mlp", 1000, 1, 10, samples=10),
    # At 0.05 rounding alone separates two runs by 1 % of their way within two rounds.
    "W5": Workload(_CIFAR, "pfl_cnn", 1000, 5, 10, 50, 50, learning_rate=0.01),
}
# The defaults of `fedgmi`.
_VAE = {"density": "x", "likelihood": "bernoulli", "hidden": 128, "latent": 16}
_VAE_LEARNING_RATE = 2e-3


class PflBody(nn.Module):
    """The network of pfl-research's CIFAR-10 benchmark, without its dropout."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[b, h, w, channels] -> [b, 128]`."""
        x = nn.relu(layers.Conv(32, (3, 3), padding="VALID")(x))
        x = nn.relu(layers.ConvPool(64, (3, 3), "VALID")(x))
        return nn.relu(nn.Dense(128)(x.reshape(x.shape[0], -1)))


def build_model(name: str, shape: tuple[int, ...], num_classes: int) -> Model:
    """Build a shipped model, `pfl_cnn`, or FedGMI's `vae`, which gives samples back."""
    if name == "pfl_cnn":
        return layers.assemble(name, PflBody(), shape, num_classes, 3)
    if name == "vae":
        vae, latent = density_of(shape, num_classes, _VAE).vae, _VAE["latent"]
        return Model(
            name, vae.init, lambda p, x: vae.encode(p, x)[0], vae.decode, latent
        )
    return models.build(name, shape, num_classes)


class Problem(NamedTuple):
    """A workload with its data: all that the engine needs."""

    federation: Federation
    algorithm: Algorithm
    sampler: Sampler
    test: np.ndarray  # pool rows
    init_key: jax.Array
    round_key: jax.Array


def load(workload: Workload, data_dir: str | None, subset: int = 0) -> Problem:
    """Read the data and deal it out.

    Args:
      workload: The definition.
      data_dir: Folder of TFDS data sets.
      subset: If above 0, only so many of the clients exist.
    """
    source = sources.load(workload.dataset, data_dir)
    rng = np.random.default_rng(SEED)
    shuffled = rng.permutation(len(source.y))
    test, train = np.split(shuffled, [len(shuffled) // 7])
    if workload.samples:
        order, size = _draw(source, train, workload, rng)
    else:
        owner = partition.partition(
            "dirichlet", source.y[train], workload.clients, seed=SEED, alpha=0.1
        )
        order = train[np.argsort(owner, kind="stable")]
        size = np.bincount(owner, minlength=workload.clients)
    return assemble(workload, source, order, size, test, subset)


def _draw(
    source: Source, train: np.ndarray, workload: Workload, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw every client's samples by classes, with replacement."""
    of_class = [train[source.y[train] == c] for c in range(source.num_classes)]
    order = []
    for _ in range(workload.clients):
        share = rng.dirichlet(np.full(source.num_classes, 0.1))
        drawn = rng.choice(source.num_classes, workload.samples, p=share)
        order += [rng.choice(of_class[c]) for c in drawn]
    return np.array(order), np.full(workload.clients, workload.samples)


def assemble(
    workload: Workload,
    source: Source,
    order: np.ndarray,
    size: np.ndarray,
    test: np.ndarray,
    subset: int = 0,
) -> Problem:
    """Build the problem from rows of the pool, client after client."""
    start = np.cumsum(size) - size
    none = np.zeros_like(size)
    split = Split(
        order.astype(np.int32), Rows(start, size), *[Rows(start + size, none)] * 2
    )
    shape = source.x.shape[1:]
    model = build_model(workload.model, shape, source.num_classes)
    schedule = Schedule(workload.batch_size, steps=workload.steps)
    algorithm = fedavg(optax.sgd(workload.learning_rate), schedule)
    if workload.model == "vae":
        density = density_of(shape, source.num_classes, _VAE)
        algorithm = algorithm._replace(local=_train_vae(density, schedule))
    chosen = np.arange(subset or workload.clients)
    taking_part = min(workload.participants or len(chosen), len(chosen))
    init_key, round_key = jax.random.split(jax.random.key(SEED))
    return Problem(
        federate.federate(source, split, model, clients=chosen),
        _equal_weights(algorithm),
        participation.uniform(taking_part / len(chosen)),
        test,
        init_key,
        round_key,
    )


def _train_vae(density: Any, schedule: Schedule) -> Callable[..., Any]:
    """Return how a client of FedGMI trains the VAE, for the steps of a schedule."""
    optimizer = optax.adam(_VAE_LEARNING_RATE)

    def local(context, key, client, params, data):
        del context

        def loss(params, batch, key):
            return -fit.masked_mean(density.bound(params, key, batch.x), batch.mask)

        new, metrics = fit.fit(loss, optimizer, params, key, data, schedule)
        delta = jax.tree.map(jnp.subtract, new, params)
        return client, Mean(delta, data.size), metrics

    return local


def _equal_weights(algorithm: Algorithm) -> Algorithm:
    def local(context, key, client, message, data):
        client, upload, metrics = algorithm.local(context, key, client, message, data)
        return client, upload._replace(weight=jnp.int32(1)), metrics

    return algorithm._replace(local=local)


def draw_schedule(
    problem: Problem, workload: Workload, num_rounds: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ask the engine who takes part in which round, and with which minibatches.

    It runs an algorithm that sends the rows of a client's minibatches instead of
    training on them.

    Returns:
      Client numbers `[rounds, m]` and pool rows `[rounds, m, t, b]`.
    """
    schedule = Schedule(workload.batch_size, steps=workload.steps)
    (cohort,) = problem.federation.cohorts
    count = problem.federation.pool.y.shape[0]
    numbered = dataclasses.replace(
        problem.federation,
        pool=Pool(jnp.zeros((count, 1)), jnp.arange(count, dtype=jnp.int32)),
    )

    def local(context, key, client, message, data):
        order_key, _ = jax.random.split(key)  # as `fit.fit` does
        drawn = jax.vmap(lambda i: schedule.batch(order_key, i, data).y)(
            jnp.arange(workload.steps)
        )
        return client, drawn, {"steps": jnp.int32(workload.steps)}

    recorder = problem.algorithm._replace(
        init=lambda key, federation: ((), ((),)),
        download=lambda context, server, id_: (),
        local=local,
        aggregate=lambda context, key, server, uploads: (uploads[0], {}),
    )
    round_fn = jax.jit(rounds.make_round(recorder, problem.sampler, Execution()))
    state = rounds.init_state(recorder, numbered, problem.init_key)
    clients, rows = [], []
    for _ in range(num_rounds):
        state, _ = round_fn(state._replace(server=()), numbered, problem.round_key)
        clients.append(np.asarray(state.server.id))
        rows.append(np.asarray(state.server.message))
    return np.stack(clients), np.stack(rows)


def write(
    path: pathlib.Path, problem: Problem, workload: Workload, num_rounds: int
) -> None:
    """Write a problem and its first rounds for the adapters."""
    (cohort,) = problem.federation.cohorts
    clients, rows = draw_schedule(problem, workload, num_rounds)
    state = rounds.init_state(problem.algorithm, problem.federation, problem.init_key)
    np.savez(
        path,
        meta=json.dumps(workload._asdict()),
        x=np.asarray(problem.federation.pool.x),
        y=np.asarray(problem.federation.pool.y),
        order=np.asarray(cohort.order),
        size=np.asarray(cohort.train.size),
        test=problem.test,
        clients=clients,
        rows=rows,
        **{f"params/{k}": v for k, v in flatten(state.server.params).items()},
    )


def read(path: str | pathlib.Path) -> tuple[Workload, Problem]:
    """Read back what `write` wrote, without the data set's own folder."""
    with np.load(path) as arrays:
        workload = Workload(**json.loads(str(arrays["meta"])))
        y = arrays["y"]
        source = Source(workload.dataset, arrays["x"], y, int(y.max()) + 1)
        order, size, test = (arrays[name] for name in ("order", "size", "test"))
    present = workload._replace(clients=len(size))
    return workload, assemble(present, source, order, size, test)


def flatten(params: Any) -> dict[str, Any]:
    """Name every leaf of a tree by its path, as `body/Dense_0/kernel`."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in leaves}


def step_flops(model: str, params: dict[str, Any], x: jax.ShapeDtypeStruct) -> int:
    """Count the arithmetic of a training step, as plain layers need it.

    That is 2 for every multiplication and addition of a convolution or matrix
    product, three times over: forwards, and for the gradients of the kernel and of
    the input. The first layer's input has no gradient.

    Args:
      model: Name of the model.
      params: Its weights, or their shapes, by path.
      x: Shape of a minibatch.
    """
    traced = jax.make_jaxpr(lambda p, x: jax_nets.forward(model, p, x))(params, x)
    macs = []
    for equation in traced.jaxpr.eqns:
        numbers, (out,) = equation.params.get("dimension_numbers"), equation.outvars
        if equation.primitive.name == "dot_general":
            (left, _), _ = numbers
            macs.append(out.aval.size * equation.invars[0].aval.shape[left[0]])
        elif equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval
            macs.append(out.aval.size * kernel.size // kernel.shape[-1])
    return 2 * (3 * sum(macs) - macs[0])


def round_flops(workload: Workload, problem: Problem) -> int:
    """Count the arithmetic of a round of the whole workload."""
    shape = (workload.batch_size, *problem.federation.pool.x.shape[1:])
    (cohort,) = problem.federation.cohorts
    params = flatten(jax.eval_shape(cohort.model.init, problem.init_key))
    step = step_flops(workload.model, params, jax.ShapeDtypeStruct(shape, jnp.float32))
    return (workload.participants or workload.clients) * workload.steps * step
