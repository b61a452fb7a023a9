"""The one kind of error that is meant for the user."""

from __future__ import annotations


class FigmentError(Exception):
    """One sentence that says what is wrong, where, and what to do. Jobs print it and exit with code 2."""
