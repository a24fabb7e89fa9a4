"""What other packages need to be told about fastddp; each module needs its package."""
