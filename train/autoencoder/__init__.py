"""Training of the autoencoder: reconstruction, perceptual and adversarial phases, of which each is a run."""
