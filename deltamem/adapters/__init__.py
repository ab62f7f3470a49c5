"""Adapter folders: where they are found, how they are read and written, in both formats."""
