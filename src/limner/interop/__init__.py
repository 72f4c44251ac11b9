"""The peers' checkpoints in, the ecosystem's formats out."""
