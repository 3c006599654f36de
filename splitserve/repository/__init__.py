"""Model repositories: bundles, routes, and what is checked before a bundle is used."""
