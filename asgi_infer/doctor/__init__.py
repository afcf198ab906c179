"""Why is my model slower in the web server than in a script? Measured, and answered.

Needs the extra ``doctor``; the command is ``asgi-infer doctor``.
"""
