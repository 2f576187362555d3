"""Many runs of one algorithm as one program: seeds and hyper-parameters are an axis.

Runs that differ in numbers alone, as a seed or a learning rate, are compiled once and
their states stacked, `[r, ...]`; what their data have in common is held once. A size, a
name or a switch makes another program: runs that differ in one form groups, and the
groups are trained one after another.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import math
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress
from jax.sharding import Mesh, SingleDeviceSharding

from fedgen import algorithms
from fedgen.core import compiling, execution, rounds, simulate
from fedgen.core.algorithm import Algorithm, State
from fedgen.core.checkpoint import Checkpoints
from fedgen.core.compiling import compile_ahead
from fedgen.core.evaluate import Evaluation
from fedgen.core.federation import Federation
from fedgen.core.rounds import Report
from fedgen.runs import build, compare, experiment, plots, workdir
from fedgen.runs import config as config_lib
from fedgen.runs import leg as leg_lib
from fedgen.runs.build import Setup
from fedgen.runs.config import Config
from fedgen.runs.leg import Leg, Line

# Flags that may vary: how clients train, never what they are scored on or when.
SWEPT = tuple(name for name in compare.OWN if name != "rounds")
RECORD = "sweep.json"

PyTree = Any
Row = dict[str, Any]
Scalars = Mapping[str, Any]  # flags and hyper-parameters that are mapped, by name


@dataclasses.dataclass(frozen=True)
class Sweep(Config):
    """The flags of a sweep: those of all its runs, and what differs between them."""

    seeds: int = 3  # counted from `seed`
    grid: dict[str, str] = dataclasses.field(default_factory=dict)  # name: "a,b,c"


class Point(NamedTuple):
    """One run of a sweep."""

    chosen: dict[str, str]  # from the grid
    config: Config
    scalars: dict[str, float] = {}  # what of it is a number in its program

    @property
    def name(self) -> str:
        """The folder of the run, under that of the sweep."""
        settings = {**self.chosen, "seed": self.config.seed}
        return "-".join(f"{key}={value}" for key, value in settings.items())

    @property
    def data(self) -> tuple[int, str]:
        """What of the configuration the data and the model depend on."""
        return self.config.seed, self.config.model


class Runs(NamedTuple):
    """What is a run's own, apart from its state; leaves `[r]`."""

    seed: jax.Array  # int32
    data: jax.Array  # int32, which of the stacked data is its own
    scalars: Scalars  # float32


class Group(NamedTuple):
    """Runs that share a program, compiled.

    States, reports and evaluations of the leg have an axis of runs in front. Its
    `block` is `(state, rounds [r]) -> (state, reports, finite)` and `evaluate` takes
    the state alone. Runs that make `r` divide by the devices come last.
    """

    points: list[Point]
    leg: Leg
    num_runs: int  # r
    place: Callable[[np.ndarray], jax.Array]  # puts `[r]` on the devices


def sweep(
    asked: Sweep,
    folder: str | None = None,
    *,
    resume: bool = False,
    console: rich.console.Console | None = None,
) -> dict[str, Any]:
    """Train all runs of a sweep and write everything under its folder.

    Args:
      asked: What to do.
      folder: Where to; None chooses a new folder under `runs/`.
      resume: Continue what the folder holds instead of refusing it.
      console: Where progress goes.

    Returns:
      The content of sweep.json, and `workdir`.

    Raises:
      ValueError: Before anything is written, if something asked for cannot be done.
      FloatingPointError: If every point of the grid diverged.
    """
    console = console or rich.console.Console(stderr=True)
    asked = dataclasses.replace(asked, baselines=())
    points = list_points(asked)
    path = workdir.claim(asked, folder, resume, RECORD)
    devices = asked.devices or len(jax.devices())
    execution.make_mesh(devices)  # refuses more than there are
    with compiling.cached(workdir.programs(path)) as keep:
        start = time.perf_counter()
        with console.status("compiling"):
            setups = deal(points)
            build_group = functools.partial(prepare, setups=setups, devices=devices)
            with concurrent.futures.ThreadPoolExecutor() as pool:
                groups = list(pool.map(build_group, to_groups(points, setups)))
        keep()
    environment = experiment.environment(next(iter(setups.values())))
    compile_seconds = time.perf_counter() - start

    path.mkdir(parents=True, exist_ok=True)
    record = {
        "flags": config_lib.to_json(asked),
        "environment": {**environment, "devices": devices},
    }
    workdir.write_json(path / RECORD, record)
    summaries = {}
    start = time.perf_counter()
    with rich.progress.Progress(console=console) as bars:
        tasks = [
            bars.add_task(
                f"{len(group.points)} runs",
                total=asked.rounds * len(group.points),
                start=False,
            )
            for group in groups
        ]
        for number, (group, task) in enumerate(zip(groups, tasks, strict=True)):
            bars.start_task(task)
            summaries |= train(
                group,
                path,
                path / "checkpoints" / str(number),
                progress=functools.partial(bars.advance, task),
                warn=lambda text: console.print(
                    f"warning: {text}", style="yellow", markup=False, soft_wrap=True
                ),
            )
    rows = to_rows(points, summaries)
    record |= {
        "rows": rows,
        "best": best(rows),
        "programs": len(groups),
        "seconds": {"compile": compile_seconds, "steady": time.perf_counter() - start},
    }
    workdir.write_json(path / RECORD, record)
    (path / "sweep.md").write_text(to_markdown(rows))
    plots.grid(rows, record["best"], path / "sweep.png")
    if all(row["diverged"] for row in rows):
        raise FloatingPointError(
            f"every point of the grid diverged, see {path}/sweep.md"
        )
    return {**record, "workdir": str(path)}


