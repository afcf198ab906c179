"""Watch a small language model write, and stop it: ``python -m examples.stream``."""
