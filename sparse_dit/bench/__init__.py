"""How fast attention backends are on this machine, measured: `sparse-dit bench`.

Nothing but the command line imports this package.
"""
