"""`fastddp.spawn`: the process that starts the ranks, and what runs in the ranks."""
