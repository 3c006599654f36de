"""What an operator measures: recorders that are written on the event loop, and the text that Prometheus reads.

Knows no transport and no inference: `splitserve.server.metrics` says what the parts of a service count.
"""
