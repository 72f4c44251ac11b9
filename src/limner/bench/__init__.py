"""How fast this machine is, and Limner on it, beside diffusers where that is installed."""
