"""Both on two hosts with a slow link between them."""
