"""Several processes: launching them, what ranks agree on, sharded weights, compiled extensions."""
