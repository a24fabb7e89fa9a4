"""`fastddp.spawn`: the process that starts the ranks, and the ranks."""
