"""One training run of the command line: data, figures, loss curve."""
