"""Measures splitserve alone and next to its peers: ``make bench``, ``make bench-peers``; see README.md here."""
