"""Several processes: the numbers of one, files of one, and an end when one is lost."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest

from fedgen.core import execution, hosts
from fedgen.runs import experiment
from fedgen.runs.config import Config

ROOT = pathlib.Path(__file__).parents[2]
ROUNDS = 6

# The command line, with notes on where the clients' state lies, and two accidents:
# process 1 is killed when round 4 is saved, or the run is first asked for anew.
WORKER = """
import json, os, pathlib, signal, sys
import jax
from experiments import run
from fedgen.core.checkpoint import Checkpoints
from fedgen.runs import experiment

accident, notes, *argv = sys.argv[1:]
save, again, note = Checkpoints.save, experiment.run, {}

def spy(self, state, info):
    save(self, state, info)
    leaf = jax.tree.leaves(state.clients)[0]
    note["spec"] = [str(axis) for axis in leaf.sharding.spec]
    note["whole"] = leaf.shape
    note["mine"] = [shard.data.shape for shard in leaf.addressable_shards]
    pathlib.Path(notes).write_text(json.dumps(note))
    if accident == "kill" and int(state.round) == 4 and jax.process_index() == 1:
        os.kill(os.getpid(), signal.SIGKILL)

def refused(*args, resume):
    if accident == "anew":
        try:
            again(*args, resume=False)
        except ValueError as error:
            note["refusal"] = str(error)
    return again(*args, resume=resume)

Checkpoints.save, experiment.run = spy, refused
run.main(run.parse(["run", *argv]))
"""


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def start(code, *args, **variables):
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "2",
        **variables,
    }
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_on(processes, accident, folder, notes, config, quick_flags):
    """Run a configuration on so many processes; return exit codes and stderr."""
    port = free_port()
    flags = [f"--{k}={v}" for k, v in config.items()]
    started = [
        start(
            WORKER,
            accident,
            notes / f"{accident}{i}.json",
            *flags,
            f"--workdir={folder}",
            "--resume",
            f"--coordinator=127.0.0.1:{port}",
            f"--num_processes={processes}",
            f"--process_id={i}",
            XLA_FLAGS=quick_flags,
            JAX_DISABLE_MOST_OPTIMIZATIONS="1",
        )
        for i in range(processes)
    ]
    ended = [process.communicate(timeout=120) for process in started]
    codes = [process.returncode for process in started]
    return codes, [error for _, error in ended]


class Story:
    """A run by one process; one by two, of which one is lost; and two ways to go on."""

    def __init__(self, data, folder, quick_flags):
        config = {
            "algorithm": "fedper",
            "baselines": "",
            "dataset": data,
            "model": "mlp4",
            "num_clients": 5,
            "participation": 0.6,
            "dropout": 0.2,
            "rounds": ROUNDS,
            "batch_size": 8,
        }
        own = Config(**{**config, "baselines": ()})
        self.folder = folder
        experiment.run(own, str(folder / "one"))
        self.lost = run_on(2, "kill", folder / "two", folder, config, quick_flags)
        self.at_loss = sorted(p.name for p in (folder / "two").iterdir())
        shutil.copytree(folder / "two", folder / "alone")
        self.resumed = run_on(2, "anew", folder / "two", folder, config, quick_flags)
        experiment.run(own, str(folder / "alone"), resume=True)

    def note(self, accident, i):
        return json.loads((self.folder / f"{accident}{i}.json").read_text())


@pytest.fixture(scope="module")
def story(tiny_data, tmp_path_factory, quick_flags):
    return Story(tiny_data, tmp_path_factory.mktemp("story"), quick_flags)


def test_clients_lie_with_the_devices_of_all_processes(story):
    for i in range(2):
        note = story.note("kill", i)
        assert note["spec"][0] == "clients"
        # Five clients and three places of padding, two for each of four devices.
        assert note["whole"][0] == 8
        assert [shape[0] for shape in note["mine"]] == [2, 2]


def test_a_lost_process_ends_the_others_and_says_where_to_go_on(story):
    codes, errors = story.lost
    assert codes[1] == -9 and codes[0] != 0
    words = errors[0].splitlines()[-1]
    assert words.startswith("error: process 0 of 2 was ended")
    assert "another one was lost" in words
    assert words.endswith("--resume continues from round 4 of fedper")
    assert "summary.json" not in story.at_loss


def test_all_processes_refuse_what_the_first_one_refuses(story):
    assert story.resumed[0] == [0, 0], story.resumed[1]
    refusals = [story.note("anew", i)["refusal"] for i in range(2)]
    assert refusals[0] == refusals[1] and "already holds this run" in refusals[0]


@pytest.mark.parametrize("resumed_by", ["two", "alone"])
def test_numbers_are_those_of_one_process(story, resumed_by):
    one, other = (story.folder / name for name in ("one", resumed_by))
    lines = [
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (one, other)
    ]
    assert len(lines[0]) == len(lines[1]) == ROUNDS
    for a, b in zip(*lines, strict=True):
        assert_near(a, b)
    a, b = (json.loads((path / "summary.json").read_text()) for path in (one, other))
    for summary in (a, b):
        del summary["seconds"], summary["peak_memory_bytes"]
    assert_near(a, b)


def assert_near(a, b):
    """Floats to the rounding of sums in another order, all else exactly."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_near(a[key], b[key])
    elif isinstance(a, list):
        for x, y in zip(a, b, strict=True):
            assert_near(x, y)
    elif isinstance(a, float):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    else:
        assert a == b


