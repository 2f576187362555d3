"""The flag of commands that train with several seeds."""

from __future__ import annotations

from absl import flags

SEEDS = flags.DEFINE_integer("seeds", 3, "Number of seeds, counted from --seed.")
