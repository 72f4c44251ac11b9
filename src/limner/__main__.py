"""`python -m limner`, and what `torchrun -m limner` and `accelerate launch -m limner` start."""

from limner.cli import main

main()
