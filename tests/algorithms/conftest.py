"""Train an algorithm on a toy, and a model of two weights for steps by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedgen.core import evaluate, participation, rounds
from fedgen.core.algorithm import Algorithm, State
from fedgen.core.execution import Execution
from fedgen.core.federation import Cohort, Data, Federation, Model, Pool, Rows


@pytest.fixture(scope="session")
def train() -> Callable:
    """Return `(algorithm, federation, num_rounds) -> State`."""

    def run(algorithm: Algorithm, federation: Federation, num_rounds: int = 1) -> State:
        state = rounds.init_state(algorithm, federation, jax.random.key(0))
        step = jax.jit(
            rounds.make_round(algorithm, participation.full(), Execution(chunk=1))
        )
        for _ in range(num_rounds):
            state, _ = step(state, federation, jax.random.key(1))
        return state

    return run


@pytest.fixture(scope="session")
def score() -> Callable:
    """Return `(algorithm, state, federation) -> Scores` on the test rows."""

    def run(algorithm: Algorithm, state: State, federation: Federation):
        fn = evaluate.make_evaluate(algorithm, Execution(chunk=1), 8)
        return jax.jit(fn)(state, federation, jax.random.key(2)).test

    return run


@pytest.fixture(scope="session")
def client_data() -> Callable:
    """Return `(federation, client) -> Data` of a client's training rows."""

    def pick(federation: Federation, client: int) -> Data:
        cohort = federation.cohorts[0]
        return Data(
            federation.pool,
            cohort.order,
            cohort.train.start[client],
            cohort.train.size[client],
            jnp.float32(1),
        )

    return pick


@pytest.fixture(scope="session")
def scalar_federation() -> Callable:
    """Return a builder of clients whose model has the two weights `w` and `v`.

    z = w x and logits = (0, v z), so with p = sigmoid(v w x) the derivatives of the
    cross entropy are (p - y) v x by w, and (p - y) w x by v.
    """

    def build(
        x: Sequence[Sequence[float]], y: Sequence[Sequence[int]], w: float, v: float
    ) -> Federation:
        def init(key):
            del key
            return {"body": jnp.float32(w), "head": jnp.float32(v)}

        def head(params, z):
            return jnp.concatenate([jnp.zeros_like(z), params["head"] * z], axis=1)

        model = Model("scalar", init, lambda p, x: p["body"] * x, head, 1)
        size = np.array([len(values) for values in x])
        rows = Rows(
            jnp.asarray(np.cumsum(size) - size, jnp.int32),
            jnp.asarray(size, jnp.int32),
        )
        cohort = Cohort(
            model,
            jnp.arange(len(size), dtype=jnp.int32),
            jnp.arange(size.sum(), dtype=jnp.int32),
            rows,
            rows,
            rows,
            len(size),
        )
        pool = Pool(
            jnp.asarray(np.concatenate(x), jnp.float32)[:, None],
            jnp.asarray(np.concatenate(y), jnp.int32),
        )
        return Federation(pool, (cohort,), 2)

    return build
