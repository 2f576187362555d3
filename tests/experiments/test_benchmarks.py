"""Benchmarks at toy sizes: both sides agree, and every figure is there. No times."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments.benchmarks import (
    aggregators,
    engine,
    guard,
    processes,
    rivals,
    sweep,
    workloads,
)
from experiments.benchmarks.adapters import jax_nets
from experiments.benchmarks.workloads import Workload
from fedgen.core import rounds
from fedgen.core.execution import Execution


@flagsaver.flagsaver
def test_it_prints_a_row_for_every_way(capsys):
    flags.FLAGS(["aggregators", "--smoke", "--clients=5", "--repeats=1", "--sample=3"])
    with jax.numpy_rank_promotion("allow"):
        aggregators.main(["aggregators"])
    lines = capsys.readouterr().out.splitlines()
    assert len({line.count("|") for line in lines}) == 1
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert [row[0].split(",")[0] for row in rows if row[0]] == [
        "`gaussian.fuse_mean`",
        "`gaussian.fuse`",
        "`mixture.fit_proportions` and `responsibilities`",
        "`diffusion.invert` and `generate`",
    ]
    for _, way, seconds, ratio, memory, compiling in rows:
        assert float(seconds.split()[0]) > 0 and float(ratio.split()[0]) > 0
        assert float(memory) > 0
        assert bool(compiling) == way.startswith("fedgen")


def toy(wrong: float = 0.0) -> aggregators.Case:
    return aggregators.Case(
        "doubling",
        (np.float32(2), np.linspace(0, 19, 20_000, dtype=np.float32).reshape(10, -1)),
        (False, True),
        {"ours": lambda two, x: (two * x,)},
        {"loop": lambda two, x: (two * x + wrong,)},
        1e-3,
    )


def test_a_loop_over_some_clients_counts_for_all():
    ours, loop = aggregators.measure(toy(), 2, 4)
    assert (ours.way, loop.way) == ("ours", "loop")
    assert ours.ratio == [1, 1]
    np.testing.assert_allclose(loop.ratio, np.divide(loop.seconds, ours.seconds))
    # Twice the numbers of 10 clients, and nothing else to speak of: other threads of
    # this process may allocate a little.
    assert ours.bytes == 10 * 2000 * 4
    assert 10 * 2000 * 4 <= loop.bytes < 10 * 2000 * 4 * 1.5
    assert loop.compile_seconds is None and math.isfinite(ours.compile_seconds)


def test_sides_that_disagree_are_refused():
    with pytest.raises(AssertionError, match="loop"):
        aggregators.measure(toy(wrong=0.1), 1, 4)


def test_a_sweep_is_held_against_the_same_runs(tmp_path, monkeypatch):
    accuracies = iter((0.5, 0.6, 0.7, 0.8))

    def launch(module, *args):
        given = dict(arg.lstrip("-").split("=", 1) for arg in args)
        place = tmp_path / given["workdir"]
        place.mkdir()
        if module == "experiments.run":
            mean = {"personal_accuracy": {"mean": next(accuracies)}}
            (place / "summary.json").write_text(json.dumps(mean))
            return np.array([6.0, 9.0])
        assert given["seeds"] == "2" and given["grid"] == "learning_rate=0.1,1"
        found = ([0.5, 0.6], [0.7, 0.9])
        rows = [{"personal_accuracy": {"per_seed": each}} for each in found]
        (place / "sweep.json").write_text(json.dumps({"rows": rows}))
        return np.array([8.0, 9.0])

    monkeypatch.setattr(sweep, "launch", launch)
    alone, together, gap = sweep.measure([], ["0.1", "1"], 2, tmp_path)
    np.testing.assert_array_equal(alone.sum(axis=0) / together, [3, 4])
    np.testing.assert_allclose(gap, 0.1)
    folders = {f"{rate}-{seed}" for rate, seed in itertools.product(("0.1", "1"), "01")}
    assert {path.name for path in tmp_path.iterdir()} == {*folders, "sweep"}


# Two of four clients of different sizes, two steps of three samples.
TINY = Workload("fashion_mnist_mini", "mlp", 4, 2, 3, participants=2, learning_rate=0.1)


@pytest.fixture(scope="module")
def problem():
    return workloads.load(TINY, None)


@pytest.fixture(scope="module")
def written(problem, tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmark") / "tiny.npz"
    workloads.write(path, problem, TINY, 3)
    return path


def test_a_workload_says_what_everybody_trains_on(problem, written):
    with np.load(written) as file:
        arrays = dict(file)
    assert arrays["clients"].shape == (3, 2)
    assert arrays["rows"].shape == (3, 2, 2, 3)
    assert len(set(arrays["size"])) == 4
    held = np.split(arrays["order"], np.cumsum(arrays["size"])[:-1])
    for clients, rows in zip(arrays["clients"], arrays["rows"], strict=True):
        assert len(set(clients)) == 2
        for client, own in zip(clients, rows, strict=True):
            assert len(set(own.flat)) == 6 and set(own.flat) <= set(held[client])
    assert len(arrays["test"]) == 10_000 // 7
    everything = np.concatenate([arrays["test"], arrays["order"]])
    np.testing.assert_array_equal(np.sort(everything), np.arange(10_000))
    clients, rows = workloads.draw_schedule(workloads.load(TINY, None), TINY, 3)
    np.testing.assert_array_equal(clients, arrays["clients"])
    np.testing.assert_array_equal(rows, arrays["rows"])


def test_clients_may_draw_their_samples_instead():
    drawn = workloads.load(TINY._replace(samples=6), None)
    (cohort,) = drawn.federation.cohorts
    assert cohort.train.size.tolist() == [6] * 4 and cohort.order.shape == (24,)
    assert not set(np.asarray(cohort.order)) & set(drawn.test)
    (first,) = workloads.load(TINY._replace(samples=6), None, 2).federation.cohorts
    np.testing.assert_array_equal(first.order, cohort.order[:12])


def run_adapter(name: str, path: pathlib.Path) -> processes.Run:
    run = processes.run_once(processes.RIVALS[name], sys.executable, path, timeout=100)
    assert not run.error, run.error
    return run


def test_the_engine_ends_with_the_weights_of_a_plain_loop(
    problem, written, monkeypatch
):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    ours, plain = run_adapter("fedgen", written), run_adapter("jax", written)
    assert len(ours.rounds) == len(plain.rounds) == 3
    assert ours.start > 0 and min(ours.rounds) > 0 and ours.peak_bytes > 2**20
    assert ours.versions["jax"] == jax.__version__
    with np.load(written) as arrays:
        initial = {k: arrays[f"params/{k}"] for k in plain.params}
    for name, value in plain.params.items():
        moved = np.abs(value - initial[name]).max()
        assert moved > 1e-3
        np.testing.assert_allclose(ours.params[name], value, atol=1e-4 * moved)
    accuracy = rivals.score(TINY, problem, plain.params)
    model = problem.federation.cohorts[0].model
    x, y = (a[problem.test] for a in problem.federation.pool)
    logits = model.apply(unflatten(plain.params), x / 127.5 - 1)
    assert accuracy == pytest.approx(100 * np.mean(np.argmax(logits, -1) == y))


def unflatten(flat):
    tree = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


@pytest.mark.parametrize(
    "name, shape",
    [
        ("cnn", (28, 28, 1)),
        ("small_cnn", (16, 16, 3)),
        ("pfl_cnn", (8, 8, 3)),
        ("resnet8", (8, 8, 3)),
        ("vae", (8, 8, 1)),
    ],
)
def test_plain_networks_are_those_of_fedgen(name, shape):
    model = workloads.build_model(name, shape, 10)
    x = jax.random.normal(jax.random.key(1), (2, *shape))

    @jax.jit
    def logits(key):
        params = model.init(key)
        flat = workloads.flatten(params)
        plain = [
            jax_nets.forward(name, flat, x, convolution)
            for convolution in (jax_nets.convolve, jax_nets.convolve_slices)
        ]
        return model.apply(params, x), plain

    expected, plain = logits(jax.random.key(0))
    for each in plain:
        np.testing.assert_allclose(each, expected, atol=2e-5)


def step_flops(name: str) -> int:
    model = workloads.build_model(name, (28, 28, 1), 10)
    params = workloads.flatten(jax.eval_shape(model.init, jax.random.key(0)))
    x = jax.ShapeDtypeStruct((32, 28, 28, 1), jnp.float32)
    return workloads.step_flops(name, params, x)


def test_arithmetic_is_counted_as_by_hand():
    # Two multiply-adds a weight and sample forwards and for its gradient, a third
    # for the gradient of a layer's input, which the first layer does not need.
    mlp = 2 * 32 * (2 * 784 * 200 + 3 * 200 * 10)
    assert step_flops("mlp") == mlp
    convolutions = 2 * 28 * 28 * 25 * 32 + 3 * 14 * 14 * 25 * 32 * 64
    dense = 3 * (3136 * 512 + 512 * 10)
    assert step_flops("cnn") == 2 * 32 * (convolutions + dense)
    vae = 2 * 784 * 128 + 3 * (128 * 32 + 16 * 128 + 128 * 784)
    assert step_flops("vae") == 2 * 32 * vae


def test_the_arithmetic_of_a_round_is_that_of_its_participants(problem):
    one = 2 * 3 * (2 * 784 * 200 + 3 * 200 * 10)
    assert workloads.round_flops(TINY, problem) == 2 * 2 * one


CELLS = [
    rivals.Cell("fedgen", (1.0, 2.0, 4.0), (3.0,) * 3, (5.0,) * 3, 2**20, 70.0, 2e-6),
    rivals.Cell("jax", (2.0, 3.0, 4.0), (1.0,) * 3, (0.5,) * 3, 2**21, 70.2),
    rivals.Cell("torch", (0.5, 1.0, 3.0), (1.0,) * 3, (0.0,) * 3, 2**21, 71.0),
    rivals.Cell(
        "vmap", (8.0,) * 3, (1.0,) * 3, (0.0,) * 3, 2**21, 9.0, None, None, 2, 50.0
    ),
    rivals.Cell("flower", error="not installed: no such package"),
]


def test_the_table_marks_who_wins_and_who_differs():
    text = rivals.to_markdown(CELLS, 2e9, 100, 10.0, {0: 70.2})
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines()]
    assert len({len(row) for row in rows}) == 1
    ours, plain, torch, vmap, flower = rows[2:]
    assert ours[1:7] == ["2 [1, 4]", "1 [1, 1]", "50", "1", "10 %", "1"]
    assert ours[7:] == ["70.00 ok", "2e-06", "3.0", "5.0"]
    assert plain[2] == "1.5 [1, 2]" and plain[7] == "70.20 ok"
    assert torch[2] == "0.5 [0.5, 0.75] **wins**" and torch[7] == "71.00 **differs**"
    assert vmap[0].endswith("(SCALED from 2 clients)") and "no reference" in vmap[7]
    assert flower[1] == "not installed: no such package"


def test_repetitions_become_a_cell():
    run = processes.Run(2.0, (5.0, 1.0, 3.0, 2.0), 7, {}, {})
    cell = rivals.summarise("jax", [run, run._replace(peak_bytes=9)], 2, 10)
    # The median of the rounds but the first, of 2 clients for 10.
    assert cell.seconds == (10.0, 10.0) and (cell.present, cell.scaled) == (2, 5)
    assert cell.compile == (3.0, 3.0) and cell.start == (2.0, 2.0)
    assert cell.peak_bytes == 9
    failed = rivals.summarise("jax", [run, processes.Run(error="no")], 0, 10)
    assert failed.error == "no" and not failed.seconds


def test_a_rival_that_cannot_be_installed_is_told(monkeypatch, tmp_path):
    monkeypatch.setitem(processes.VENVS, "pfl", (("no-such",),))

    def run(command, **_):
        class Done:
            returncode, stderr = int("pip" in command), "x\nERROR: no such thing\n"

        return Done

    monkeypatch.setattr(processes.subprocess, "run", run)
    assert processes.install("pfl", tmp_path) == (
        "",
        "not installed: ERROR: no such thing",
    )
    assert not list(tmp_path.glob("*.txt"))


def test_drift_is_told_by_the_way_that_the_reference_came():
    start = {"a": np.zeros(2, np.float32), "b": np.ones((1, 1), np.float32)}
    reference = {"a": np.array([3.0, 0], np.float32), "b": np.full((1, 1), 5.0)}
    params = {"a": np.array([3.0, 0.3], np.float32), "b": np.full((1, 1), 5.4)}
    assert rivals.drift(params, reference, start) == pytest.approx(0.1)


def test_nothing_of_a_process_outlives_an_interruption(tmp_path):
    told = tmp_path / "pid"
    script = f"""
