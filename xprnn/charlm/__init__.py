"""Character language model of the commands `train` and `sample`: corpus, model, training loop, generation, report."""
