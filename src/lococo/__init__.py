"""lococo."""
from lococo.attach import attach
