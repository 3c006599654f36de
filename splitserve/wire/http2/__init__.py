"""HTTP/2 without push, on an asyncio transport: frames, streams, flow control, limits. HPACK is the library hpack's.

Knows neither gRPC nor inference. Client and server connections are subclasses of `connection.Http2Connection`.
"""
