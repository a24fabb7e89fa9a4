"""Ways for other packages to train through fastddp.

The modules for Lightning need Lightning; :func:`fastddp.patch` needs nothing but torch.
"""
