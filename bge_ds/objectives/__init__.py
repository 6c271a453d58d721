"""What the training loop trains: an objective joins data, model and loss. Objectives know neither the loop nor each other."""
