"""Formats of inputs: how each is split into parts, and read."""
