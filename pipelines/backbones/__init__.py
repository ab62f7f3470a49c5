"""Prepared backbone folders, and the sources they are made from."""
