"""Plans of language models measured beside dense attention: texts, passkeys, questions, published rules."""
