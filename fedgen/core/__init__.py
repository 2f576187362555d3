"""The engine: federations, rounds, execution, evaluation, checkpoints."""
