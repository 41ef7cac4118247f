"""Masks from a served multimodal model: pictures in, descriptors through the engine, masks out."""
