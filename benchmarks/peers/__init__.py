"""What others would build from the same two halves. Each program runs in an environment of its own, see `benchmarks.venvs`."""
