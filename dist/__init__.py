"""The distributed runtime: data contract, order, loading, strategies, checkpoints, run identity."""
