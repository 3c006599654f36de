"""gRPC over our own HTTP/2 connections: a server for any methods, and a client for one long-lived stream.

Methods get and give bytes. Nothing here knows inference.

Source: gRPC, "gRPC over HTTP2" (doc/PROTOCOL-HTTP2.md).
"""
