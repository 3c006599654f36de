"""A service at another address: its replicas and the stream to each."""