def list_points(asked: Sweep) -> list[Point]:
    """List the runs, seed after seed at each point of the grid.

    Raises:
      ValueError: If a name of the grid is unknown or may not vary, or if a value
        is wrong.
    """
    config_lib.nearest("algorithm", asked.algorithm, algorithms.REGISTRY)
    if asked.seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {asked.seeds}")
    if asked.new_clients:
        raise ValueError(
            f"new_clients must be 0 in a sweep, got {asked.new_clients}; score them in "
            "a run of what the sweep finds best"
        )
    axes = {name: _values(asked, name, text) for name, text in asked.grid.items()}
    names = [field.name for field in dataclasses.fields(Config)]
    base = Config(**{name: getattr(asked, name) for name in names})
    points = []
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        flags = {k: config_lib.typed(k, v) for k, v in chosen.items() if k in SWEPT}
        at = _with(base, {**chosen, **flags})
        points += [
            Point(chosen, dataclasses.replace(at, seed=asked.seed + i))
            for i in range(asked.seeds)
        ]
    for point in points:
        point.config.check()
        _build_algorithm(point.config)
    return points


def _values(asked: Sweep, name: str, text: str) -> list[str]:
    """Split the values of a name of the grid."""
    own = algorithms.hyperparameters(asked.algorithm)
    fixed = {field.name for field in dataclasses.fields(Sweep)} - {*SWEPT, *own}
    if name in fixed:
        raise ValueError(
            f"{name} is the same for all runs of a sweep and cannot be in its grid; "
            f"what can: {', '.join([*SWEPT, *own])}"
        )
    config_lib.nearest("grid name", name, [*SWEPT, *own])
    if name in asked.hyperparameters:
        raise ValueError(f"{name} must be either set or in the grid, got both")
    values = text.split(",")
    if "" in values:
        raise ValueError(f"grid {name} must be values a,b,c, got {text!r}")
    typed = [_typed(asked.algorithm, name, value) for value in values]
    if len(set(typed)) < len(typed):
        raise ValueError(f"grid {name} must be different values, got {text!r}")
    return values


def _typed(algorithm: str, name: str, text: str) -> Any:
    if name in SWEPT:
        return config_lib.typed(name, text)
    return algorithms.settings(algorithm, {name: text})[name]


def _with(config: Config, values: Mapping[str, Any]) -> Config:
    """Set flags and hyper-parameters, each by its name."""
    flags = {name: value for name, value in values.items() if name in SWEPT}
    own = {name: value for name, value in values.items() if name not in SWEPT}
    return dataclasses.replace(
        config, hyperparameters={**config.hyperparameters, **own}, **flags
    )


def _build_algorithm(config: Config) -> Algorithm:
    return build.build_algorithm(config, config.algorithm)


def deal(points: Sequence[Point]) -> dict[tuple[int, str], Setup]:
    """Deal out the data of every seed, for every model."""
    setups = {}
    for point in points:
        if point.data not in setups:
            # A device holds whole runs, so no mesh shares their clients.
            setups[point.data] = build.build(
                dataclasses.replace(point.config, devices=1)
            )
    return setups


