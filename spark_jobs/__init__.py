"""Spark jobs: raw data in, verified shards out. One file per job; never torch."""
