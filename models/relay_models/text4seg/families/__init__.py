"""How each family of multimodal models wants its picture and its question: one module per family, found by itself."""
