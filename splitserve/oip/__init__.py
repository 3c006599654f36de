"""The Open Inference Protocol: its messages and verbs, and their forms on the wire (protobuf, JSON, V1)."""
