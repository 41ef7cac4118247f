"""Models served beside and inside the engine. Knows no vLLM and no HTTP."""
