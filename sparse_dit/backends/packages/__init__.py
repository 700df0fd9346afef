"""Block-sparse kernels of other packages: by name only, never taken unasked.

They compute whole blocks, so an index runs if it rounds to whole blocks without a rest, has no far field,
order or padding. None of them was ever run here: what was checked is their signatures and, through
emulations of what they document, the lists that they are given. On a GPU each is checked before its first
use (`backends/selfcheck.py`).
"""
