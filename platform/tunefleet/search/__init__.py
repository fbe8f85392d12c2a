"""Many runs: a space of recipes, searched under Ray Tune."""
