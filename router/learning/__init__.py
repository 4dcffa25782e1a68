"""What the router learns from scores, apart from whom it asks: numpy and no I/O."""
