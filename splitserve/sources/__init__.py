"""Where services get bundles from when that is not a folder: files fetched into a cache, and what lists them."""
