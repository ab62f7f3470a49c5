"""Chats that keep a memory: messages, turns, batches of turns, sessions and their files."""
