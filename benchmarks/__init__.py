"""The runner side by side with its alternatives: ``python -m benchmarks [NAME...]``."""
