"""Classifiers: what the features are read from that samples are measured by."""
