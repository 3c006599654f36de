"""All three services in one process, calling each other directly: the one place where they are composed."""

import splitserve.server.lean_logging  # noqa: F401, first
