"""The descriptor pool of all generated stubs, apart from protobuf's default one (see protos/generate.py)."""

from __future__ import annotations

from google.protobuf import descriptor_pool

POOL = descriptor_pool.DescriptorPool()
