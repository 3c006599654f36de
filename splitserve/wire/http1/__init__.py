"""HTTP/1.1 server connections on an asyncio transport. The parser is httptools."""
