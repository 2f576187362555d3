"""Files of a run: written whole or not at all, never over another run's."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from typing import Any

import jax

from fedgen.runs import config as config_lib
from fedgen.runs.config import Config


def claim(
    config: Config, folder: str | None, resume: bool, record: str = "config.json"
) -> pathlib.Path:
    """Choose the folder of a run; nothing is written yet.

    Args:
      config: What is asked for.
      folder: `--workdir`; None chooses a new one under `runs/`, or, with `resume`,
        the newest one there of the same configuration.
      resume: Whether to continue what the folder holds.
      record: The file that says what the folder holds.

    Raises:
      ValueError: If the folder holds another configuration, holds this one and
        `resume` is not set, or cannot be a folder.
    """
    path = pathlib.Path(folder) if folder is not None else _choose(config, resume)
    _check_place(path)
    stored = _stored(path / record)
    if stored is None:
        if path.exists() and any(path.iterdir()) and not _unfinished(path, record):
            raise ValueError(
                f"workdir {path} holds files but no {record} of a run; name an empty "
                "or a new folder"
            )
        return path
    changed = config_lib.differences(config, stored)
    if changed:
        verb = "cannot resume" if resume else "workdir holds another configuration"
        raise ValueError(f"{verb}: {path} differs in {'; '.join(changed)}")
    if not resume:
        raise ValueError(
            f"workdir {path} already holds this run; continue it with --resume or "
            "name another folder"
        )
    return path


def recorded(config: Config, path: pathlib.Path) -> Config:
    """Replace the layout by that of the run in the folder, if there is one.

    Chunk and devices decide how sums are rounded, so a resumed run does not choose
    anew. Flags that name a layout count, and the devices have to be there.
    """
    record = path / "config.json"
    if _stored(record) is None:
        return config
    was = json.loads(record.read_text())["environment"]
    if was["platform"] != jax.default_backend():
        return config
    same = was.get("processes", 1) == jax.process_count()
    fits = same and was["devices"] <= len(jax.devices())
    return dataclasses.replace(
        config,
        devices=config.devices or (was["devices"] if fits else 0),
        chunk=was.get("chunk", "auto") if config.chunk == "auto" else config.chunk,
    )


def programs(path: pathlib.Path) -> pathlib.Path:
    """Return where the compiled programs of a run and its neighbours are kept."""
    return path.parent / ".jax_cache"


def write_json(path: pathlib.Path, value: Any) -> None:
    """Write a JSON file by a rename, so that no reader ever sees half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(partial, path)


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """Read the lines of a metrics file, one a round, as far as they are whole."""
    lines = []
    if path.exists():
        for text in path.read_text(errors="replace").splitlines():
            try:
                line = json.loads(text)
                if line["round"] != len(lines) + 1:
                    break
            # A line that a kill cut short, or one that somebody wrote.
            except (json.JSONDecodeError, KeyError, TypeError):
                break
            lines.append(line)
    return lines


def write_lines(path: pathlib.Path, lines: list[dict[str, Any]]) -> None:
    """Write a metrics file anew, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.replace(partial, path)


def append_lines(path: pathlib.Path, lines: list[dict[str, Any]]) -> None:
    """Append JSON lines and see them to the disk."""
    with path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())


def _stored(file: pathlib.Path) -> dict[str, Any] | None:
    if not file.exists():
        return None
    try:
        content = json.loads(file.read_text())
        stored, _ = (dict(content[part]) for part in ("flags", "environment"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not the {file.name} of a run: {error!r}") from None
    return stored


def _check_place(path: pathlib.Path) -> None:
    """Raise a `ValueError` unless a folder is, or can be made, at a path."""
    place = path
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise ValueError(f"workdir must be a folder, got {path}: {place} is none")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"workdir must be writable, got {path}: {place} is not")


def _unfinished(path: pathlib.Path, record: str) -> bool:
    """Tell whether nothing is there that a run or its neighbours did not begin."""
    ours = {f"{record}.partial", programs(path / "a run").name}
    return all(file.name in ours for file in path.iterdir())


def _choose(config: Config, resume: bool) -> pathlib.Path:
    name = "-".join(
        (config.algorithm, config.dataset.replace("/", "_"), config.partition)
    )
    stem = f"{name}-{config_lib.short_hash(config)}"
    number, path = 1, pathlib.Path("runs") / stem
    latest = None
    while path.exists():
        number, latest = number + 1, path
        path = path.with_name(f"{stem}-{number}")
    return latest if resume and latest else path
