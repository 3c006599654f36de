"""The REST face of the proxy."""
