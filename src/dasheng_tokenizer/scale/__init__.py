"""Encoding corpora of any size to latents: plan, workers on one machine or on a Ray cluster, shards, index.

`encode.encode_dataset` is the entry; `generation.latent_index` has the layout of the result, and
`generation.latent_dataset` reads it.
"""
