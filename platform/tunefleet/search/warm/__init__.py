"""Warm trials: forks of a process that has imported everything, instead of new processes for every trial."""
