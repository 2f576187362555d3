"""Generative, personalised federated learning, simulated in JAX.

`fedgen.aggregators` holds the server mathematics as pure functions of arrays, to be
used alone. `fedgen.algorithms` builds published systems from it, `fedgen.core` runs
them, `fedgen.data` and `fedgen.models` are what they run on, and `fedgen.runs` is a
whole experiment with its report.
"""
