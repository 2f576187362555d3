"""The record of a run: what it refuses, and that it can be written and read back."""

from __future__ import annotations

import dataclasses

import pytest

from fedgen.runs import config as config_lib
from fedgen.runs.config import Config

CHANGED = Config(
    algorithm="fedprox",
    baselines=("fedper", "local_only"),
    hyperparameters={"mu": "0.5", "note": "a b=c"},
    dataset="/some folder/data",
    alpha=0.5,
    rounds=7,
)


def test_the_defaults_pass():
    Config().check()
    Config(baselines=()).check()
    Config(corruption="all", model="mlp,cnn").check()


def test_a_chunk_is_a_number_or_a_word():
    assert dataclasses.replace(CHANGED, chunk="4") == dataclasses.replace(
        CHANGED, chunk=4
    )
    for chunk in (1, 20, "auto", "all"):
        config = dataclasses.replace(CHANGED, chunk=chunk)
        config.check()
        assert Config(**{**config_lib.to_json(config), "baselines": ()}).chunk == chunk


REFUSED = [
    *({name: 0} for name in ("num_clients", "rounds", "local_epochs", "batch_size")),
    *({name: -1} for name in ("eval_every", "classes_per_client", "local_steps")),
    *({name: -1} for name in ("checkpoint_every", "chunk", "devices", "new_clients")),
    *({name: -1} for name in ("min_size", "samples", "seed", "weight_decay")),
    *({name: -1} for name in ("samples_per_client", "eval_clients")),
    *({"alpha": x} for x in (0.0, -1.0, float("nan"), float("inf"))),
    *({"learning_rate": x} for x in (0.0, float("nan"), float("inf"))),
    *({"weight_decay": x} for x in (float("nan"), float("inf"))),
    *(
        {name: x}
        for name in ("participation", "learning_rate_decay")
        for x in (0.0, 1.5, float("nan"))
    ),
    *({name: 1.0} for name in ("momentum", "dropout", "stragglers")),
    *({"severity": x} for x in (0, 6)),
    # Wider numbers wrap around: seed 2^32 would silently be seed 0.
    *({name: 2**31} for name in ("seed", "batch_size", "local_steps")),
    {"eval_clients": 21},
    {"samples_per_client": 2**31 // 20 + 1},
    *({"chunk": x} for x in (0, 21, "21", "some", "")),
]


@pytest.mark.parametrize("change", REFUSED, ids=str)
def test_what_is_out_of_range_is_named_with_what_came(change):
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=rf"^{name} must be .*, got {value}"):
        dataclasses.replace(Config(), **change).check()


@pytest.mark.parametrize(
    ("change", "proposal"),
    [
        ({"algorithm": "pfedgn"}, "pfedgm"),
        ({"baselines": ("fedavgg",)}, "fedavg"),
        ({"partition": "dirichelt"}, "dirichlet"),
        ({"model": "mlp,small_cn"}, "small_cnn"),
        ({"corruption": "nois"}, "noise"),
    ],
)
def test_the_nearest_known_name_is_proposed(change, proposal):
    with pytest.raises(ValueError, match=f"unknown .*did you mean '{proposal}'"):
        dataclasses.replace(Config(), **change).check()


def test_samples_that_clients_share_are_not_corrupted():
    with pytest.raises(ValueError, match="corruption must be empty .*, got 'all'"):
        Config(corruption="all", samples_per_client=10).check()


def test_legs_come_once_and_the_main_one_first():
    assert Config().legs == ("pfedgm", "local_only", "fedavg")
    assert Config(algorithm="fedavg").legs == ("fedavg", "local_only")
    with pytest.raises(ValueError, match="baselines must differ"):
        Config(baselines=("fedavg", "fedavg")).check()
    with pytest.raises(ValueError, match="both the algorithm and a baseline"):
        Config(algorithm="fedavg", hyperparameters={"a": "1"}).check()


def test_differences_name_the_flag_and_both_values():
    stored = config_lib.to_json(CHANGED)
    assert config_lib.differences(CHANGED, stored) == []
    other = dataclasses.replace(
        CHANGED, alpha=0.1, baselines=(), hyperparameters={"mu": "0.5"}
    )
    assert config_lib.differences(other, stored) == [
        "--baselines was fedper,local_only, is empty",
        "--set was mu=0.5,note=a b=c, is mu=0.5",
        "--alpha was 0.5, is 0.1",
    ]


def test_equal_configurations_hash_alike_and_others_do_not():
    again = Config(**vars(CHANGED))
    assert config_lib.short_hash(again) == config_lib.short_hash(CHANGED)
    hashes = {
        config_lib.short_hash(dataclasses.replace(CHANGED, seed=i)) for i in range(9)
    }
    assert len(hashes) == 9


def test_the_command_leaves_out_defaults_and_quotes():
    assert config_lib.command(Config()) == "python -m experiments.run"
    text = config_lib.command(CHANGED)
    assert "'--set=note=a b=c'" in text and "'--dataset=/some folder/data'" in text
    assert "--baselines=fedper,local_only" in text and "num_clients" not in text
    assert "--baselines=" in config_lib.command(Config(baselines=())).split()
