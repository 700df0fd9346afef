"""How models of transformers are attached to and run."""
