"""Operators of vllm-relay. Knows no vLLM and no HTTP."""
