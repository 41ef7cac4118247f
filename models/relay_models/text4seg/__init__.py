"""Text4Seg (arXiv 2410.09855): masks as text, one label for each patch of a picture."""
