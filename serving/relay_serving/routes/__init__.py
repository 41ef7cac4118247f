"""HTTP routes of our own, one noun a module."""
