"""What all backends share: the objective, products by chunks, sums over shards."""