def to_groups(points: Sequence[Point], setups: Mapping) -> list[list[Point]]:
    """Bring together the runs that can share a program, and say what is mapped."""
    # An algorithm that has yet to look at the data has sizes of its own.
    settled = [_build_algorithm(point.config).prepare is None for point in points]
    examples = {
        name: point
        for point in itertools.compress(points, settled)
        for name in _numbers(point)
    }
    mapped = {
        name
        for name, point in examples.items()
        if _traces(point, setups[point.data], name)
    }
    groups = {}
    for point, shared in zip(points, settled, strict=True):
        constants = point.config
        if shared:
            scalars = {k: v for k, v in _numbers(point).items() if k in mapped}
            point = point._replace(scalars=scalars)
            constants = _with(constants, dict.fromkeys(scalars))
            constants = dataclasses.replace(constants, seed=0)
        leaves = jax.tree.leaves(setups[point.data].federation)
        key = str((constants, [(leaf.shape, leaf.dtype) for leaf in leaves]))
        groups.setdefault(key, []).append(point)
    return list(groups.values())


def _numbers(point: Point) -> dict[str, float]:
    """Return what of the grid may be traced: numbers that switch nothing on or off.

    A 0 often leaves a term out and an infinity takes a limit, in Python.
    """
    algorithm = point.config.algorithm
    typed = {k: _typed(algorithm, k, text) for k, text in point.chosen.items()}
    return {
        name: value
        for name, value in typed.items()
        if isinstance(value, float) and value and math.isfinite(value)
    }


def _traces(point: Point, setup: Setup, name: str) -> bool:
    """Tell whether a number can be traced, by trying."""
    if name in SWEPT:  # of which algorithms see no more than an optimiser
        return True

    def run(value):
        key, federation = jax.random.key(0), setup.federation
        algorithm = _build_algorithm(_with(point.config, {name: value}))
        state = rounds.make_init(algorithm)(key, federation)
        round_fn = rounds.make_round(algorithm, setup.sampler, setup.execution)
        state, _ = round_fn(state, federation, key)
        evaluate = leg_lib.make_evaluate(algorithm, setup.execution, point.config)
        return evaluate(state, federation, key)

    try:
        jax.eval_shape(run, jax.ShapeDtypeStruct((), jnp.float32))
    except TypeError:  # which JAX raises where Python needs to know a number
        return False
    return True


def prepare(points: list[Point], setups: Mapping, devices: int) -> Group:
    """Compile the program of some runs; nothing is trained yet.

    Raises:
      ValueError: If the algorithm does not suit the federation, or the runs do not
        fit into memory.
    """
    start = time.perf_counter()
    config = points[0].config
    data = list(dict.fromkeys(point.data for point in points))
    setup = setups[data[0]]
    algorithm = _build_algorithm(config).prepared(setup.federation)
    length = leg_lib.block_length(config)

    mesh = execution.make_mesh(min(devices, len(points)))
    whole, split = _shardings(mesh)
    num_devices = 1 if mesh is None else mesh.size
    # The runs that fill up the devices train for no round.
    filled = points + points[-1:] * (-len(points) % num_devices)

    def place(values: Sequence, dtype: Any = np.int32) -> jax.Array:
        return jax.device_put(np.asarray(values, dtype), split)

    runs = Runs(
        place([point.config.seed for point in filled]),
        place([data.index(point.data) for point in filled]),
        {
            name: place([point.scalars[name] for point in filled], np.float32)
            for name in points[0].scalars
        },
    )
    stacked, differs = stack([setups[each].federation for each in data])
    stacked = jax.device_put(stacked, whole)

    def lift(fn: Callable) -> Callable:
        """Lift `fn(algorithm, federation, keys, *args)` of one run to all runs."""

        def one(stacked, run, *args):
            federation = jax.tree.map(
                lambda a, differs: a[run.data] if differs else a, stacked, differs
            )
            own = algorithm
            if run.scalars:
                own = _build_algorithm(_with(config, run.scalars))
            return fn(own, federation, leg_lib.run_keys(run.seed), *args)

        def some(stacked, *args):
            # One after another or all at once, as it is best for clients.
            return execution.map_clients(
                functools.partial(one, stacked), execution.default_chunk()
            )(*args)

        return execution.on_shards(some, mesh, whole=(0,))

    def init(algorithm, federation, keys):
        return rounds.make_init(algorithm)(keys[0], federation)

    def block(algorithm, federation, keys, state, count):
        round_fn = rounds.make_round(algorithm, setup.sampler, setup.execution)
        train = simulate.make_block(round_fn, length)
        state, reports = train(state, federation, keys[1], count)
        return state, reports, simulate.finite_leaves(state.server)

    def evaluate(algorithm, federation, keys, state):
        score = leg_lib.make_evaluate(algorithm, setup.execution, config)
        return score(state, federation, keys[2])

    def compiled(fn: Callable, *args: Any, quick: bool = True) -> Callable:
        done = compile_ahead(fn, stacked, runs, *args, quick=quick)
        leg_lib.check_memory(config.algorithm, done, num_devices)
        return functools.partial(done, stacked, runs)

    init, evaluate = jax.jit(lift(init)), jax.jit(lift(evaluate))
    block = jax.jit(lift(block), donate_argnums=2)
    like = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=split),
        jax.eval_shape(init, stacked, runs),
    )
    quick = config.rounds <= leg_lib.SHORT  # as for one run, so it rounds alike
    # The compiler is single-threaded for the most part; the machine is not.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(compiled, init)
        train = pool.submit(
            compiled, block, like, place([0] * len(filled)), quick=quick
        )
        score = pool.submit(compiled, evaluate, like)
    leg = Leg(
        config.algorithm,
        algorithm,
        first.result(),
        like,
        train.result(),
        score.result(),
        rounds.traffic(
            algorithm,
            setup.federation,
            jax.eval_shape(
                rounds.make_init(algorithm), jax.random.key(0), setup.federation
            ),
        ),
        length,
        time.perf_counter() - start,
    )
    return Group(points, leg, len(filled), place)


