"""MLflow and Weights & Biases: the lines of a run, each once, whatever happened to the run or to the tracker."""
