"""The networks: layers, attention, U-Net, classifier, autoencoder, conditioners. Torch alone; no diffusion here."""
