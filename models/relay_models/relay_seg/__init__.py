"""relay-seg-tiny: a small model that chats and segments, from a frozen EfficientNet-Lite0 and SmolLM2-135M."""
