"""Training a model on one process or many, such that a resumed run is exact.

    settings     optimizer, schedule, precision, how often to save
    errors       what can go wrong, for the user
    optimizer    AdamW, AdamW in 8 bits, CAME; the learning rate as a function of the step
    ema          the average of the weights
    checkpoint   folders that are whole or not there; what a run may resume from
    blocks       activation checkpointing and compilation
    scalars      TensorBoard, Weights & Biases
    loop         the steps

Importing this package, settings or errors does not load PyTorch.
"""
