"""Measure what compression costs."""
