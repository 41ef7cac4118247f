"""RelayAttention (arXiv 2402.14808): attention in which requests share the reading of a common prefix."""
