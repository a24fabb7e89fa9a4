"""The time of one all-reduce."""
