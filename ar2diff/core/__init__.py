"""Everything that travels with a converted checkpoint as `custom_generate/`: the spec, the
attention masks and decoding. Its modules import torch, transformers, the standard library and
each other, nothing else."""
