"""Rivals as processes: their environments, what one run of them takes, the machine."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import pathlib
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any, NamedTuple

import numpy as np
from absl import flags

Params = dict[str, np.ndarray]  # by path
ADAPTERS = pathlib.Path(__file__).parent / "adapters"
ROOT = pathlib.Path(__file__).parents[2]
_POLL_SECONDS = 0.5
_TORCH = "torch==2.13.0"  # the one build that all rivals on PyTorch are given


class Rival(NamedTuple):
    """A simulator at one of its settings.

    Attributes:
      label: For the table.
      script: In `adapters/`.
      venv: Name of its environment; empty for that of fedgen.
      mode: Handed to the script.
      processes: Whether it gets a process (or device) per core rather than one.
      accelerated: Whether it is of use on an accelerator only.
    """

    label: str
    script: str
    venv: str = ""
    mode: str = ""
    processes: bool = False
    accelerated: bool = False


# Of each environment, what `pip install` is called with, once or more.
VENVS = {
    "torch": ((_TORCH, "numpy"),),
    "flower": (("flwr[simulation]", _TORCH, "numpy"),),
    "pfl": (("pfl", _TORCH, "numpy"),),
    # Of the time of jax 0.4.13, the newest that it was found to run on.
    "fedjax": (
        (
            "fedjax==0.0.17",
            "jax==0.4.13",
            "jaxlib==0.4.13",
            "dm-haiku==0.0.10",
            "numpy<2",
            "scipy<1.12",
        ),
    ),
    # 3.0 needs Python 3.14; 2.0.3 asks for 3.12 and runs on 3.11.
    "blazefl": (
        (_TORCH, "numpy", "tqdm"),
        ("--ignore-requires-python", "--no-deps", "blazefl==2.0.3"),
    ),
}
RIVALS = {
    "fedgen": Rival("fedgen", "run_fedgen.py"),
    "fedgen-map": Rival(
        "fedgen, a client at a time", "run_fedgen.py", mode="map", accelerated=True
    ),
    "jax": Rival("plain JAX, jitted clients", "run_jax.py", mode="loop"),
    "jax-scan": Rival(
        "plain JAX, a scan on every core", "run_jax.py", mode="scan", processes=True
    ),
    "jax-serial": Rival("plain JAX, jitted steps", "run_jax.py", mode="serial"),
    "vmap": Rival("JAX, naive `vmap`", "run_jax.py", mode="vmap"),
    "torch": Rival("plain PyTorch", "run_torch.py", "torch"),
    "torch-graph": Rival(
        "plain PyTorch, a CUDA graph per client",
        "run_torch.py",
        "torch",
        "graph",
        accelerated=True,
    ),
    "torch-vmap": Rival("PyTorch, `torch.func.vmap`", "run_torch.py", "torch", "vmap"),
    "torch-processes": Rival(
        "plain PyTorch, a process per core", "run_torch.py", "torch", "", True
    ),
    "fedjax": Rival("FedJAX, `jit`", "run_fedjax.py", "fedjax", "jit"),
    "fedjax-pmap": Rival("FedJAX, `pmap`", "run_fedjax.py", "fedjax", "pmap", True),
    "pfl": Rival("pfl", "run_pfl.py", "pfl"),
    "pfl-processes": Rival("pfl, a process per core", "run_pfl.py", "pfl", "", True),
    "blazefl": Rival(
        "BlazeFL, a thread per core", "run_blazefl.py", "blazefl", "", True
    ),
    "blazefl-single": Rival("BlazeFL, one thread", "run_blazefl.py", "blazefl"),
    "flower": Rival("Flower, an actor per core", "run_flower.py", "flower", "", True),
}


def define_precision() -> None:
    """Define the flag that sets how float32 matrices are multiplied."""
    flags.DEFINE_enum(
        "precision",
        "",
        ["", "float32", "tensorfloat32"],
        "Of float32 products on an accelerator; empty for what each library does.",
    )


def all_rivals() -> list[str]:
    """Name the rivals that are of use on this machine."""
    accelerated = bool(name_accelerator())
    return [name for name, r in RIVALS.items() if accelerated or not r.accelerated]


class Run(NamedTuple):
    """What one process of a rival took; `error` says why it is nothing."""

    start: float = 0.0  # seconds until the first round
    rounds: tuple[float, ...] = ()  # seconds of every round
    peak_bytes: int = 0  # of an accelerator's memory if it has one
    versions: dict[str, str] | None = None
    params: Params | None = None
    error: str = ""


def install(venv: str, folder: pathlib.Path | None) -> tuple[str, str]:
    """Make an environment if it is missing or of other packages.

    Args:
      venv: Its name; empty for that of fedgen.
      folder: Of all environments; None if fedgen's own has what all rivals need.

    Returns:
      Its interpreter, and an error message, empty if all is well.
    """
    if not venv or folder is None:
        return sys.executable, ""
    path, wanted = folder / venv, json.dumps(VENVS[venv])
    python, stamp = path / "bin" / "python", folder / f"{venv}.txt"
    if stamp.exists() and stamp.read_text() == wanted and python.exists():
        return str(python), ""
    stamp.unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"installing {venv}", file=sys.stderr)
    commands = [[sys.executable, "-m", "venv", str(path)]]
    for packages in VENVS[venv]:
        commands.append([str(python), "-m", "pip", "install", "--quiet", *packages])
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reasons = [x for x in done.stderr.splitlines() if "ERROR" in x]
            return "", f"not installed: {' '.join(reasons)[:200]}"
    stamp.write_text(wanted)
    return str(python), ""


def run_once(
    rival: Rival,
    python: str,
    workload: pathlib.Path,
    timeout: float,
    chunk: int = 0,
    precision: str = "",
) -> Run:
    """Run one process of a rival to its end.

    Args:
      rival: Which one.
      python: Interpreter of its environment.
      workload: File that `workloads.write` wrote.
      timeout: Seconds after which it is stopped.
      chunk: fedgen's clients at once, 0 for what it chooses.
      precision: Of float32 products, as JAX names it; empty for what each does.
    """
    cores = len(os.sched_getaffinity(0))
    processes = cores if rival.processes else 1
    threads = 1 if rival.processes else cores
    with tempfile.TemporaryDirectory() as folder:
        command = [python, str(ADAPTERS / rival.script), str(workload), folder]
        command += [f"--mode={rival.mode}", f"--processes={processes}"]
        command += [f"--threads={threads}", f"--chunk={chunk}"]
        command += [f"--precision={precision}"]
        environment = dict(os.environ, PYTHONPATH="" if rival.venv else str(ROOT))
        if rival.venv:
            environment["OMP_NUM_THREADS"] = str(threads)
        if rival.venv not in ("", "torch"):  # not written for an accelerator
            environment["CUDA_VISIBLE_DEVICES"] = ""
        with open(f"{folder}/log", "w+") as log:
            begin = time.monotonic()
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env=environment,
                cwd=folder,
                start_new_session=True,
            )
            code = None
            over = contextlib.suppress(subprocess.TimeoutExpired)
            with _ended(process), _watch(process.pid) as peak, over:
                code = process.wait(timeout)
            log.seek(0)
            said = [line.strip() for line in log if any(map(str.isalpha, line))]
        if code is None:
            return Run(error=f"stopped after {timeout:.0f} s")
        events = pathlib.Path(folder, "events.jsonl")
        weights = pathlib.Path(folder, "weights.npz")
        if code or not weights.exists():
            return Run(error=f"failed: {_reason(said)[:200]}")
        first, *others, end = map(json.loads, events.read_text().splitlines())
        times = [first["time"]] + [event["time"] for event in others]
        with np.load(weights) as arrays:
            params = dict(arrays)
        seconds = tuple(b - a for a, b in zip(times[:-1], times[1:], strict=True))
        most = end["device_bytes"] or max(peak)
        return Run(times[0] - begin, seconds, most, first["versions"], params)


def _reason(said: list[str]) -> str:
    """Pick the first line of a log that begins with an error, or else the last one.

    That may be one that was handled; but launchers end with an error of their own.
    """
    prefix = r"(\[\w+\]: |\([^)]*pid=[^)]*\) )?"  # of torch.distributed, of Ray
    named = re.compile(prefix + r"(\w+\.)*\w*(Error|Exception)\b")
    return next(filter(named.match, said), "".join(said[-1:]))


@contextlib.contextmanager
def _ended(process: subprocess.Popen):
    """Kill a process and its descendants at the end of a context, or at an error."""
    try:
        yield
    finally:
        descendants = _family(process.pid)[1:]
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for pid in descendants:  # some may have left the group
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def _watch(pid: int):
    """Sample the memory of a process and its descendants, a list of bytes."""
    peak, over = [0], threading.Event()

    def sample():
        while not over.wait(_POLL_SECONDS):
            peak.append(sum(map(_proportional_bytes, _family(pid))))

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield peak
    finally:
        over.set()
        sampler.join()


def _family(pid: int) -> list[int]:
    """List a process and its descendants."""
    children = []
    with contextlib.suppress(OSError):
        for path in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
            children += map(int, path.read_text().split())
    return [pid, *(p for child in children for p in _family(child))]


def _proportional_bytes(pid: int) -> int:
    """Read a process's share of memory; 0 if it is gone, or on other systems."""
    try:
        lines = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    sizes = (int(x.split()[1]) * 1024 for x in lines if x.startswith("Pss:"))
    return next(sizes, 0)


