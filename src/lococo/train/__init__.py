"""Training of heads; needs the extra `train`."""
