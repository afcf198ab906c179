"""Search the Python manual by meaning: ``python -m examples.embeddings``."""
