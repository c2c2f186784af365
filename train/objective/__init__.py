"""What a training step minimises: flow matching on cached latents.

    settings    which timesteps, which weights, how many captions are dropped
    timesteps   quantiles of the timestep distributions, the flow shift, loss weights
    flow        what is drawn for a micro-batch, and the loss

Importing this package or settings does not load PyTorch.
"""
