"""What the demonstration needs at run time: drawn videos with known prompts."""
