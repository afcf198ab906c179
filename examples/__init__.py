"""Programs to run and to copy from: see README.md beside this file."""
