"""How good and how fast diffusion language models are with a rule or a plan, beside dense attention."""
