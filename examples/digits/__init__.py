"""Draw a digit, and scikit-learn reads it: ``python -m examples.digits``."""
