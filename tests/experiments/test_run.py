"""The command line: what it refuses, in how many words, and surviving kill -9."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pathlib
import random
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import run
from fedgen import algorithms
from fedgen.core import execution
from fedgen.runs import config as config_lib
from fedgen.runs import experiment, leg
from fedgen.runs.config import Config

ROOT = pathlib.Path(__file__).parents[2]


def invoke(*args):
    """Run the command line in this process; return the exit code and stderr."""
    error = io.StringIO()
    with (
        flagsaver.flagsaver(),
        contextlib.redirect_stderr(error),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(execution, "use_cores", lambda devices: None)
        try:
            run.main(run.parse(["run", *args]))
        except SystemExit as exit_:
            return exit_.code, error.getvalue()
    return 0, error.getvalue()


def files_of(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


def archive(path, **changes):
    rng = np.random.default_rng(0)
    arrays = {
        "x": rng.integers(0, 256, (120, 8, 8), dtype=np.uint8),
        "y": np.arange(120) % 4,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{**arrays, **changes})


def idx(path, content, *shape):
    sizes = b"".join(size.to_bytes(4, "big") for size in shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes((0, 0, 8, len(shape))) + sizes + content)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with sound and unsound data, and with folders of other runs."""
    root = tmp_path_factory.mktemp("world")
    archive(root / "good" / "a.npz")
    nan = np.ones((120, 8, 8), np.float32)
    nan[7, 3, 3] = np.nan
    archive(root / "nan" / "a.npz", x=nan)
    archive(root / "outside" / "a.npz", y=np.arange(120) % 5, num_classes=4)
    archive(root / "negative" / "a.npz", y=np.arange(120) % 4 - 1, num_classes=4)
    archive(root / "several" / "a.npz", num_classes=[4, 4])
    archive(root / "fewer" / "a.npz", y=np.arange(119) % 4)
    archive(root / "two" / "a.npz")
    archive(root / "two" / "b.npz")
    archive(root / "flat" / "a.npz", x=np.ones((120, 5), np.float32))
    (root / "torn").mkdir()
    content = (root / "good" / "a.npz").read_bytes()
    (root / "torn" / "a.npz").write_bytes(content[: len(content) // 2])
    (root / "nothing").mkdir()
    idx(root / "idx" / "train-images-idx3-ubyte", b"\1" * 100, 10, 8, 8)
    idx(root / "idx" / "train-labels-idx1-ubyte", b"\1" * 10, 10)
    idx(root / "alone" / "train-images-idx3-ubyte", b"\1" * 640, 10, 8, 8)

    (root / "file").write_text("mine")
    (root / "foreign").mkdir()
    (root / "foreign" / "thesis.tex").write_text("mine")
    (root / "damaged").mkdir()
    (root / "damaged" / "config.json").write_text('{"flags": ')
    (root / "other").mkdir()
    record = {
        "flags": config_lib.to_json(Config(alpha=0.3)),
        "environment": {"devices": 2},
    }
    (root / "other" / "config.json").write_text(json.dumps(record))
    return root


BAD = [
    # What does not exist: the nearest name that does is offered.
    ("--algorithm=pfedgn", "algorithm 'pfedgn'", "'pfedgm'"),
    ("--baselines=fedavgg", "baseline 'fedavgg'", "'fedavg'"),
    ("--dataset=fashion_mnist_min", "data set", "'fashion_mnist_min'", "_mini'"),
    ("--partition=dirichlett", "partition 'dirichlett'", "'dirichlet'"),
    ("--model=mpl", "model 'mpl'", "'mlp'"),
    ("--corruption=noice", "corruption 'noice'", "'noise'"),
    ("--set=temperatur=1", "hyper-parameter 'temperatur'", "'temperature'"),
    ("--algorithm=fedper --set=mu=1", "hyper-parameter 'mu'", "fedper has none"),
    ("--partition=mixture --inherent=rotatoin", "inherent", "'rotatoin'"),
    ("--learning_rat=1", "learning_rat", "learning_rate"),
    # What is of the wrong kind.
    ("--chunk=abc", "chunk must be a number, all or auto", "got abc"),
    ("--alpha=small", "alpha", "small"),
    ("--resume=perhaps", "resume", "perhaps"),
    ("--set=temperature=warm", "temperature must be a number", "'warm'"),
    ("--set=navigator=stars", "navigator", "gaussian", "stars"),
    ("--set=temperature", "--set must be name=value", "'temperature'"),
    ("--set==1", "--set must be name=value", "'=1'"),
    ("train", "flags begin with --", "train"),
    # What is out of range.
    ("--alpha=0", "alpha must be above 0", "got 0.0"),
    ("--alpha=-1", "alpha must be above 0", "got -1.0"),
    ("--alpha=nan", "alpha must be above 0 and finite", "got nan"),
    ("--num_clients=0", "num_clients must be at least 1", "got 0"),
    ("--num_clients=10001", "num_clients must be", "10000 samples", "10001"),
    ("--participation=0", "participation must be in (0, 1]", "got 0.0"),
    ("--participation=1.5", "participation must be in (0, 1]", "got 1.5"),
    ("--rounds=0", "rounds must be at least 1", "got 0"),
    ("--batch_size=0", "batch_size must be at least 1", "got 0"),
    ("--learning_rate=0", "learning_rate must be above 0", "got 0.0"),
    ("--learning_rate=nan", "learning_rate must be above 0 and finite", "got nan"),
    ("--momentum=1", "momentum must be in [0, 1)", "got 1.0"),
    ("--weight_decay=inf", "weight_decay must be at least 0 and finite", "got inf"),
    ("--dropout=1", "dropout must be in [0, 1)", "got 1.0"),
    ("--stragglers=-0.1", "stragglers must be in [0, 1)", "got -0.1"),
    ("--new_clients=-1", "new_clients must be at least 0", "got -1"),
    ("--severity=6", "severity must be between 1 and 5", "got 6"),
    ("--classes_per_client=0", "classes_per_client must be at least 1", "got 0"),
    ("--partition=pathological --classes_per_client=11", "10 classes", "got 11"),
    ("--seed=4294967296", "seed must be below 2^31", "got 4294967296"),
    ("--eval_every=0", "eval_every must be at least 1", "got 0"),
    ("--checkpoint_every=-1", "checkpoint_every must be at least 0", "got -1"),
    ("--chunk=0", "chunk must be at least 1", "got 0"),
    ("--chunk=21", "chunk must be at most the 20 clients", "got 21"),
    ("--devices=3", "devices must be between 1 and the 2 available", "got 3"),
    ("--set=temperature=-1", "temperature must be", "-1"),
    # What does not go together.
    ("--baselines=fedavg,fedavg", "baselines must differ", "'fedavg'"),
    ("--model=mlp,cnn", "averages weights", "2 cohorts", "mlp"),
    ("--algorithm=fedproto --baselines= --model=mlp,cnn --num_clients=1", "cnn"),
    ("--algorithm=fedprox --baselines=fedprox --set=mu=1", "both", "fedprox"),
    # Data that cannot be learnt from.
    ("--dataset={world}/nan", "finite", "rows 7"),
    ("--dataset={world}/outside", "labels must lie in [0, 4)", "got 4"),
    ("--dataset={world}/negative", "labels must lie in [0, 4)", "got -1"),
    ("--dataset={world}/several", "num_classes", "one number", "(2,)"),
    ("--dataset={world}/fewer", "120 samples and 119 labels"),
    ("--dataset={world}/two", "one .npz", "got 2"),
    ("--dataset={world}/torn", "cannot read", "a.npz"),
    ("--dataset={world}/nothing", "must hold", "nothing"),
    ("--dataset={world}/idx", "announces 10 x 8 x 8", "holds 100"),
    ("--dataset={world}/alone", "needs its labels"),
    ("--dataset={world}/flat --model=cnn", "cnn", "height, width", "(5,)"),
    ("--dataset={world}/flat --corruption=noise --model=mlp", "uint8", "float32"),
    ("--dataset= --model=mlp", "data set", "empty"),
    ("--data_dir={world}/file --dataset=mnist", "data_dir", "folder", "file"),
    # Folders that are not this run's.
    ("--workdir={world}/file", "workdir must be a folder", "file"),
    ("--workdir={world}/file/sub", "workdir must be a folder", "file"),
    ("--workdir={world}/foreign", "holds files but no config.json"),
    ("--workdir={world}/damaged", "config.json is not the config.json of a run"),
    ("--workdir={world}/damaged --resume", "config.json is not the config.json"),
    ("--workdir={world}/other", "another configuration", "--alpha was 0.3, is 0.1"),
    ("--workdir={world}/other --resume", "cannot resume", "--alpha was 0.3, is 0.1"),
    (
        "--workdir={world}/other --resume --alpha=0.3 --rounds=9 --set=pull=0",
        "cannot resume",
        "--rounds was 8, is 9",
        "--set was empty, is pull=0",
    ),
    ("--workdir={world}/other --alpha=0.3", "already holds this run", "--resume"),
]


@pytest.mark.parametrize("case", BAD, ids=lambda case: case[0])
def test_bad_input_is_refused_in_one_line_before_any_work(
    case, world, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(leg, "train", pytest.fail)
    before = files_of(world)
    args, *words = case
    code, error = invoke(*shlex.split(args.format(world=world)))
    assert code == 2, error
    assert error.startswith("error: ") and error.endswith("\n")
    assert error.count("\n") == 1 and "Traceback" not in error
    for word in words:
        assert word in error
    assert list(tmp_path.iterdir()) == []
    assert files_of(world) == before


def test_a_chunk_that_cannot_fit_is_refused(world, tmp_path, monkeypatch, cache_events):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(leg, "train", pytest.fail)
    monkeypatch.setattr(leg.os, "sysconf", lambda name: 1000)  # A million bytes.
    code, error = invoke(
        f"--dataset={world}/good",
        "--num_clients=10",
        "--chunk=10",
        "--model=mlp",
        "--algorithm=local_only",
        "--baselines=",
    )
    assert code == 2 and error.count("\n") == 1
    assert "local_only would need" in error and "smaller --chunk" in error
    assert cache_events["cache_misses"], "it was compiled, and not kept"
    assert list(tmp_path.iterdir()) == []


def test_a_diverged_training_exits_with_1_and_says_where(world, tmp_path):
    code, error = invoke(
        f"--dataset={world}/good",
        "--num_clients=2",
        "--model=mlp",
        "--algorithm=fedavg",
        "--baselines=",
        "--rounds=2",
        "--learning_rate=1e30",
        f"--workdir={tmp_path}/run",
    )
    assert code == 1 and error.count("\n") == 1
    assert error.startswith("error: fedavg, round 1:") and "not finite" in error


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(baselines=()),
        Config(
            algorithm="fedprox",
            baselines=("fedper",),
            hyperparameters={"mu": "0.5"},
            dataset="/a folder/with 'quotes'",
            data_dir="x=y",
            alpha=1e-7,
            corruption="noise,blur",
            model="mlp,cnn",
            rounds=3,
            seed=11,
        ),
    ],
)
def test_the_recorded_command_gives_the_configuration_back(config):
    words = shlex.split(config_lib.command(config))
    assert words[:3] == ["python", "-m", "experiments.run"]
    with flagsaver.flagsaver():
        flags.FLAGS(["run", *words[3:]])
        assert run.read_config() == config


def test_flags_reach_the_experiment(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        experiment, "run", lambda *args, **kwargs: asked.append((args, kwargs))
    )
    code, error = invoke("--resume", f"--workdir={tmp_path}", "--chunk=2")
    assert (code, error) == (0, "")
    options = {"resume": True}
    assert asked == [((Config(chunk=2), str(tmp_path)), options)]


def start(*args, cwd, **variables):
    """Start the command line as a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **variables}
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.run", *args],
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_help_lists_algorithms_with_hyperparameters_and_defaults(tmp_path):
    out, error = start("--help", cwd=tmp_path).communicate()
    assert not error
    for name in algorithms.REGISTRY:
        assert f"\n{name}: " in out
        for key in algorithms.hyperparameters(name):
            assert f"\n    {key}=" in out
    for name in Config.__dataclass_fields__:
        if name != "hyperparameters":
            assert f"--{name}: " in out or f"--[no]{name}: " in out
    assert "--workdir: " in out and "--[no]resume: " in out and "--set: " in out
    assert "mu=0.01" in out and "(default: '20')" in out


def test_a_refusal_as_a_process(tmp_path):
    process = start("--participation=1.5", cwd=tmp_path)
    out, error = process.communicate()
    assert process.returncode == 2
    assert error == "error: participation must be in (0, 1], got 1.5\n" and not out
    assert list(tmp_path.iterdir()) == []


RUN = (
    "--algorithm=fedper",
    "--baselines=local_only",
    "--model=mlp",
    "--num_clients=4",
    "--participation=0.5",
    "--local_steps=2",
    "--batch_size=8",
    "--rounds=40",
    "--eval_every=2",
    "--checkpoint_every=2",
)


def final_files(folder):
    """Digest what a run must end with, whatever happened on the way."""
    found = {}
    for part in (folder, folder / "baselines" / "local_only"):
        info = part / "checkpoints" / "40" / "info" / "metadata"
        found[part.name, "state"] = json.loads(info.read_text())["digest"]
        metrics = (part / "metrics.jsonl").read_bytes()
        found[part.name, "metrics"] = hashlib.sha256(metrics).hexdigest()
    summary = json.loads((folder / "summary.json").read_text())
    for entry in (summary, *summary["baselines"].values()):
        del entry["seconds"], entry["peak_memory_bytes"]
    return {**{k[1] + str(i): v for i, (k, v) in enumerate(found.items())}, **summary}


def lines_in(folder):
    # By name: a walk would trip over checkpoints that the run deletes meanwhile.
    files = [folder, *(folder / "baselines" / name for name in algorithms.REGISTRY)]
    files = [part / "metrics.jsonl" for part in files]
    return sum(p.read_bytes().count(b"\n") for p in files if p.exists())


def test_killed_at_random_moments_and_resumed_equals_never_killed(world, tmp_path):
    """Kill -9; FEDGEN_KILLS says how often, each time at another moment."""
    kills = int(os.environ.get("FEDGEN_KILLS", "2"))
    args = (*RUN, f"--dataset={world}/good")
    # The first process compiles for all; they differ in what they find, not do.
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    begun = time.monotonic()
    process = start(*args, "--workdir=whole", cwd=tmp_path, **cache)
    out, error = process.communicate()
    seconds = time.monotonic() - begun
    assert process.returncode == 0, error
    assert not error, "a run says nothing on stderr"
    assert "Report: whole/report.html" in out

    rng = random.Random(7)
    folder = tmp_path / "killed"
    args = (*args, "--workdir=killed", "--resume")
    # Of the lines of both algorithms; in between, kills come at a time, and so most
    # often while the process starts and compiles.
    moments = sorted(rng.sample(range(lines_in(tmp_path / "whole")), kills // 2))
    killed = 0
    for i in range(kills):
        process = start(*args, cwd=tmp_path, **cache)
        if i % 2:
            while process.poll() is None and lines_in(folder) <= moments[i // 2]:
                time.sleep(0.01)
            time.sleep(rng.uniform(0.0, 0.1))
        else:
            time.sleep(rng.uniform(0.0, 0.8 * seconds))
        killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
    process = start(*args, cwd=tmp_path, **cache)
    out, error = process.communicate()
    assert process.returncode == 0, error
    assert killed >= kills / 2 and "warning" not in out
    assert final_files(folder) == final_files(tmp_path / "whole")


@pytest.mark.parametrize("flag, devices", [("--devices=1", 1), ("--chunk=1", 0)])
def test_cores_are_told_of_the_devices(monkeypatch, flag, devices):
    told = []
    monkeypatch.setattr(execution, "use_cores", told.append)
    with flagsaver.flagsaver(), pytest.raises(SystemExit):
        run.main(run.parse(["run", flag, "--num_clients=0"]))
    assert told == [devices]
