"""Does a revision run slower than another? Exits with 1 if so.

    python -m experiments.benchmarks.guard --base=main
    python -m experiments.benchmarks.guard --base=v0.1 --head=HEAD --limit=0.05

Both revisions run `guard_worker.py` in a process of their own and answer by turns, so
that a busy machine slows down both. A launch of the pair gives one ratio of each
benchmark, the median over its turns. A benchmark is slower if the median ratio over
the launches is beyond the limit and a sign test over the launches says that this is
not noise; with up to seven launches all have to agree.

The worker is that of the working tree for both; of a revision it uses
`fedgen.runs.build` and `fedgen.runs.leg` as a run does.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

import scipy.stats
from absl import app, flags

FLAGS = flags.FLAGS
ROOT = pathlib.Path(__file__).parents[2]
WORKER = pathlib.Path(__file__).with_name("guard_worker.py")
CASES = ("MLP round", "CNN round", "evaluation", "Gaussian fusion")
COMPILED = ("MLP round", "CNN round")  # whose first call is a benchmark as well
START = "start of the process"


def define_flags() -> None:
    """Define the flags of the command line."""
    flags.DEFINE_string("base", None, "Revision to compare with.", required=True)
    flags.DEFINE_string("head", "worktree", "Revision, or the working tree.")
    flags.DEFINE_float("limit", 0.1, "Largest slowdown that passes.", lower_bound=0)
    flags.DEFINE_integer("launches", 6, "Launches of the pair.", lower_bound=5)
    flags.DEFINE_integer("turns", 5, "Turns of a launch.", lower_bound=1)
    flags.DEFINE_multi_enum("case", CASES, CASES, "Benchmark; repeatable.")


def is_slower(ratios: Sequence[float], limit: float) -> bool:
    """Tell whether ratios of head to base, one for each launch, show a slowdown.

    The median has to be beyond the limit, and a sign test to doubt, at 5 %, that
    either revision is as likely to be the faster one.
    """
    faster = sum(ratio <= 1 for ratio in ratios)
    chance = scipy.stats.binomtest(faster, len(ratios), alternative="less").pvalue
    return statistics.median(ratios) > 1 + limit and chance < 0.05


@contextlib.contextmanager
def checkout(revision: str) -> Iterator[pathlib.Path]:
    """Unpack a revision into a temporary folder; `worktree` is what lies here.

    Raises:
      ValueError: If git knows no such revision.
    """
    if revision == "worktree":
        yield ROOT
        return
    with tempfile.TemporaryDirectory() as folder:
        packed = subprocess.run(
            ["git", "archive", revision], cwd=ROOT, capture_output=True
        )
        if packed.returncode:
            reason = packed.stderr.decode().strip()
            raise ValueError(f"no revision {revision!r} to check out: {reason}")
        subprocess.run(["tar", "-x"], cwd=folder, input=packed.stdout, check=True)
        yield pathlib.Path(folder)


class Worker:
    """A process that runs the benchmarks of one revision when told to."""

    def __init__(self, folder: pathlib.Path) -> None:
        begin = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER)],
            cwd=folder,
            env=dict(os.environ, PYTHONPATH=str(folder)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()
        self.start_seconds = time.perf_counter() - begin

    def seconds(self, case: str) -> float:
        """Run a benchmark once."""
        self._process.stdin.write(f"{case}\n")
        self._process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> str:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a benchmark failed; its error is above")
        return line


def launch(
    base: pathlib.Path, head: pathlib.Path, cases: Sequence[str], turns: int
) -> dict[str, list[tuple[float, float]]]:
    """Start both revisions and let them take turns.

    Returns:
      Seconds of base and head in each turn, by benchmark.
    """
    with contextlib.ExitStack() as stack:
        workers = []
        for folder in (base, head):
            worker = Worker(folder)
            stack.callback(worker.close)
            workers.append(worker)
        pairs = {START: [tuple(worker.start_seconds for worker in workers)]}
        for case in cases:
            first = tuple(worker.seconds(case) for worker in workers)
            if case in COMPILED:
                pairs[f"{case}, compilation"] = [first]
            pairs[case] = []
            for turn in range(turns):
                # Who is first may matter, so it changes.
                order = workers if turn % 2 else workers[::-1]
                taken = {worker: worker.seconds(case) for worker in order}
                pairs[case].append(tuple(taken[worker] for worker in workers))
    return pairs


def compare(
    base: pathlib.Path,
    head: pathlib.Path,
    cases: Sequence[str],
    launches: int,
    turns: int,
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Launch both revisions several times.

    Returns:
      The median seconds of base, and a ratio of head to base for each launch, both by
      benchmark.
    """
    seconds: dict[str, list[float]] = {}
    ratios: dict[str, list[float]] = {}
    for folder in (base, head):
        # Compiles its bytecode and reads its libraries from the disk, once.
        Worker(folder).close()
    for number in range(launches):
        # Turned around, for whoever starts later may find files cached.
        turned = number % 2
        pairs = launch(*((head, base) if turned else (base, head)), cases, turns)
        for case, each in pairs.items():
            each = [pair[::-1] if turned else pair for pair in each]
            seconds.setdefault(case, []).extend(a for a, _ in each)
            ratios.setdefault(case, []).append(
                statistics.median(b / a for a, b in each)
            )
        print(f"launch {number + 1} of {launches}", file=sys.stderr)
    return {case: statistics.median(each) for case, each in seconds.items()}, ratios


def to_markdown(
    seconds: dict[str, float], ratios: dict[str, list[float]], limit: float
) -> str:
    """Write the table; `seconds` are those of base."""
    lines = ["| benchmark | base, s | head / base | |", "|---|---:|---:|---|"]
    for case, each in ratios.items():
        middle, low, high = statistics.median(each), min(each), max(each)
        verdict = "**slower**" if is_slower(each, limit) else "ok"
        lines.append(
            f"| {case} | {seconds[case]:.3g} | {middle:.3f} [{low:.3f}, {high:.3f}] | "
            f"{verdict} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> None:
    """Compare what the flags say."""
    if len(argv) > 1:
        raise app.UsageError(f"flags begin with --, got {' '.join(argv[1:])}")
    with checkout(FLAGS.base) as base, checkout(FLAGS.head) as head:
        seconds, ratios = compare(base, head, FLAGS.case, FLAGS.launches, FLAGS.turns)
    sys.stdout.write(to_markdown(seconds, ratios, FLAGS.limit))
    if any(is_slower(each, FLAGS.limit) for each in ratios.values()):
        sys.exit(1)


if __name__ == "__main__":
    define_flags()
    app.run(main)
