"""What every adapter does: read the workload, tell the time, write the weights.

Called as `python run_<rival>.py WORKLOAD.npz FOLDER [options]`. Times go to
`events.jsonl` in the folder, on the clock that all processes of a machine share, and
the last round's weights to `weights.npz`. NumPy is all that is imported here, for
this runs in every rival's environment.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import pathlib
import time
from typing import Any

import numpy as np


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("workload")
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--mode", default="")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--chunk", type=int, default=0)
    parser.add_argument("--precision", default="")  # of products, as JAX names it
    return parser.parse_args()


def weights(arrays: Any) -> dict[str, np.ndarray]:
    """Pick the initial weights, by path, out of a workload's opened file."""
    return {
        name.removeprefix("params/"): arrays[name]
        for name in arrays.files
        if name.startswith("params/")
    }


class Workload:
    """The arrays of a workload; images are normalised once, to [-1, 1].

    Attributes:
      x: `[rows, h, w, c]` float32.
      y: `[rows]` int32.
      rows: `[rounds, m, t, b]` pool rows of every minibatch.
      params: Initial weights by path, as `body/Dense_0/kernel`.
      model: Name of the model.
      learning_rate: Of the clients' SGD.
    """

    def __init__(self, path: str) -> None:
        with np.load(path) as arrays:
            self.x = arrays["x"].astype(np.float32)
            if arrays["x"].dtype == np.uint8:
                self.x /= 127.5
                self.x -= 1
            self.y, self.rows = arrays["y"], arrays["rows"]
            self.params = weights(arrays)
            meta = json.loads(str(arrays["meta"]))
        self.model, self.learning_rate = meta["model"], meta["learning_rate"]


class Events:
    """Tells the harness what happens when."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder

    def ready(self, *packages: str) -> None:
        """Say that the next thing is the first round, and with which packages."""
        versions = {name: importlib.metadata.version(name) for name in packages}
        self._tell("ready", versions=versions)

    def round_done(self) -> None:
        """Say that a round is over, its average included."""
        self._tell("round")

    def finish(self, params: dict[str, Any], device_bytes: int = 0) -> None:
        """Hand over the weights after the last round.

        Args:
          params: By path.
          device_bytes: Most memory of an accelerator that was in use, 0 without one.
        """
        self._tell("finish", device_bytes=device_bytes)
        arrays = {name: np.asarray(value) for name, value in params.items()}
        np.savez(self._folder / "weights.npz", **arrays)

    def _tell(self, event: str, **more: Any) -> None:
        line = {"event": event, "time": time.monotonic(), **more}
        with (self._folder / "events.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
