"""Who computes sparse attention. Every backend is tested against `reference`, the specification.

A backend is a module with `unsupported(q, index) -> str | None` (the reason why it can't run this),
`forward(q, k, v, index, rows, scale, return_lse, mass_block) -> Attended` and
`block_mass(q, k, index, lse, rows, scale, mass_block) -> Tensor`, the mass from an LSE. One that can't
always give LSE or mass has `lacks(q, return_lse, mass) -> str | None` too; one that rounds on purpose has
a `TOLERANCE`.
"""
