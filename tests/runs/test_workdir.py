"""Folders of runs: never over another run's, and whole after any kill."""

from __future__ import annotations

import dataclasses
import json

import jax
import pytest

from fedgen.runs import config as config_lib
from fedgen.runs import workdir
from fedgen.runs.config import Config

CONFIG = Config(rounds=3)


def write_config(folder, config=CONFIG, devices=None):
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "flags": config_lib.to_json(config),
        "environment": {"devices": devices or len(jax.devices())},
    }
    workdir.write_json(folder / "config.json", content)


def test_a_new_or_an_empty_folder_is_free(tmp_path):
    for resume in (False, True):
        new = tmp_path / "a" / "b"
        assert workdir.claim(CONFIG, str(new), resume) == new
        assert workdir.claim(CONFIG, str(tmp_path), resume) == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_a_run_killed_before_its_config_was_whole_may_begin_again(tmp_path):
    (tmp_path / "config.json.partial").write_text('{"fla')
    assert workdir.claim(CONFIG, str(tmp_path), True) == tmp_path
    assert workdir.claim(CONFIG, str(tmp_path), False) == tmp_path


def test_the_same_configuration_only_with_resume(tmp_path):
    write_config(tmp_path)
    assert workdir.claim(CONFIG, str(tmp_path), True) == tmp_path
    with pytest.raises(ValueError, match="--resume"):
        workdir.claim(CONFIG, str(tmp_path), False)


@pytest.mark.parametrize("resume", [False, True])
def test_another_configuration_is_refused_and_the_flag_named(tmp_path, resume):
    write_config(tmp_path)
    other = dataclasses.replace(CONFIG, alpha=0.7)
    with pytest.raises(ValueError, match="--alpha was 0.1, is 0.7"):
        workdir.claim(other, str(tmp_path), resume)


def test_another_layout_is_the_same_run(tmp_path):
    write_config(tmp_path, devices=len(jax.devices()) + 1)
    other = dataclasses.replace(CONFIG, devices=2, chunk=4)
    assert workdir.claim(other, str(tmp_path), True) == tmp_path
    assert config_lib.short_hash(other) == config_lib.short_hash(CONFIG)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "3", "{}", '{"flags": 3}', '{"flags": {}}', "\0\xff"],
)
def test_a_damaged_config_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    for resume in (False, True):
        with pytest.raises(ValueError, match=r"config\.json is not the config\.json"):
            workdir.claim(CONFIG, str(tmp_path), resume)


def test_places_where_no_folder_can_be(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    for place in (file, file / "below", file / "far" / "below"):
        with pytest.raises(ValueError, match="workdir must be a folder"):
            workdir.claim(CONFIG, str(place), False)
    (tmp_path / "dead").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="workdir must be a folder"):
        workdir.claim(CONFIG, str(tmp_path / "dead" / "run"), False)
    with pytest.raises(ValueError, match="holds files but no config"):
        workdir.claim(CONFIG, str(tmp_path), False)
    folder = tmp_path / "odd"
    (folder / "config.json").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"not the config\.json"):
        workdir.claim(CONFIG, str(folder), True)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(workdir.os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="workdir must be writable"):
        workdir.claim(CONFIG, str(tmp_path / "new"), False)


def test_without_a_name_a_new_folder_each_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []
    for _ in range(3):
        path = workdir.claim(CONFIG, None, False)
        assert path.parts[0] == "runs" and not path.exists()
        assert path.name.startswith("pfedgm-fashion_mnist_mini-dirichlet-")
        write_config(path)
        seen.append(path)
    assert len(set(seen)) == 3
    # To resume means the newest of them, or a new one if there is none.
    assert workdir.claim(CONFIG, None, True) == seen[-1]
    other = dataclasses.replace(CONFIG, seed=5, dataset="some/folder")
    assert workdir.claim(other, None, True) not in seen
    assert len(workdir.claim(other, None, True).parts) == 2


def test_json_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    workdir.write_json(path, {"a": 1})
    monkeypatch.setattr(workdir.os, "replace", lambda *args: None)
    workdir.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}


LINES = [{"round": i, "loss": 1 / i, "x": None} for i in (1, 2, 3)]


def test_lines_come_back_to_the_bit(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert workdir.read_lines(path) == []
    workdir.append_lines(path, LINES[:1])
    workdir.append_lines(path, LINES[1:])
    content = path.read_bytes()
    assert workdir.read_lines(path) == LINES
    workdir.write_lines(path, LINES)
    assert path.read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "end",
    ['{"round": 4, "lo', "\xfe\xff", '{"round": 5}', '{"round": 3}', "7", "{}", "[]"],
)
def test_lines_are_read_as_far_as_they_are_whole(tmp_path, end):
    path = tmp_path / "metrics.jsonl"
    workdir.append_lines(path, LINES)
    with path.open("ab") as file:
        file.write(end.encode("latin-1") + b"\n" + b'{"round": 4}\n')
    assert workdir.read_lines(path)[:3] == LINES
    assert len(workdir.read_lines(path)) == 3
