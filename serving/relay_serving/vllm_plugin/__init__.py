"""What vLLM loads through its entry points. Kept light: it is imported in every vLLM process."""
