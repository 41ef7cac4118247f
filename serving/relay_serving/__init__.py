"""The server: command line, HTTP routes and the vLLM plugins."""
