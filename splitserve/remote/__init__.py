"""Calls to a service at another address: its replicas, a stream to each, retries within a budget."""
