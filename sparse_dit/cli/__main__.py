"""`python -m sparse_dit.cli`, the same as `sparse-dit`."""

from . import main

main()
