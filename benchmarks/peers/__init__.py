"""What others would build of the same two halves. Each program runs in an environment of its own, see `benchmarks.venvs`."""
