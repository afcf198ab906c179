"""What all who batch are told alike."""

SIZE = 64
"""Items in a batch, at most."""
WINDOW = 0.01
"""Seconds that a batch may wait for company, where there is such an option. As long as the fixed
part of a call; and what mosec's documentation has."""
