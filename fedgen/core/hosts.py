"""Several processes that run one program, each with devices of its own.

All of them read the same flags and data, hold some of the clients and take the same
decisions, in the same order; the first one writes. With one process nothing here does
anything.
"""

from __future__ import annotations

import atexit
import logging
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")

_REACH = 30  # seconds in which the coordinator has to answer
_JOIN = 60  # seconds in which all processes have to come
_SILENCE = 30  # seconds without a sign of life after which a process is lost
_END = 60  # seconds in which all processes have to end

# JAX aborts a process whose coordinator is gone, and nothing in the process itself can
# say a last word then. This does, when the pipe breaks.
_WITNESS = """\
import sys
for line in sys.stdin: words = line.strip()
if words: print("error:", words, file=sys.stderr)
"""
_witness: subprocess.Popen | None = None


def join(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Become one of several processes; to be called before JAX is first used.

    Args:
      coordinator: HOST:PORT of the first process, "auto" for what the cluster says
        (SLURM, Kubernetes, Open MPI, TPU pods), or None to stay alone.
      num_processes: How many there are.
      process_id: Which one this is, counted from 0.

    Raises:
      ValueError: If the three do not fit together, or the coordinator cannot be
        reached.
    """
    if coordinator is None:
        if num_processes is not None or process_id is not None:
            raise ValueError(
                "num_processes and process_id must come with a coordinator, got none"
            )
        return
    if coordinator == "auto":
        if num_processes is not None or process_id is not None:
            raise ValueError(
                "num_processes and process_id must come with a coordinator HOST:PORT, "
                "got auto"
            )
        _bear_witness("this process could not join those that the cluster names")
    else:
        _check(coordinator, num_processes, process_id)
        _bear_witness(
            f"process {process_id} of {num_processes} could not join at {coordinator}: "
            f"in {_JOIN} s not every process came, or one came twice"
        )
    logging.getLogger("jax._src.distributed").setLevel(logging.WARNING)
    # Its handler would keep SIGTERM from ending the process.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            None if coordinator == "auto" else coordinator,
            num_processes,
            process_id,
            initialization_timeout=_JOIN,
            heartbeat_timeout_seconds=_SILENCE,
            shutdown_timeout_seconds=_END,
        )
    except ValueError as error:
        raise ValueError(
            f"coordinator auto found no cluster to tell of the processes ({error}); "
            "name --coordinator=HOST:PORT, --num_processes and --process_id"
        ) from error
    each = [len(jax.local_devices(process_index=i)) for i in range(jax.process_count())]
    if len(set(each)) > 1:
        raise ValueError(
            f"every process must have as many devices as the others, got {each}; on "
            "CPUs set JAX_NUM_CPU_DEVICES"
        )
    resume_from("the start")


def _check(coordinator: str, num_processes: int | None, process_id: int | None) -> None:
    """Raise a `ValueError` unless this process can expect to meet the others."""
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"coordinator must be auto or HOST:PORT, got {coordinator!r}")
    if num_processes is None or num_processes < 1:
        raise ValueError(f"num_processes must be at least 1, got {num_processes}")
    if process_id is None or not 0 <= process_id < num_processes:
        raise ValueError(
            f"process_id must be in [0, {num_processes}), got {process_id}"
        )
    if process_id == 0:
        # JAX itself would let two coordinators share a port.
        try:
            socket.create_server(("", int(port))).close()
        except OSError as error:
            raise ValueError(
                f"coordinator {coordinator} must be free for process 0: {error}; has "
                "another process the same id?"
            ) from error
    else:
        _await(host.strip("[]"), int(port))


def _await(host: str, port: int) -> None:
    """Wait for the coordinator to listen."""
    deadline = time.monotonic() + _REACH
    while True:
        try:
            return socket.create_connection((host, port), timeout=5).close()
        except OSError as error:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"coordinator {host}:{port} must be reached within {_REACH} s: "
                    f"{error}; has process 0 been started there?"
                ) from error
            time.sleep(0.2)


def _bear_witness(words: str) -> None:
    """Start the process that speaks for this one should it be aborted."""
    global _witness
    if _witness is None:
        _witness = subprocess.Popen(
            [sys.executable, "-c", _WITNESS],
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that an interrupt does not reach it
        )
        atexit.register(_bear_witness, "")
    _witness.stdin.write(" ".join(words.split()) + "\n")
    _witness.stdin.flush()


def resume_from(where: str) -> None:
    """Keep in mind, for a last word, where `--resume` would continue."""
    if _witness is not None:
        _bear_witness(
            f"process {jax.process_index()} of {jax.process_count()} was ended, most "
            f"likely because another one was lost; --resume continues from {where}"
        )


def leave(error: Exception) -> NoReturn:
    """End this process at once for an error of its own; the others wait for it."""
    # Losing another process is told in one line, anything else is worth a traceback.
    if isinstance(error, jax.errors.JaxRuntimeError):
        print(str(error).strip().splitlines()[0][:200], file=sys.stderr)
    else:
        traceback.print_exception(error)
        if _witness is not None:
            _bear_witness("")  # The reason has been told.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def several() -> bool:
    """Tell whether there are several processes."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Tell whether this process is the one that writes."""
    return jax.process_index() == 0


def gather(text: str) -> list[str]:
    """Collect a text of every process, in their order; also a barrier."""
    if not several():
        return [text]
    content = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(content.size))
    rows = multihost_utils.process_allgather(
        np.pad(content, (0, sizes.max() - content.size))
    )
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


def together(work: Callable[[], T]) -> T:
    """Do the same on every process; what fails on one, fails on all.

    `work` must not talk to the other processes.

    Raises:
      ValueError: If it failed on another process.
    """
    if not several():
        return work()
    result, failure, reason = None, None, ""
    try:
        result = work()
    except Exception as error:  # noqa: BLE001  # raised again below
        failure, reason = error, str(error) or type(error).__name__
    reasons = gather(reason)
    if failure is not None:
        raise failure
    for reason in filter(None, reasons):
        raise ValueError(reason)
    return result


def decide(choose: Callable[[], str]) -> str:
    """Let the first process choose a text for all.

    Raises:
      ValueError: If it fails there.
    """
    return gather(together(lambda: choose() if is_first() else ""))[0]


def require_same(what: str, text: str) -> None:
    """Raise a `ValueError` unless a text is the same on every process."""
    texts = gather(text)
    others = [i for i, each in enumerate(texts) if each != texts[0]]
    if others:
        raise ValueError(
            f"{what} must be the same on every process, got others on {others} than "
            "on 0"
        )


def fetch(array: jax.Array) -> np.ndarray:
    """Copy an array to the memory of every host, from wherever its parts lie."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)
