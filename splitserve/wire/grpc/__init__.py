"""gRPC on our own HTTP/2 connections: a server for any methods, a client for one long-lived stream,
and one for unary calls.

Handlers receive and return bytes. Knows no inference.

Source: gRPC, "gRPC over HTTP2" (doc/PROTOCOL-HTTP2.md).
"""
