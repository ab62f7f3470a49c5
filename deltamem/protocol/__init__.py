"""OpenAI's requests, replies and errors as values; no web framework in here."""
