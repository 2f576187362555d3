"""The layout that a probe chooses: the fastest, remembered, and kept on resuming."""

from __future__ import annotations

import dataclasses
import io
import json

import jax
import pytest
import rich.console

from fedgen import models
from fedgen.data import sources
from fedgen.runs import build, experiment, leg, probe
from fedgen.runs.config import Config


@pytest.fixture(scope="module")
def config(tiny_data):
    return Config(
        algorithm="fedavg",
        baselines=(),
        dataset=tiny_data,
        model="mlp8",
        num_clients=6,
        alpha=1.0,
        rounds=2,
        batch_size=8,
    )


@pytest.fixture
def long(config, tmp_path, monkeypatch):
    """Make every training long enough for a probe, whose timings a test injects."""
    monkeypatch.setenv("FEDGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(probe, "training_seconds", lambda *args: 1e6)
    asked = []

    def inject(seconds):
        def measure(chunk, devices):
            asked.append((chunk, devices))
            return seconds.get((chunk, devices), 9.0)

        monkeypatch.setattr(probe, "timer", lambda *args: measure)
        return asked

    return inject


@pytest.mark.parametrize(
    ("seconds", "tried"),
    [
        # Chunks grow as long as that helps; then fewer devices are tried.
        ({(1, 2): 1.0, (2, 2): 2.0, (1, 1): 3.0}, 3),
        ({(1, 2): 3.0, (2, 2): 2.0, (5, 2): 1.0, (10, 2): 4.0, (5, 1): 2.0}, 5),
        ({(1, 2): 3.0, (2, 2): 3.5, (1, 1): 2.0}, 3),
        # What does not fit is not taken, nor is anything larger tried.
        ({(1, 2): 3.0, (2, 2): ValueError, (1, 1): 4.0}, 3),
    ],
)
def test_the_search_ends_at_the_fastest(seconds, tried):
    asked = []

    def measure(chunk, devices):
        asked.append((chunk, devices))
        if seconds[chunk, devices] is ValueError:
            raise ValueError("too large")
        return seconds[chunk, devices]

    found = probe.search(measure, [1, 2, 5, 10], [2, 1], 1e6)
    assert asked == list(seconds) and len(found) == tried
    finite = {k: v for k, v in seconds.items() if v is not ValueError}
    assert min(found, key=found.get) == min(finite, key=finite.get)


def test_a_search_without_time_left_takes_the_first():
    assert probe.search(lambda *args: 1.0, [1, 2], [2, 1], -1.0) == {(1, 2): 1.0}


@pytest.mark.parametrize("best", [(2, 2), (1, 1)])
def test_the_fastest_is_chosen_and_remembered(config, long, best):
    times = {(1, 2): 3.0, (2, 2): 4.0, (1, 1): 5.0}
    asked = long({**times, best: 1.0})
    for chosen in ("a probe", "an earlier probe"):
        setup = build.build(config, probe.choose)
        assert setup.layout == chosen
        assert (setup.execution.chunk, setup.execution.num_devices) == best
        assert setup.federation.cohorts[0].num_clients == 6
    assert len(asked) == len(set(asked)), "the second time nothing is measured"
    # Another batch is another question; what is asked for is none.
    build.build(dataclasses.replace(config, batch_size=9), probe.choose)
    count = len(asked)
    assert count > len(set(asked))
    fixed = build.build(dataclasses.replace(config, chunk=3), probe.choose)
    assert fixed.execution.chunk == 3 and len(asked) == count


@pytest.mark.parametrize("content", ["", "{", "[]", '{"chunk": 0, "devices": 9}'])
def test_a_damaged_memory_is_no_memory(config, long, content):
    asked = long({(1, 2): 3.0, (2, 2): 4.0, (1, 1): 5.0})
    build.build(config, probe.choose)
    (path,) = (sources.cache_dir() / "layouts").iterdir()
    path.write_text(content)
    count = len(asked)
    build.build(config, probe.choose)
    assert len(asked) == 2 * count
    assert json.loads(path.read_text())["chunk"] == 1


def test_a_short_training_is_not_probed(config, monkeypatch, tmp_path):
    monkeypatch.setenv("FEDGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(probe, "timer", pytest.fail)
    setup = build.build(config, probe.choose)
    assert setup.layout == "platform's default" and setup.execution.chunk == 1
    assert not list(tmp_path.glob("cache/layouts/*"))
    # The work is that of the samples: 480 of 64 inputs, 8 hidden units, 2 rounds.
    layer, batches = 2 * 8 * (64 * 8 * 2 + 8 * 4 * 3), 336 / 8
    expected = config.rounds * batches * layer / probe._RATE["cpu"]
    found = probe.training_seconds(config, build.build(config).federation)
    assert expected <= found <= 2 * expected


def test_all_images_of_a_batch_are_counted():
    # Of one image: two convolutions of 5x5 kernels, which XLA counts without the zeros
    # around it, and two dense layers; forwards and twice backwards, but for the image's
    # own gradient.
    first, second = (5 * 28 - 6) ** 2 * 32, (5 * 14 - 6) ** 2 * 32 * 64
    dense = 7**2 * 64 * 512 + 512 * 10
    expected = 2 * (2 * first + 3 * (second + dense))
    found = probe._sample_operations(models.build("cnn", (28, 28, 1), 10), (28, 28, 1))
    assert expected <= found <= 1.5 * expected


def test_candidates_are_timed_on_clients_of_the_federation(config):
    federation = build.build(dataclasses.replace(config, devices=1)).federation
    measure = probe.timer(config, federation, 4)
    for chunk, devices in ((2, 2), ("all", 1)):
        assert 0 < measure(chunk, devices) < 60


def test_a_resumed_run_keeps_the_layout_of_the_first(config, long, tmp_path):
    long({(1, 2): 3.0, (2, 2): 2.0, (2, 1): 1.0})
    quiet = rich.console.Console(file=io.StringIO(), width=100)
    folder, train = tmp_path / "it", leg.train
    seen = []

    def record(each, setup, *args, **kwargs):
        seen.append((setup.execution.chunk, setup.execution.num_devices))
        if len(seen) == 1:
            raise KeyboardInterrupt
        return train(each, setup, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leg, "train", record)
        with pytest.raises(KeyboardInterrupt):
            experiment.run(config, str(folder), console=quiet)
        long({(1, 2): 1.0})
        for path in (sources.cache_dir() / "layouts").iterdir():
            path.unlink()
        experiment.run(config, str(folder), resume=True, console=quiet)
    assert seen == [(2, 1), (2, 1)]
    environment = json.loads((folder / "config.json").read_text())["environment"]
    assert (environment["chunk"], environment["devices"]) == (2, 1)
    assert "chunk 2 on 1 device" in quiet.file.getvalue()
    assert "<td>2</td>" in (folder / "report.html").read_text()
    # So does whoever reads it back.
    found = experiment.load(folder).setup.execution
    assert (found.chunk, found.num_devices) == (2, 1)
    assert len(jax.devices()) == 2
