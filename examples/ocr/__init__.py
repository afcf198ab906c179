"""Upload a photographed page, and read its text: ``python -m examples.ocr``."""
