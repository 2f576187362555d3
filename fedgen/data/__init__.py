"""Samples, the clients that hold them, and how the clients' data differ."""