import os, pathlib, subprocess, time
child = subprocess.Popen(["sleep", "100"], start_new_session=True)
pathlib.Path({str(told)!r}).with_suffix(".part").write_text(str(child.pid))
os.rename({str(told.with_suffix(".part"))!r}, {str(told)!r})
time.sleep(100)
"""
    process = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
    with pytest.raises(KeyboardInterrupt), processes._ended(process):
        while not told.exists():
            assert process.poll() is None
            time.sleep(0.05)
        raise KeyboardInterrupt
    assert process.poll() == -signal.SIGKILL
    child = pathlib.Path("/proc", told.read_text(), "stat")
    for _ in range(100):  # A signal takes a moment.
        with contextlib.suppress(OSError):
            if child.read_text().split()[2] != "Z":
                time.sleep(0.1)
                continue
        return
    pytest.fail("the child lives on")


@pytest.mark.parametrize("card", ["", "NVIDIA H200, 580"])
def test_all_rivals_are_those_that_the_machine_can_run(card, monkeypatch):
    monkeypatch.setattr(processes, "name_accelerator", lambda: card)
    left_out = set(processes.RIVALS) - set(processes.all_rivals())
    assert left_out == (set() if card else {"fedgen-map", "torch-graph"})


def test_every_rival_has_an_adapter_and_a_known_environment():
    for rival in processes.RIVALS.values():
        assert (processes.ADAPTERS / rival.script).exists()
        assert not rival.venv or rival.venv in processes.VENVS


def test_a_failing_process_is_told_with_its_error(tmp_path):
    run = processes.run_once(
        processes.RIVALS["jax"], sys.executable, tmp_path / "none.npz", timeout=100
    )
    assert run.error.startswith("failed: FileNotFoundError") and not run.rounds


def test_of_a_log_the_first_error_is_told():
    said = ["Traceback (most recent call last):", "pfl.Error: no", "ChildFailedError:"]
    assert processes._reason([*said, "exitcode : 1"]) == "pfl.Error: no"
    for line in ("[rank0]: ValueError: no", "(Actor pid=7, ip=0) TypeError: no"):
        assert processes._reason(["(no error)", line, *said]) == line
    assert processes._reason(["one", "Errors are told"]) == "Errors are told"
    assert processes._reason([]) == ""


ADAPTER = """
import os, sys
sys.path.insert(0, {folder!r})
import common
assert os.environ["CUDA_VISIBLE_DEVICES"] == {seen!r}
args = common.arguments()
assert (args.mode, args.precision) == ("graph", "float32"), args
events = common.Events(args.folder)
events.ready()
events.round_done()
events.round_done()
events.finish({{"a": [1.0, 2.0]}}, {bytes})
"""


@pytest.mark.parametrize(
    ("venv", "seen", "device_bytes"), [("pfl", "", 0), ("torch", "7", 123)]
)
def test_only_some_rivals_see_an_accelerator_whose_memory_is_told(
    tmp_path, monkeypatch, venv, seen, device_bytes
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    script, folder = tmp_path / "adapter.py", str(processes.ADAPTERS)
    text = ADAPTER.format(folder=folder, bytes=device_bytes, seen=seen)
    script.write_text(f"{text}import time\ntime.sleep(1.5)\n")
    run = processes.run_once(
        processes.Rival("any", str(script), venv, "graph"),
        processes.install(venv, None)[0],
        tmp_path / "none.npz",
        timeout=100,
        precision="float32",
    )
    assert not run.error, run.error
    assert len(run.rounds) == 2 and run.params["a"].tolist() == [1, 2]
    assert run.peak_bytes == 123 if device_bytes else run.peak_bytes > 2**20


def test_the_guard_needs_a_slowdown_in_all_of_few_launches():
    assert guard.is_slower([1.2, 1.15, 1.3, 1.02, 1.12], 0.1)
    assert not guard.is_slower([1.2, 1.15, 1.3, 0.99, 1.12], 0.1)
    assert not guard.is_slower([1.2, 1.09, 1.08, 1.02, 1.05], 0.1)
    assert not guard.is_slower([0.5] * 5, 0.1)
    assert guard.is_slower([1.2] * 17 + [0.9] * 3, 0.1)
    assert not guard.is_slower([1.2] * 12 + [0.9] * 8, 0.1)


def test_the_guard_pairs_the_turns_of_a_launch(monkeypatch):
    class Worker:
        """A turn of base takes 1 s more than its last, and of head 1.5 times that."""

        def __init__(self, folder):
            self._factor = 1.5 if folder.name == "head" else 1.0
            self.start_seconds, self._turn = 2 * self._factor, 0

        def seconds(self, case):
            self._turn += 1
            return self._factor * self._turn

        def close(self):
            pass

    monkeypatch.setattr(guard, "Worker", Worker)
    folders = pathlib.Path("base"), pathlib.Path("head")
    seconds, ratios = guard.compare(*folders, ["MLP round"], launches=5, turns=3)
    # The first of four calls compiles.
    compiling = "MLP round, compilation"
    assert seconds == {guard.START: 2.0, compiling: 1.0, "MLP round": 3.0}
    assert ratios == dict.fromkeys(seconds, [1.5] * 5)
    text = guard.to_markdown(seconds, {**ratios, "MLP round": [1.0] * 5}, 0.1)
    assert text.splitlines()[2].endswith("1.500 [1.500, 1.500] | **slower** |")
    assert text.splitlines()[4].endswith("1.000 [1.000, 1.000] | ok |")


def test_the_guard_checks_out_what_git_knows():
    with guard.checkout("worktree") as folder:
        assert (folder / "fedgen").is_dir()
    with (
        pytest.raises(ValueError, match="no revision 'no-such'"),
        guard.checkout("no-such"),
    ):
        pass


def test_vaes_are_trained_by_adam():
    one_step = TINY._replace(model="vae", steps=1, participants=1)
    problem = workloads.load(one_step, None)
    federation, layout = problem.federation, Execution(1)
    round_fn = rounds.make_round(problem.algorithm, problem.sampler, layout)
    state = rounds.init_state(problem.algorithm, federation, problem.init_key, layout)
    new, _ = jax.jit(round_fn)(state, federation, problem.round_key)
    # The first step of Adam moves a weight by the rate, whatever its gradient but 0.
    for old, moved in zip(
        *map(jax.tree.leaves, (state.server, new.server)), strict=True
    ):
        np.testing.assert_allclose(jnp.max(jnp.abs(moved - old)), 2e-3, rtol=1e-3)


def test_the_engine_is_timed_with_its_own_chunk_and_others(monkeypatch, capsys):
    # Two clients on two devices, so that no other chunk than 1 is possible.
    rows = engine.measure(TINY, workloads.load(TINY, None, 2), [1, 50], turns=1)
    assert [row[:5] for row in rows] == [
        ("mlp", 4, "round", 1, True),
        ("mlp", 4, "evaluation", 1, True),
    ]

    vae = TINY._replace(model="vae")
    (row,) = engine.measure(vae, workloads.load(vae, None, 2), [1], 1, evaluation=False)
    assert row[:5] == ("vae", 4, "round", 1, True)

    def full():
        raise jax.errors.JaxRuntimeError(f"{reason}: 7 bytes")

    reason = "RESOURCE_EXHAUSTED"

    monkeypatch.setattr(engine, "_an_evaluation", lambda *_: full)
    (left,) = engine.measure(TINY, workloads.load(TINY, None, 2), [1], turns=1)
    assert left[:5] == rows[0][:5]
    assert capsys.readouterr().err == "evaluation, chunk 1: does not fit\n"
    reason = "INTERNAL"
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        engine.measure(TINY, workloads.load(TINY, None, 2), [1], turns=1)
    fast = rows[0]._replace(seconds=(2.0,))
    slow = fast._replace(chunk=2, own=False, seconds=(4.0,))
    table = engine.to_markdown([slow, fast, rows[1]], 1.0).splitlines()
    assert table[2].endswith("| 2.00 |") and table[3].endswith("| 1.00 |")
    assert "1 (own)" in table[3] and table[4].endswith("| 1.00 |")
