"""The demo world: pictures rendered by us, and the small CLIP trained on them that the project ships.

`renderer` draws a picture with its masks and facts, `captions` says true sentences about it, `collections` makes the
two shipped collections, `training` makes the model. Importing this package does not import torch.
"""
