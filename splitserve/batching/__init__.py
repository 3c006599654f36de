"""Merges queued requests of one model into calls, and splits the answers."""
