"""The reducer in plain torch: the specification of the one in `csrc/reducer`, file by file."""
