"""Training recipes: from pictures and masks to weights that the server loads."""
