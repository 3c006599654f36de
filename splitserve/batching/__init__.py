"""Queues requests by model, merges compatible ones into calls, and splits the responses."""
