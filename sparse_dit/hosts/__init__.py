"""Plans in other programs than diffusers and transformers: what each of them loads, one module a program."""
