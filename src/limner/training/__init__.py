"""One loop for every task: diffusion, classifier, autoencoder."""