def measure_peak(pythons: dict[str, str], precision: str = "") -> float:
    """Return the highest GFLOP/s that any library multiplies matrices with."""
    cores = len(os.sched_getaffinity(0))
    ways = [(sys.executable, "numpy"), (sys.executable, "jax")]
    ways += [(pythons["torch"], "torch")] if pythons.get("torch") else []
    script = ADAPTERS / "run_sgemm.py"
    return max(
        float(
            subprocess.run(
                [python, str(script), library, str(cores), precision],
                capture_output=True,
                check=True,
                text=True,
                timeout=300,
            ).stdout
        )
        for python, library in ways
    )


def describe_machine(script: str) -> dict[str, Any]:
    """Tell where, when and by which command it was measured."""
    model = platform.processor()
    with contextlib.suppress(OSError, StopIteration):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        model = next(x.split(": ")[1] for x in lines if x.startswith("model name"))
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{len(os.sched_getaffinity(0))} cores, {model}",
        "accelerator": name_accelerator(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "command": shlex.join(
            ["python", "-m", f"experiments.benchmarks.{script}", *sys.argv[1:]]
        ),
    }


def name_accelerator() -> str:
    """Name the NVIDIA cards of this machine, without taking hold of one."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, check=True, text=True)
        return "; ".join(done.stdout.splitlines())
    return ""
