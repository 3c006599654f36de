"""How fast splitserve is, and beside its peers: ``make bench``, ``make bench-peers``; see README.md here."""
