"""What a benchmark beside a peer needs: the work, the two environments, the runs and the honest table."""