def _shardings(mesh: Mesh | None) -> tuple[jax.sharding.Sharding, ...]:
    """Say where lies what all runs share, and what has an axis of runs."""
    if mesh is None:
        return (SingleDeviceSharding(jax.devices()[0]),) * 2
    # The runs take the place that the clients of one run have on a mesh.
    _, whole, split = execution.state_shardings(mesh)
    return whole, split


def stack(federations: Sequence[Federation]) -> tuple[Federation, Federation]:
    """Stack arrays that differ, keep one of those that are equal, and say which."""
    federations = [jax.tree.map(np.asarray, each) for each in federations]
    differs = jax.tree.map(
        lambda first, *others: not all(np.array_equal(first, a) for a in others),
        *federations,
    )
    stacked = jax.tree.map(
        lambda differs, *leaves: np.stack(leaves) if differs else leaves[0],
        differs,
        *federations,
    )
    return stacked, differs


def train(
    group: Group,
    folder: pathlib.Path,
    checkpoints: pathlib.Path,
    *,
    progress: Callable[[int], None],
    warn: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """Train the runs of a group to the last round, from where they were left.

    Every run has a folder with metrics.jsonl and summary.json. A run that diverges
    ends with a line that says so, and the others go on.

    Args:
      group: The runs, compiled.
      folder: Of the sweep.
      checkpoints: Where to keep those of the group.
      progress: Called with the number of rounds that were done, over all runs.
      warn: Called with a sentence for every checkpoint that cannot be used.

    Returns:
      The summaries by name of the run; that of a diverged one is its last line.
    """
    leg, points = group.leg, group.points
    config = points[0].config
    files = [folder / "runs" / point.name / "metrics.jsonl" for point in points]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
    evaluation = None
    with contextlib.ExitStack() as stack:
        kept = None
        if config.checkpoint_every:
            # To a checkpoint runs are what clients are in one run.
            ids = np.arange(group.num_runs)
            ids[len(points) :] = -1
            kept = stack.enter_context(Checkpoints(checkpoints.absolute(), [ids]))
        state, done, lines = _begin(leg, kept, files, warn)
        progress(done * len(points))
        while done < config.rounds and not all(map(_diverged, lines)):
            start, length = done, leg.rounds_per_block
            done = min(config.rounds, (start // length + 1) * length)
            count = np.zeros(group.num_runs)
            count[: len(points)] = [
                0 if _diverged(mine) else done - start for mine in lines
            ]
            state, *told = leg.block(state, group.place(count))
            last = done == config.rounds
            scored = last or done % config.eval_every == 0
            told.append(evaluation := leg.evaluate(state) if scored else None)
            told = jax.device_get(told)
            for i, (file, mine) in enumerate(zip(files, lines, strict=True)):
                if not _diverged(mine):
                    new = _lines(leg, *_nth(told, i), start, done)
                    workdir.append_lines(file, new)
                    mine += new
            if kept and (last or done % config.checkpoint_every == 0):
                kept.save(State(jnp.int32(done), (), (state,)), {})
            progress((done - start) * len(points))
        if evaluation is None:
            evaluation = leg.evaluate(state)
    evaluation = jax.device_get(evaluation)
    summaries = {}
    for i, (point, mine) in enumerate(zip(points, lines, strict=True)):
        summary = mine[-1]
        if not _diverged(mine):
            summary = leg_lib.summarise(leg, config, mine, _nth(evaluation, i))
        workdir.write_json(files[i].with_name("summary.json"), summary)
        summaries[point.name] = summary
    return summaries


def _begin(
    leg: Leg,
    checkpoints: Checkpoints | None,
    files: Sequence[pathlib.Path],
    warn: Callable[[str], None],
) -> tuple[State, int, list[list[Line]]]:
    """Return the states to train on from, their round, and the lines up to it."""
    lines = [workdir.read_lines(file) for file in files]
    known = min((len(mine) for mine in lines if not _diverged(mine)), default=None)
    state, done = None, 0
    if checkpoints is not None:
        one = SingleDeviceSharding(jax.devices()[0])
        like = State(jax.ShapeDtypeStruct((), jnp.int32, sharding=one), (), (leg.like,))
        if found := checkpoints.restore(like, warn, known):
            done, state = int(found[0].round), found[0].clients[0]
    if state is None:
        state = leg.init()
    lines = [mine[:done] for mine in lines]
    for file, mine in zip(files, lines, strict=True):
        workdir.write_lines(file, mine)
    return state, done, lines


def _diverged(lines: Sequence[Line]) -> bool:
    return bool(lines) and "diverged" in lines[-1]


def _nth(tree: PyTree, i: int) -> PyTree:
    """Take one run out of what is stacked."""
    return jax.tree.map(lambda a: a[i], tree)


def _lines(
    leg: Leg,
    reports: Report,
    finite: PyTree,
    evaluation: Evaluation | None,
    start: int,
    done: int,
) -> list[Line]:
    """Turn what a block tells of a run into lines, or into one if it diverged."""
    reports = jax.tree.map(lambda a: a[: done - start], reports)
    try:
        simulate.check_reported(finite, reports, start)
        new = leg_lib.round_lines(leg, reports, done)
        if evaluation is not None:
            new[-1] |= leg_lib.evaluation_line(leg.algorithm, evaluation, done)
    except FloatingPointError as error:
        return [{"algorithm": leg.name, "round": start + 1, "diverged": str(error)}]
    return new


def to_rows(points: Sequence[Point], summaries: Mapping[str, Any]) -> list[Row]:
    """Sum up the seeds of each point of the grid; accuracies are of test rows.

    A point of which a seed diverged has no accuracies.
    """
    rows = []
    for _, same in itertools.groupby(points, lambda point: point.chosen):
        same = list(same)
        of_seed = {point.config.seed: summaries[point.name] for point in same}
        diverged = {
            seed: summary["diverged"]
            for seed, summary in of_seed.items()
            if "diverged" in summary
        }
        known = [] if diverged else list(of_seed.values())
        per_seed = [summary["personal_accuracy"]["mean"] for summary in known]
        rows.append(
            {
                "settings": same[0].chosen,
                "command": config_lib.command(same[0].config),
                "validation_accuracy": _mean(
                    [summary["validation_accuracy"]["mean"] for summary in known]
                ),
                "personal_accuracy": {
                    "mean": _mean(per_seed),
                    "std": float(np.std(per_seed, ddof=1))
                    if len(per_seed) > 1 and None not in per_seed
                    else None,
                    "per_seed": per_seed,
                },
                "worst_decile": _mean(
                    [summary["personal_accuracy"]["worst_decile"] for summary in known]
                ),
                "global_accuracy": _mean(
                    [summary["global_accuracy"] for summary in known]
                ),
                "diverged": diverged,
            }
        )
    return rows


def _mean(values: Sequence[float | None]) -> float | None:
    return float(np.mean(values)) if values and None not in values else None


def best(rows: Sequence[Row]) -> int | None:
    """Return which row has the highest validation accuracy, the first of equal ones."""
    scored = [i for i, row in enumerate(rows) if row["validation_accuracy"] is not None]
    return max(scored, key=lambda i: rows[i]["validation_accuracy"], default=None)


def to_markdown(rows: Sequence[Row]) -> str:
    """Write the table, in %; the spread is the standard deviation over seeds."""
    names = list(rows[0]["settings"])
    head = [*names, "validation", "personal accuracy", "worst decile", "global", ""]
    lines = [head, [*["---"] * len(names), *["---:"] * 4, "---"]]
    winner = best(rows)
    for i, row in enumerate(rows):
        accuracy = row["personal_accuracy"]
        spread = "" if accuracy["std"] is None else f" ± {100 * accuracy['std']:.1f}"
        note = "best on validation" if i == winner else ""
        if row["diverged"]:
            note = f"diverged with seed {', '.join(map(str, row['diverged']))}"
        lines.append(
            [
                *row["settings"].values(),
                compare.percent(row["validation_accuracy"]),
                compare.percent(accuracy["mean"]) + spread,
                compare.percent(row["worst_decile"]),
                compare.percent(row["global_accuracy"]),
                note,
            ]
        )
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
