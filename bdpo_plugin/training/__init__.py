"""The parts of a training run that all hosts share: data, scores, training step, checkpoints and
messages."""
