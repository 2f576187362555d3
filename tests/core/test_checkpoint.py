"""Checkpoints: exact, atomic, two of them, and never a wrong state."""

from __future__ import annotations

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedgen.core import execution
from fedgen.core.algorithm import State
from fedgen.core.checkpoint import Checkpoints, digest


def make_state(round_: int) -> State:
    """Build a state of several types, clients split over two devices."""
    rng = np.random.default_rng(round_)
    values = rng.normal(size=(4, 3)).astype(np.float32)
    server = {
        "weight": jnp.asarray(values),
        "half": jnp.asarray(values, jnp.bfloat16),
        "count": jnp.asarray(rng.integers(0, 9, 5), jnp.int32),
        "flag": jnp.asarray([True, False]),
    }
    clients = ({"head": jnp.asarray(rng.normal(size=(6, 7)), jnp.float32)}, ())
    state = State(jnp.int32(round_), server, clients)
    shardings = execution.state_shardings(execution.make_mesh(2))
    return State(*map(jax.device_put, state, shardings))


def files_of(folder, step):
    return sorted(p for p in (folder / str(step)).rglob("*") if p.is_file())


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def alter(path):
    content = bytearray(path.read_bytes())
    if content:
        content[len(content) // 2] ^= 0x10
    path.write_bytes(bytes(content))


def remove(path):
    path.unlink()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Save rounds 1 to 3; return the folder and the states."""
    folder = tmp_path_factory.mktemp("saved")
    states = {i: make_state(i) for i in (1, 2, 3)}
    with Checkpoints(folder) as checkpoints:
        for i, state in states.items():
            checkpoints.save(state, {"seconds": float(i)})
    return folder, states


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "copy")


def restore(folder, like, **options):
    warnings = []
    with Checkpoints(folder) as checkpoints:
        found = checkpoints.restore(like, warnings.append, **options)
    return found, warnings


def test_keeps_the_last_two_and_restores_bits_types_and_shardings(saved):
    folder, states = saved
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == ["2", "3"]
    (state, info), warnings = restore(folder, states[1])
    assert digest(state) == digest(states[3]) == info["digest"]
    assert info["seconds"] == 3.0 and not warnings
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(states[3]), strict=True):
        assert a.dtype == b.dtype and a.sharding == b.sharding
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert jax.tree.structure(state) == jax.tree.structure(states[3])


def test_restores_from_shapes_alone(saved):
    folder, states = saved
    like = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), states[1]
    )
    (state, _), _ = restore(folder, like)
    assert digest(state) == digest(states[3])
    assert len(state.clients[0]["head"].sharding.device_set) == 2


@pytest.mark.parametrize("damage", [truncate, alter, remove])
def test_no_damage_to_any_file_ever_gives_a_wrong_state(saved, copy, damage):
    folder, states = saved
    fell_back = []
    for path in files_of(folder, 3):
        shutil.rmtree(copy)
        shutil.copytree(folder, copy)
        damaged = copy / path.relative_to(folder)
        damage(damaged)
        (state, _), warnings = restore(copy, states[1])
        used = int(state.round)
        assert digest(state) == digest(states[used]), path
        if used == 2:
            fell_back.append(path)
            assert len(warnings) == 1 and "round 3" in warnings[0]
            assert "\n" not in warnings[0]
        else:  # A file that says nothing of the arrays.
            assert used == 3 and not warnings
    # The arrays themselves lie in files of the storage layer.
    arrays = [p for p in files_of(folder, 3) if p.parent.name == "d"]
    assert arrays and set(fell_back) & set(arrays)


def test_a_changed_array_in_sound_files_is_found(saved, tmp_path):
    _, states = saved
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(states[1], {})
        other = states[2]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fedgen.core.checkpoint.digest", lambda *_: digest(states[1]))
            checkpoints.save(other, {})
    (state, _), warnings = restore(tmp_path, states[3])
    assert int(state.round) == 1
    assert "differ" in warnings[0]


def test_starts_over_if_all_are_damaged_and_writes_the_rounds_again(saved, copy):
    _, states = saved
    for step in (2, 3):
        for path in files_of(copy, step):
            truncate(path)
    warnings = []
    with Checkpoints(copy) as checkpoints:
        assert checkpoints.restore(states[1], warnings.append) is None
        assert ["round 3" in warnings[0], "round 2" in warnings[1]] == [True, True]
        for i in (1, 2, 3):
            checkpoints.save(states[i], {})
    (state, _), again = restore(copy, states[1])
    assert digest(state) == digest(states[3]) and not again
    # What could not be used is still there to be looked at.
    assert {"2.unused", "3.unused"} <= {p.name for p in copy.iterdir()}


def test_goes_no_further_than_the_last_round_asked_for(saved, copy):
    _, states = saved
    (state, _), warnings = restore(copy, states[1], last_round=2)
    assert int(state.round) == 2
    assert len(warnings) == 1 and "the metrics end at round 2" in warnings[0]
    found, warnings = restore(copy, states[1], last_round=1)
    assert found is None and len(warnings) == 1


def test_a_state_of_another_shape_is_refused_and_kept(saved, copy):
    _, states = saved
    like = states[1]._replace(clients=({"head": jnp.zeros((8, 7))}, ()))
    found, warnings = restore(copy, like)
    assert found is None and len(warnings) == 2
    for step in (2, 3):
        (copy / f"{step}.unused").rename(copy / str(step))
    (state, _), _ = restore(copy, states[1])
    assert digest(state) == digest(states[3])


def test_what_a_kill_left_of_a_save_is_cleared_away(saved, copy):
    _, states = saved
    half = copy / "4.orbax-checkpoint-tmp"
    shutil.copytree(copy / "3", half)
    for path in files_of(copy, "4.orbax-checkpoint-tmp")[::2]:
        path.unlink()
    with Checkpoints(copy) as checkpoints:
        state, _ = checkpoints.restore(states[1], pytest.fail)
        assert int(state.round) == 3
        checkpoints.save(make_state(4), {})
    assert not half.exists()
    (state, _), _ = restore(copy, states[1])
    assert digest(state) == digest(make_state(4))


def deal(state, ids, devices):
    """Put the clients of a state, who lie in order, into the places of `ids`."""
    mesh = execution.make_mesh(devices)
    clients = jax.tree.map(lambda a: jnp.asarray(np.asarray(a)[ids]), state.clients)
    state = jax.tree.map(np.asarray, state._replace(clients=clients))
    if mesh is None:
        return jax.device_put(state, jax.devices()[0])
    return State(*map(jax.device_put, state, execution.state_shardings(mesh)))


@pytest.mark.parametrize(
    ("ids", "devices"),
    [
        ([0, 1, 2, 3, 4], 1),
        ([4, 2, 0, 3, 1], 1),
        ([4, 0, 3, 1, 2, -1], 2),
        ([1, -1, 3, 2, 4, -1, 0, -1], 2),
    ],
)
def test_clients_are_found_again_under_any_layout(tmp_path, ids, devices):
    state, before = make_state(1), np.array([3, 1, -1, 0, 2, 4, -1])
    with Checkpoints(tmp_path, [before, np.array([])]) as checkpoints:
        checkpoints.save(deal(state, before, 1), {})
    ids = np.array(ids)
    like = deal(state, ids, devices)
    with Checkpoints(tmp_path, [ids, np.array([])]) as checkpoints:
        found, info = checkpoints.restore(like, pytest.fail)
    leaf, expected = found.clients[0]["head"], like.clients[0]["head"]
    assert leaf.sharding == expected.sharding and leaf.dtype == expected.dtype
    np.testing.assert_array_equal(leaf[ids >= 0], expected[ids >= 0])
    # The digest goes by the ids, wherever they lie.
    assert digest(found, [ids, np.array([])]) == info["digest"]
    moved = found._replace(clients=({"head": jnp.roll(leaf, 1, axis=0)}, ()))
    assert digest(moved, [ids, np.array([])]) != info["digest"]


def test_other_clients_are_refused(tmp_path):
    state = make_state(1)
    with Checkpoints(tmp_path, [np.arange(6), np.array([])]) as checkpoints:
        checkpoints.save(state, {})
    for ids, reason in (
        (np.array([0, 1, 2, 3, 4, -1]), "other clients"),
        (np.array([0, 1, 2, 3, 4, 6]), "other clients"),
    ):
        warnings = []
        with Checkpoints(tmp_path, [ids, np.array([])]) as checkpoints:
            found = checkpoints.restore(state, warnings.append, set_aside=False)
        assert found is None and reason in warnings[0]


BASE = State(np.int32(3), {"a": np.ones((2, 3), np.float32)}, ((), np.zeros(4)))


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s._replace(round=np.int32(4)),
        lambda s: s._replace(server={"b": s.server["a"]}),
        lambda s: s._replace(server={"a": s.server["a"].reshape(3, 2)}),
        lambda s: s._replace(server={"a": s.server["a"].view(np.int32)}),
        lambda s: s._replace(server={"a": np.nextafter(s.server["a"], np.float32(2))}),
        lambda s: s._replace(clients=(s.clients[1], ())),
        lambda s: s._replace(clients=((), -s.clients[1])),  # 0 and -0 differ in a bit.
        lambda s: s._replace(clients=((), np.append(s.clients[1], 0.0))),
    ],
)
def test_the_digest_tells_any_two_states_apart(change):
    assert digest(change(BASE)) != digest(BASE)
    assert digest(jax.tree.map(np.copy, BASE)) == digest(BASE)
