"""Benchmarks of the fused LSP loss against other ways to compute it. See README.md."""
