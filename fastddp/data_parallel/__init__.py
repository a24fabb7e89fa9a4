"""`fastddp.DataParallel`: one process, one graph, a replica of the model on each of its devices."""
