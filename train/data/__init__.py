"""From pictures and captions to what training reads: latents and text embeddings in shards, batch by batch.

    source      folders and WebDataset shards: what is there, and one sample of it
    images      decoding within limits
    buckets     which of the sizes of a resolution a picture is brought to
    captions    which of several captions an epoch sees
    report      broken samples: counted, named, and too many of them stop the run
    cache       shards of latents and embeddings: written, resumed
    reading     a finished cache, and batches from it
    order       which samples are batch n of a run, on one of several GPUs
    stream      the two as the trainer takes them
    encoders    a checkpoint's autoencoder and text encoder
    prepare, contact_sheet   what `sana data prepare` and `sana data inspect` do

Importing this package, settings, buckets, captions and order does not load PyTorch.
"""
