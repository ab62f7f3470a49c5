"""QASPER: reading its papers, generating papers in its form, and turning them into episodes."""
