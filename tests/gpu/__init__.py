"""What only a GPU can show. Without one, all of this is skipped."""
