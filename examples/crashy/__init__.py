"""A native function that crashes on some input, and a service that survives it.

``python -m examples.crashy``.
"""
