"""The parts that all benchmarks share: ranks, trials, statistics, reports."""
