"""Metrics of reconstructions, codebooks and samples."""
