import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedgen.core import participation
from fedgen.core.federation import Data, Model
from fedgen.data.federate import federate
from fedgen.data.partition import Split, partition, split
from fedgen.data.sources import Source


def model(name):
    return Model(name, lambda key: {}, lambda p, x: x, lambda p, z: z, 1)


# Row r is an image of value r, so that what is read tells which row it was.
LABELS = np.arange(60, dtype=np.int32) % 4
SOURCE = Source(
    "toy",
    np.arange(60, dtype=np.uint8)[:, None, None, None]
    * np.ones((1, 2, 2, 1), np.uint8),
    LABELS,
    4,
)
OWNER = partition("dirichlet", LABELS, 7, seed=0, alpha=0.5, min_size=0)
SPLIT = split(OWNER, LABELS, 7, seed=0)


def held(federation, part):
    """Read every client's rows of a part the way an algorithm does."""
    rows = {}
    for cohort in federation.cohorts:
        start, size = getattr(cohort, part)
        for place, client in enumerate(np.asarray(cohort.ids)):
            data = Data(
                federation.pool, cohort.order, start[place], size[place], jnp.ones(())
            )
            count = int(size[place])
            batch = data.take(jnp.arange(count), jnp.ones(count, bool))
            value = np.round((np.asarray(batch.x)[:, 0, 0, 0] + 1) * 127.5)
            np.testing.assert_array_equal(batch.y, LABELS[value.astype(int)])
            rows[int(client)] = value.astype(int).tolist()
    return rows


@pytest.mark.parametrize("num_models", [1, 2, 3])
def test_every_client_reads_its_own_rows(num_models):
    models = [model(str(number)) for number in range(num_models)]
    federation = federate(SOURCE, SPLIT, models if num_models > 1 else models[0])
    assert len(federation.cohorts) == num_models
    assert federation.num_classes == 4
    assert federation.pool.x.dtype == jnp.uint8
    for number, cohort in enumerate(federation.cohorts):
        np.testing.assert_array_equal(cohort.ids, np.arange(number, 7, num_models))
        assert (
            cohort.num_real == cohort.num_clients == len(range(number, 7, num_models))
        )
        for leaf in jax.tree.leaves(cohort):
            assert leaf.dtype == jnp.int32
        mine = np.isin(OWNER, np.asarray(cohort.ids))
        np.testing.assert_array_equal(np.sort(cohort.order), np.flatnonzero(mine))
    everything = []
    for part, rows in zip(("train", "validation", "test"), SPLIT[1:], strict=True):
        found = held(federation, part)
        for client in range(7):
            start, size = rows.start[client], rows.size[client]
            assert found[client] == SPLIT.order[start : start + size].tolist()
            everything += found[client]
    assert sorted(everything) == list(range(60))


def test_clients_can_be_given_their_model():
    cohort_of = np.array([1, 1, 0, 1, 0, 0, 1])
    federation = federate(
        SOURCE, SPLIT, [model("a"), model("b")], cohort_of=cohort_of, public=SOURCE
    )
    np.testing.assert_array_equal(federation.cohorts[0].ids, [2, 4, 5])
    np.testing.assert_array_equal(federation.cohorts[1].ids, [0, 1, 3, 6])
    assert federation.cohorts[1].model.name == "b"
    np.testing.assert_array_equal(federation.public.x, SOURCE.x)


def broken(**changes):
    return SPLIT._replace(**changes)


def moved(rows, by):
    return rows._replace(start=rows.start + np.int32(by))


A, B = model("a"), model("b")


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((SOURCE._replace(num_classes=3), SPLIT, A), {}, "labels must lie in"),
        ((SOURCE, SPLIT, []), {}, "must hold an architecture"),
        ((SOURCE, SPLIT, [A, B]), {"cohort_of": np.zeros(7, int)}, "client, .*'b'"),
        ((SOURCE, SPLIT, A), {"cohort_of": np.ones(7, int)}, r"in \[0, 1\), got 1..1"),
        ((SOURCE, SPLIT, A), {"cohort_of": np.zeros(6, int)}, "per client, 7"),
        ((SOURCE, broken(order=SPLIT.order + 1), A), {}, "got 1..60"),
        ((SOURCE, broken(order=SPLIT.order[:-1]), A), {}, "must lie in order"),
        ((SOURCE, broken(train=moved(SPLIT.train, -1)), A), {}, "rows of client 0"),
        ((SOURCE, broken(test=SPLIT.validation), A), {}, "must follow one another"),
        ((SOURCE, SPLIT, A), {"public": SOURCE._replace(x=SOURCE.x[:, :1])}, "shape"),
    ],
)
def test_bad_arguments_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        federate(*arguments, **options)


def test_parts_must_have_one_entry_per_client():
    short = SPLIT.test._replace(size=SPLIT.test.size[:-1])
    bad = Split(SPLIT.order, SPLIT.train, SPLIT.validation, short)
    with pytest.raises(ValueError, match="one entry per client"):
        federate(SOURCE, bad, A)


def test_who_is_drawn_does_not_depend_on_the_order_of_clients():
    draw = participation.uniform(0.5)
    drawn = []
    for clients in (np.arange(7), np.array([3, 6, 0, 5, 1, 4, 2])):
        federation = federate(SOURCE, SPLIT, model("m"), clients=clients)
        (chosen,) = draw(jax.random.key(0), federation)
        drawn.append(federation.cohorts[0].ids[chosen.slot].tolist())
    assert drawn[0] == drawn[1]
