"""Step time, start-up and memory of fastddp beside torch; see `docs/benchmarks.md`."""
