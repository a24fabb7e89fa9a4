"""Whether a change made a benchmark slower: the same benchmark in two source trees, in turns."""
