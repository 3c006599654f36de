"""Connections: HTTP/1.1, HTTP/2, gRPC, and what listens on a port. Knows no inference."""
