"""An OpenAI-compatible chat server that keeps a memory per session.

Needs fastapi, uvicorn and prometheus_client, which the rest of the library does without.
"""
