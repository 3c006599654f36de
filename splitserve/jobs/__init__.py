"""Durable jobs: the queue's interface and its two stores, SQLite and PostgreSQL; the worker; webhooks. Knows no transport."""