def test_everything_is_written_once(story):
    names = {
        path: sorted(p.name for p in (story.folder / path).iterdir())
        for path in ("one", "two")
    }
    assert names["one"] == names["two"]
    assert len(list((story.folder / "two" / "tensorboard").iterdir())) == 1
    record = json.loads((story.folder / "two" / "config.json").read_text())
    assert record["environment"]["devices"] == 4
    assert record["environment"]["processes"] == 2


def test_a_process_id_given_twice():
    code = "import sys; from fedgen.core import hosts; hosts.join(sys.argv[1], 3, {})"
    coordinator = f"127.0.0.1:{free_port()}"
    processes = [start(code.format(i), coordinator) for i in (0, 1, 1)]
    try:
        # The service tells the elder of the two; the others go on waiting.
        ended = wait_for_any(processes[1:])
        error = ended.communicate()[1]
        assert ended.returncode != 0
        assert error.splitlines()[-1].startswith(
            f"error: process 1 of 3 could not join at {coordinator}: "
        )
        assert error.rstrip().endswith("one came twice")
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def wait_for_any(processes):
    """Return the first process that ends."""
    while True:
        for process in processes:
            try:
                process.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                continue
            return process


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((None, 2, 0), "must come with a coordinator, got none"),
        (("auto", 2, None), "must come with a coordinator HOST:PORT, got auto"),
        (("host", 2, 0), "coordinator must be auto or HOST:PORT, got 'host'"),
        ((":80", 2, 0), "coordinator must be auto or HOST:PORT, got ':80'"),
        (("host:0", 2, 0), "coordinator must be auto or HOST:PORT, got 'host:0'"),
        (("host:x", 2, 0), "coordinator must be auto or HOST:PORT, got 'host:x'"),
        (("host:80", None, 0), "num_processes must be at least 1, got None"),
        (("host:80", 0, 0), "num_processes must be at least 1, got 0"),
        (("host:80", 2, None), r"process_id must be in \[0, 2\), got None"),
        (("host:80", 2, 2), r"process_id must be in \[0, 2\), got 2"),
        (("host:80", 2, -1), r"process_id must be in \[0, 2\), got -1"),
    ],
)
def test_flags_that_do_not_fit_together(given, message):
    with pytest.raises(ValueError, match=message):
        hosts.join(*given)


def test_nobody_at_the_coordinator(monkeypatch):
    monkeypatch.setattr(hosts, "_REACH", 0.3)
    place = f"127.0.0.1:{free_port()}"
    with pytest.raises(ValueError, match=f"coordinator {place} must be reached"):
        hosts.join(place, 2, 1)


def test_somebody_at_the_coordinator():
    with socket.create_server(("", 0)) as server:
        place = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"{place} must be free .*the same id"):
            hosts.join(place, 2, 0)


def test_devices_that_the_processes_cannot_share(monkeypatch):
    monkeypatch.setattr(execution.jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="a multiple of the 2 processes, got 1"):
        execution.make_mesh(1)
    devices = execution.jax.devices()
    monkeypatch.setattr(
        execution.jax, "local_devices", lambda process_index: devices[process_index:]
    )
    monkeypatch.setattr(execution.jax, "devices", lambda: devices + devices)
    with pytest.raises(ValueError, match="must be 2 on each of the 2 .*, got 2, 1"):
        execution.make_mesh(4)


def test_what_differs_between_processes_is_named(monkeypatch):
    monkeypatch.setattr(hosts, "gather", lambda text: [text, text, "other"])
    with pytest.raises(ValueError, match=r"data must be the same .* \[2\] than on 0"):
        hosts.require_same("data", "mine")


def test_what_fails_on_another_process_fails_here(monkeypatch):
    monkeypatch.setattr(hosts, "several", lambda: True)
    monkeypatch.setattr(hosts, "gather", lambda text: [text, "no data here"])
    with pytest.raises(ValueError, match="no data here"):
        hosts.together(lambda: 1)
    with pytest.raises(KeyError, match="mine"):
        hosts.together(lambda: {}["mine"])
