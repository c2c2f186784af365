"""Training a Sana transformer on cached latents and embeddings, such that a resumed run is exact.

    settings     optimizer, schedule, precision, how often to save
    errors       what can go wrong, for the user
    optimizer    AdamW, AdamW in 8 bits, CAME; the learning rate as a function of the step
    ema          the average of the weights
    checkpoint   folders that are whole or not there; what a run may resume from
    loop         the steps

Importing this package, settings or errors does not load PyTorch.
"""
