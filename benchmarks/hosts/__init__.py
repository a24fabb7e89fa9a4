"""The times of all-reduces and steps on two hosts with a slow link between them."""
