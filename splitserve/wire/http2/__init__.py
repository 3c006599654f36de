"""HTTP/2 as gRPC needs it, on an asyncio transport: frames, flow control, limits. HPACK is the library hpack's.

Nothing here knows gRPC or inference. Both ends are `connection.Connection`; what a stream means is its subclasses' business.
"""
