"""The character language model behind the commands train and sample."""
