"""Text of diffusion language models: /v1/completions, on the queue and the workers of the server."""
