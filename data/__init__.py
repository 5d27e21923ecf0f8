"""Environments and datasets: `data.mpe` holds the particle tasks, `data/collect.py` records datasets from them."""
