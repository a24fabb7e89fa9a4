"""What every benchmark is made of: ranks, trials, statistics, reports."""
